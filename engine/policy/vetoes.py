"""What a cosine does not see: another number, a "not", another name, the opposite word. Then no answer is shared.

Marks are made from the text by the driver (``engine/model/textmarks.py``); here they are only compared.
"""

from __future__ import annotations

from collections.abc import Sequence

from engine.cache_config import Veto
from engine.events import TextMarks


def vetoed(vetoes: Sequence[Veto], asked: TextMarks, stored: TextMarks) -> bool:
    """Whether one of these vetoes forbids that the stored question's answer serves the one asked."""
    for veto in vetoes:
        match veto:
            case "numbers":
                differ = asked.numbers != stored.numbers
            case "negation":
                differ = asked.negations % 2 != stored.negations % 2
            case "names":
                differ = asked.names != stored.names
            case "opposites":
                differ = any(-pole in stored.poles for pole in asked.poles)
        if differ:
            return True
    return False

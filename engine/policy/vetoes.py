"""What a cosine does not see: another number, a "not", another name, the opposite word. Then no answer is shared.

Marks are made from the text by the driver (``engine/model/textmarks.py``); here they are only compared. What each veto
catches and costs is measured by ``python -m sim.quality.vetoes``.

``TextMarks.poles`` holds pairs of opposites. Most are pairs of words, such as before and after; a word that a text
denies is the pair of it and its denial, told by the word's digest: ``DENIED`` below zero where the text surely denies
it, ``DOUBTED`` below where it only stands in a clause that denies something.
"""

from __future__ import annotations

from collections.abc import Sequence

from engine.cache_config import Veto
from engine.events import TextMarks

MARK_BYTES = 4  # of a word's digest
DENIED = 1 << 40
DOUBTED = 1 << 41


def vetoed(vetoes: Sequence[Veto], asked: TextMarks, stored: TextMarks) -> bool:
    """Whether one of these vetoes forbids that the stored question's answer serves the one asked. Symmetric."""
    for veto in vetoes:
        match veto:
            case "numbers":
                differ = asked.numbers != stored.numbers
            case "negation":
                differ = bool(asked.negations) != bool(stored.negations) or (
                    _denies(asked, stored) or _denies(stored, asked)
                )
            case "names":
                differ = _names_anew(asked, stored) or _names_anew(stored, asked)
            case "opposites":
                differ = any(-DENIED < pole < DENIED and -pole in stored.poles for pole in asked.poles)
        if differ:
            return True
    return False


def _denies(one: TextMarks, other: TextMarks) -> bool:
    """Whether one surely denies a word that the other uses, and no clause of the other may deny it."""
    surely = [-DENIED - pole for pole in one.poles if -DOUBTED < pole <= -DENIED]
    if not surely:
        return False
    plain = _digests(other.words)
    return any(
        word.to_bytes(MARK_BYTES, "big") in plain and -DOUBTED - word not in other.poles for word in surely
    )


def _names_anew(one: TextMarks, other: TextMarks) -> bool:
    """Whether one names something that the other does not speak of, with a capital letter or without."""
    return bool(one.names) and not _digests(one.names) <= _digests(other.words)


def _digests(joined: bytes) -> set[bytes]:
    return {joined[at : at + MARK_BYTES] for at in range(0, len(joined), MARK_BYTES)}

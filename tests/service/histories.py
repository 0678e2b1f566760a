"""Is a history of one session linearizable? Wing and Gong's search (1993) with memory of the states that were tried.

An operation takes effect at one moment between its call and its return. One whose reply never came (``returned``
infinite) may take effect at any later moment, or never.
"""

from __future__ import annotations

import math
from typing import NamedTuple

State = tuple[str, ...]


class Done(NamedTuple):
    """``kind``: "append" (if the state was ``expected``: ``took``), or "read" (of ``seen``)."""

    kind: str
    called: float
    returned: float
    value: str = ""
    expected: State = ()
    took: bool | None = None  # None: not known
    seen: State = ()


def applied(state: State, op: Done) -> State | None:
    """The state after it; None: it cannot have happened there."""
    if op.kind == "read":
        return state if op.seen == state else None
    fits = op.expected == state
    if op.took is not None and op.took != fits:
        return None
    return (*state, op.value) if fits else state


def linearizable(history: list[Done]) -> bool:
    """Whether one order explains all that was seen."""
    known = frozenset(n for n, op in enumerate(history) if op.returned < math.inf)
    tried: set[tuple[frozenset[int], State]] = set()
    ways: list[tuple[frozenset[int], State]] = [(frozenset(range(len(history))), ())]
    while ways:
        left, state = ways.pop()
        if not left & known:
            return True
        if (left, state) in tried:
            continue
        tried.add((left, state))
        soonest = min(history[n].returned for n in left)
        for n in left:
            if history[n].called <= soonest and (after := applied(state, history[n])) is not None:
                ways.append((left - {n}, after))
    return False

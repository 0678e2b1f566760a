"""How many prompt tokens a second a replica gets through when it has more than it can do: learnt from finished steps.

Only steps that left something waiting tell: one that took in all there was could have taken more. They are counted
whether they computed prompts or not, so full slots and decode rows slow the pace as they slow the queue. Until there
was such a step, those that computed any prompt must do. Recent steps weigh most: what is older than ``MEMORY_NS`` of
steps counts a third. Reads no clock: the driver says when a step was planned and when it was done.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.units import S_NS

MEMORY_NS = 5 * S_NS  # some tens of steps; a sale's ramp takes longer
MILLI = 1000  # tokens are kept in thousandths, so that fading never rounds them away


@dataclass(slots=True)
class _Fading:
    milli_tokens: int = 0
    ns: int = 0

    def add(self, tokens: int, ns: int) -> None:
        self.milli_tokens = self.milli_tokens * MEMORY_NS // (MEMORY_NS + ns) + tokens * MILLI
        self.ns = self.ns * MEMORY_NS // (MEMORY_NS + ns) + ns

    def tps(self) -> int:
        return self.milli_tokens * (S_NS // MILLI) // self.ns if self.ns else 0


class Pace:
    """Owned by a Replica."""

    def __init__(self) -> None:
        self._full, self._any = _Fading(), _Fading()

    def add(self, tokens: int, ns: int, full: bool) -> None:
        """A step was done: prompt tokens computed, its duration, and whether it left something waiting."""
        if full or 0 < self._full.tps() * ns < tokens * S_NS:  # to have been faster than known is proof too
            self._full.add(tokens, ns)
        if tokens:
            self._any.add(tokens, ns)

    def tps(self) -> int:
        """Prompt tokens a second; 0 = nothing is known yet."""
        return self._full.tps() or self._any.tps()

"""Circuit breaker round a replica: the place in the journey where it is asked, and the permit that must come back.

Always closed so far: it hands out permits and counts what became of them. The state table, windows and half-open
permits come on top of this face (README, "Not there yet").
"""

from __future__ import annotations

from typing import Literal

from engine.config import BreakerConfig
from engine.values import Struct

Verdict = Literal["ok", "fail", "ignored", "cancelled"]  # "ignored": refused before the model was asked to work


class BreakerStats(Struct):
    """Permits out, and calls that ended by verdict."""

    open_permits: int
    ok: int
    failed: int


class Breaker:
    """One per boundary."""

    def __init__(self, config: BreakerConfig) -> None:
        self._enabled = config.enabled
        self._out: dict[int, int] = {}  # permit -> when it was given
        self._next = self._ok = self._failed = 0

    def acquire(self, now_ns: int) -> int:
        """A permit, to be released exactly once."""
        permit = self._next
        self._next += 1
        self._out[permit] = now_ns
        return permit

    def release(self, permit: int, verdict: Verdict) -> None:
        """The call is over. Cancelled and ignored calls say nothing about the boundary's health."""
        del self._out[permit]
        self._ok += verdict == "ok"
        self._failed += verdict == "fail"

    def stats(self) -> BreakerStats:
        """A snapshot."""
        return BreakerStats(len(self._out), self._ok, self._failed)

    def check(self) -> None:
        """Invariants."""
        assert self._ok + self._failed + len(self._out) <= self._next, "permits: none is made up"

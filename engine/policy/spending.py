"""A budget of wrong answers: each that asks brings its share, each that is served takes its chance of being wrong.

Only the mean over all that ask is bounded, so the budget goes to those that take least: serve whoever's chance is below
one price. The price is the highest at which those of late would have taken what comes in, and what was left over is
used up slowly. Never is more given out than came in.
"""

from __future__ import annotations

from math import log

BUCKETS = 80
PER_LOG_ODDS = 5  # buckets
SUREST = -10.0  # log-odds of being wrong in the first bucket and below
EVERY = 50  # asked, between two prices
FADE = 0.975  # each time: some 2,000 asked are remembered
USED_UP_IN = 1000  # asked: what was left over


class Spending:
    """Of one standard: strict, or good enough under overload."""

    def __init__(self, share: float) -> None:
        self._share = share
        self._asked = 0
        self._spent = 0.0
        self._chances = [0.0] * BUCKETS  # sums, by how sure
        self._seen = 0.0
        self._price = -1

    def offer(self, chance: float) -> bool:
        """Somebody asks, who would get a wrong answer with this chance: may they be served?"""
        bucket = _bucket(chance)
        self._chances[bucket] += chance
        self.pass_by()
        return bucket <= self._price and self._spent + chance <= self._share * self._asked

    def pass_by(self) -> None:
        """Somebody asks, and there is nothing to be served."""
        self._asked += 1
        self._seen += 1
        if self._asked % EVERY == 0:
            self._reckon()

    def affordable(self, chance: float) -> bool:
        """Would it be served at the price of now? Nothing is noted."""
        return _bucket(chance) <= self._price

    def spend(self, chance: float) -> None:
        """They were served."""
        self._spent += chance

    def check(self) -> None:
        """Invariants."""
        assert 0 <= self._spent <= self._share * self._asked + 1e-9, "never more is spent than came in"
        assert -1 <= self._price < BUCKETS, "a price is a bucket"

    def _reckon(self) -> None:
        left = self._share * self._asked - self._spent
        allowed = (self._share + left / USED_UP_IN) * self._seen
        taken = 0.0
        self._price = -1
        for bucket, chances in enumerate(self._chances):
            taken += chances
            if taken > allowed:
                break
            self._price = bucket
        self._chances = [chances * FADE for chances in self._chances]
        self._seen *= FADE


def _bucket(chance: float) -> int:
    if chance <= 0:
        return 0
    if chance >= 1:
        return BUCKETS - 1
    return max(0, min(BUCKETS - 1, int((log(chance / (1 - chance)) - SUREST) * PER_LOG_ODDS)))

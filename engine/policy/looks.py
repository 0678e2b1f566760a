"""Looks by a coin at what could be served: how many wrong answers were served at most, whatever the rule believes.

What a rule could serve is computed all the same with a known chance, whoever asks. So the errors found that way say how
many there were (``confidence.upper_count``); nothing is assumed of the traffic or of the rule. Audits do not count
here: they are made when it is calm, which is no coin.
"""

from __future__ import annotations

from collections import Counter

from engine.policy.confidence import upper_count
from engine.policy.rules import DRAWS, Key, Lesson

DUE_MOST = 10_000  # more than are ever under way


class Looks:
    """Of one rule, since the start."""

    def __init__(self, share: float, confidence: float) -> None:
        self._share, self._confidence = share, confidence
        self._below = round(share * DRAWS)
        self._due: Counter[tuple[Key, int]] = Counter()
        self._served = self._explored = self._answered = self._wrong = 0

    @property
    def served(self) -> int:
        """Not looked at."""
        return self._served

    @property
    def explored(self) -> int:
        """Looked at."""
        return self._explored

    def looks(self, key: Key, cosine_millionths: int, draw: int) -> bool:
        """This could be served: shall it be computed instead?"""
        if draw >= self._below:
            self._served += 1
            return False
        self._explored += 1
        self._due[key, cosine_millionths] += 1
        while len(self._due) > DUE_MOST:
            del self._due[next(iter(self._due))]  # its answer will not come any more
        return True

    def learn(self, lesson: Lesson) -> bool:
        """Was it a look?"""
        at = (lesson.key, lesson.cosine_millionths)
        if lesson.audit or at not in self._due:
            return False
        self._due[at] -= 1
        if not self._due[at]:
            del self._due[at]
        self._answered += 1
        self._wrong += not lesson.right
        return True

    def bound_millionths(self, asked: int) -> int:
        """Wrong answers served, of all that asked; a look that was never answered counts as one that found an error."""
        if not asked:
            return 1_000_000
        found = self._wrong + self._explored - self._answered
        most = upper_count(found, self._share, self._served + self._explored, self._confidence)
        return round(1_000_000 * min(self._served, max(0, most - self._wrong)) / asked)

    def check(self) -> None:
        """Invariants."""
        assert 0 <= self._wrong <= self._answered <= self._explored, "no more found than looked at"
        assert len(self._due) <= DUE_MOST, "what is awaited is bounded"
        assert self._due.total() <= self._explored - self._answered, "only what is not answered is due"

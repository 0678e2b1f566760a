"""What a rule of the semantic cache is asked and what it says: may the answer to a similar question serve this one?

One small face for all of them, live and in the twin. A rule sees cosines, who has the same answer, and the marks that
two texts leave (numbers, negations, names); never a text, a vector or a clock. Chance comes as a number that is drawn
by the driver. ``SemanticCache`` knows ages, quarantine and what is still under way; a rule does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from engine.events import TextMarks
from engine.values import Struct

DRAWS = 1 << 31  # draws are uniform in [0, DRAWS)

Key = tuple[bytes, bytes]  # (hard key, text key)


class Candidate(Struct):
    """A question near the one asked that was answered, or is being answered."""

    key: Key
    cosine_millionths: int
    answer: str  # two candidates with the same answer say the same here; "" = not known, or not known yet
    marks: TextMarks
    servable: bool = True  # young enough and out of quarantine; others are evidence only


class Judgement(Struct):
    """What to do. Not served: it is computed, and with ``compare`` its answer is then held against that candidate's."""

    serve: int | None = None  # which of the candidates
    compare: int | None = None
    approximate: bool = False  # served by the relaxed standard only
    odds_millionths: int = 0  # the rule's own estimate that the served answer is right; 0 = it makes none


class Lesson(Struct):
    """What a comparison showed: an audit of a hit, or an exploration that the rule had asked for."""

    key: Key
    cosine_millionths: int
    right: bool
    audit: bool  # False: explored, nothing had been served
    approximate: bool = False


class RuleStats(Struct):
    """Since the start. ``bound_millionths``: with the configured confidence, no more of all that asked were served
    wrong than this; at any time, not only in the end. 1,000,000 = nothing is known."""

    asked: int
    served: int
    explored: int
    lessons: int
    wrong: int
    bound_millionths: int = 1_000_000
    threshold_millionths: int | None = None  # cosine, where the rule has one for all


class Rule(Protocol):
    """One of ``fixed.py``, ``calibrated.py``, ``adaptive.py``, ``conformal.py``."""

    def judge(self, marks: TextMarks, near: Sequence[Candidate], relaxed: bool, draw: int) -> Judgement:
        """``near``: nearest first, perhaps none. ``relaxed``: an approximation is better than nothing."""
        ...

    def learn(self, lesson: Lesson) -> None:
        """A comparison has come out."""
        ...

    def forget(self, key: Key) -> None:
        """The entry has left the cache; unknown keys are no-ops."""
        ...

    def stats(self) -> RuleStats:
        """A snapshot."""
        ...

    def check(self) -> None:
        """Invariants."""
        ...

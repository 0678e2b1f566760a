"""What the people before one stall ask: Zipf over answers, Zipf over the wordings of each, and now and then a trap.

A few things are asked all the time, most of them in the same words; the rest of the wordings is what a semantic cache
is for. A trap looks like a popular question and must not get its answer.
"""

from __future__ import annotations

import msgspec
import numpy as np

from engine.config import WorkloadConfig


class Question(msgspec.Struct, frozen=True, gc=False):
    """A row of the corpus. Equal ``answer_id``: the very same reply serves both."""

    traffic_class: str
    intent: str
    answer_id: str
    text: str
    trap: bool = False


class Stall:
    """The questions of one traffic class, with their popularity in one sale."""

    def __init__(self, questions: list[Question], work: WorkloadConfig, rng: np.random.Generator) -> None:
        self._traps = [q for q in questions if q.trap]
        self._trap_share = work.trap_share if self._traps else 0.0
        groups: dict[str, list[Question]] = {}
        for question in questions:
            if not question.trap:
                groups.setdefault(question.answer_id, []).append(question)
        order = rng.permutation(len(groups))
        named = list(groups.values())
        self._groups = [named[int(i)] for i in order]  # most popular first
        self._chances = _zipf(len(self._groups), work.zipf_exponent)
        most = max(map(len, self._groups))
        self._wordings = [_zipf(n, work.wording_exponent) for n in range(1, most + 1)]

    def pick(self, which: float, wording: float, trap: float) -> Question:
        """A question from three numbers in [0, 1)."""
        if trap < self._trap_share:
            return self._traps[int(which * len(self._traps))]
        group = self._groups[int(np.searchsorted(self._chances, which, side="right"))]
        return group[int(np.searchsorted(self._wordings[len(group) - 1], wording, side="right"))]


def _zipf(count: int, exponent: float) -> np.ndarray:
    """Cumulative chances of ranks 1 to ``count``."""
    chances = np.cumsum(1 / np.arange(1, count + 1) ** exponent)
    return chances / chances[-1]

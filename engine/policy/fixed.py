"""Rule ``fixed``: the nearest candidate whose cosine is high enough. What everybody ships."""

from __future__ import annotations

from collections.abc import Sequence

from engine.cache_config import SemanticConfig
from engine.events import TextMarks
from engine.policy.rules import Candidate, Judgement, Key, Lesson, RuleStats
from engine.policy.vetoes import vetoed


class FixedRule:
    """See ``Rule``. Learns nothing, but counts what the audits found."""

    def __init__(self, config: SemanticConfig) -> None:
        self._vetoes = config.vetoes
        self._strict = round(config.cosine * 1_000_000)
        self._relaxed = round(config.approximate_cosine * 1_000_000)
        self._asked = self._served = self._lessons = self._wrong = 0

    def judge(self, marks: TextMarks, near: Sequence[Candidate], relaxed: bool, draw: int) -> Judgement:
        """See ``Rule``."""
        self._asked += 1
        least = self._relaxed if relaxed else self._strict
        for index, candidate in enumerate(near):
            if candidate.cosine_millionths < least:
                break
            if candidate.servable and not vetoed(self._vetoes, marks, candidate.marks):
                self._served += 1
                return Judgement(serve=index, approximate=candidate.cosine_millionths < self._strict)
        return Judgement()

    def learn(self, lesson: Lesson) -> None:
        """See ``Rule``."""
        self._lessons += 1
        self._wrong += not lesson.right

    def forget(self, key: Key) -> None:
        """See ``Rule``: nothing is known of single entries."""

    def stats(self) -> RuleStats:
        """See ``Rule``."""
        return RuleStats(
            self._asked, self._served, 0, self._lessons, self._wrong, threshold_millionths=self._strict
        )

    def check(self) -> None:
        """Invariants."""
        assert self._served <= self._asked, "no more served than asked"
        assert self._wrong <= self._lessons, "no more wrong than looked at"

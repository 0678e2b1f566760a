"""Rule ``calibrated``: a logistic over what the neighbours' answers say, which a cosine alone does not.

Evidence for an answer is that the nearest entries with *another* answer are far, and that many near ones have this one.
Weights are fitted on labelled questions, thresholds chosen on others (``sim/quality/fit.py``); both come as config. An
option is an answer, not an entry: the two nearest answers are weighed, and the better one is served by its nearest
entry that may serve. ``evidence`` is the one definition of the features, for the rule and for the fit.

Votes are weighted by powers of the cosine, which near 1 is ``exp(12 (cosine - 1))`` by multiplication alone: the same
bits on every machine.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from engine.cache_config import SemanticConfig, Weights
from engine.events import TextMarks
from engine.policy.learning import logistic
from engine.policy.rules import Candidate, Judgement, Key, Lesson, RuleStats
from engine.policy.vetoes import MARK_BYTES, vetoed

OPTIONS = 2  # answers that are weighed
LEAST_COSINE = 0.05  # below it a neighbour is no nearer than chance

Evidence = tuple[float, ...]  # in the order of ``Weights``, without its bias


def options(near: Sequence[Candidate]) -> list[list[int]]:
    """Candidates by answer, of the ``OPTIONS`` nearest answers; one whose answer is not known stands alone."""
    groups: dict[str, list[int]] = {}
    for at, candidate in enumerate(near):
        groups.setdefault(candidate.answer or f"\0{at}", []).append(at)
    return list(groups.values())[:OPTIONS]


def evidence(asked: TextMarks, near: Sequence[Candidate], own: Sequence[int], served: int) -> Evidence:
    """Of one option: ``own`` are its candidates, ``served`` is that of them whose answer would be given."""
    cosines = [candidate.cosine_millionths / 1_000_000 for candidate in near]
    cosine, answer = cosines[served], near[served].answer
    same = [cosines[at] for at in own if at != served]
    others = [cosines[at] for at, other in enumerate(near) if answer and other.answer not in ("", answer)]
    near_all = near_own = nearer_all = nearer_own = 0.0
    for at, each in enumerate(cosines):
        square = max(each, LEAST_COSINE) * max(each, LEAST_COSINE)
        fourth = square * square
        twelfth = fourth * fourth * fourth
        near_all += twelfth
        nearer_all += twelfth * twelfth
        if at in own:
            near_own += twelfth
            nearer_own += twelfth * twelfth
    return (
        cosine,
        cosine - (others[0] if others else cosines[-1] - LEAST_COSINE),  # nobody farther was shown
        len(own) / len(near),
        near_own / near_all,
        nearer_own / nearer_all,
        same[0] if same else 0.0,
        0.0 if same else 1.0,
        same[1] if len(same) > 1 else 0.0,
        0.0 if len(same) > 1 else 1.0,
        overlap(asked, near[served].marks),
        cosines[-1],
    )


def overlap(one: TextMarks, other: TextMarks) -> float:
    """Of all the words that carry meaning, the share that both have; 0 where there are none."""
    ours, theirs = _words(one), _words(other)
    every = len(ours | theirs)
    return len(ours & theirs) / every if every else 0.0


def log_odds(weights: Evidence, bias: float, found: Evidence) -> float:
    """That the option is the right answer."""
    total = bias
    for weight, value in zip(weights, found, strict=True):
        total += weight * value
    return total


class CalibratedRule:
    """See ``Rule``. Learns nothing while it serves, but counts what the audits found."""

    def __init__(self, config: SemanticConfig) -> None:
        self._vetoes, self._config = config.vetoes, config.calibrated
        self._known, self._unknown = _split(config.calibrated.known), _split(config.calibrated.unknown)
        self._asked = self._served = self._lessons = self._wrong = 0

    def judge(self, marks: TextMarks, near: Sequence[Candidate], relaxed: bool, draw: int) -> Judgement:
        """See ``Rule``."""
        self._asked += 1
        best: tuple[float, int, float, float] | None = None  # above its threshold by, candidate, odds, strict threshold
        for own in options(near):
            may = self._may_serve(marks, near, own)
            if not may:
                continue
            known = near[own[0]].answer != ""
            bias, weights = self._known if known else self._unknown
            odds = log_odds(weights, bias, evidence(marks, near, own, may[0]))
            strict = self._config.least if known else self._config.least_unknown
            loose = self._config.approximate_least if known else self._config.approximate_least_unknown
            spare = odds - (min(strict, loose) if relaxed else strict)
            if spare >= 0 and (best is None or spare > best[0]):
                best = spare, may[0], odds, strict
        if best is None:
            return Judgement()
        self._served += 1
        _, at, odds, strict = best
        return Judgement(serve=at, approximate=odds < strict, odds_millionths=round(1_000_000 * logistic(odds)))

    def _may_serve(self, marks: TextMarks, near: Sequence[Candidate], own: Sequence[int]) -> list[int]:
        """Nearest first. What vetoes one wording vetoes the answer, or another wording of it would slip through;
        ``vetoed_most`` wordings may be vetoed without that, but never the nearest."""
        bad = [at for at in own if vetoed(self._vetoes, marks, near[at].marks)]
        if bad and (bad[0] == own[0] or len(bad) > self._config.vetoed_most):
            return []
        return [at for at in own if near[at].servable and at not in bad]

    def learn(self, lesson: Lesson) -> None:
        """See ``Rule``."""
        self._lessons += 1
        self._wrong += not lesson.right

    def forget(self, key: Key) -> None:
        """See ``Rule``: nothing is known of single entries."""

    def stats(self) -> RuleStats:
        """See ``Rule``. The bound of the fit is not one of this traffic: the audits of ``SemanticCache`` are."""
        return RuleStats(self._asked, self._served, 0, self._lessons, self._wrong)

    def check(self) -> None:
        """Invariants."""
        assert self._served <= self._asked, "no more served than asked"
        assert self._wrong <= self._lessons, "no more wrong than looked at"


def _split(weights: Weights) -> tuple[float, Evidence]:
    bias, *others = msgspec.structs.astuple(weights)
    return bias, tuple(others)


def _words(marks: TextMarks) -> set[bytes]:
    return {marks.words[at : at + MARK_BYTES] for at in range(0, len(marks.words), MARK_BYTES)}

"""Rule ``calibrated``: a logistic over what the neighbours' answers say, which a cosine alone does not.

Evidence for an answer is that the nearest entries with *another* answer are far, and that many near ones have this one.
Weights are fitted on labelled questions, thresholds chosen on others (``sim/quality/fit.py``); both come as config. An
option is an answer, not an entry: the two nearest answers are weighed, and the better one is served by its nearest
entry that may serve. ``weighed`` says what is an option and ``evidence`` what speaks for it, for the rule and the fit.

Votes are weighted by powers of the cosine, which near 1 is ``exp(12 (cosine - 1))`` by multiplication alone: the same
bits on every machine.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from engine.cache_config import SemanticConfig, Veto, Weights
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


def weighed(vetoes: Sequence[Veto], asked: TextMarks, near: Sequence[Candidate]) -> list[tuple[list[int], int]]:
    """Options that no veto forbids, each with that of its candidates whose answer would be given.

    What vetoes an answer's nearest wording vetoes the answer, or a farther wording of it would slip through. A farther
    one that is vetoed only does not serve: two wordings that differ in everything may differ in a "not" as well. An
    entry whose answer is not known may have the answer of any nearer entry that was vetoed.
    """
    found = []
    doubt = False
    for own in options(near):
        if vetoed(vetoes, asked, near[own[0]].marks):
            doubt = True
        elif near[own[0]].answer or not doubt:
            may = [at for at in own if near[at].servable and not vetoed(vetoes, asked, near[at].marks)]
            if may:
                found.append((own, may[0]))
    return found


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
        for own, at in weighed(self._vetoes, marks, near):
            known = near[at].answer != ""
            bias, weights = self._known if known else self._unknown
            odds = log_odds(weights, bias, evidence(marks, near, own, at))
            strict = self._config.least if known else self._config.least_unknown
            loose = self._config.approximate_least if known else self._config.approximate_least_unknown
            spare = odds - (min(strict, loose) if relaxed else strict)
            if spare >= 0 and (best is None or spare > best[0]):
                best = spare, at, odds, strict
        if best is None:
            return Judgement()
        self._served += 1
        _, at, odds, strict = best
        return Judgement(serve=at, approximate=odds < strict, odds_millionths=round(1_000_000 * logistic(odds)))

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

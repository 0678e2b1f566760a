"""Rule ``adaptive``: learns while it serves which answers are right, and serves as many as a budget of errors allows.

In the manner of vCache (Schroeder et al. 2025: explore, else serve, so that at most ``wrong_share`` of all that ask get
a wrong answer), with three deviations. One logistic over all entries instead of one for each: an entry is asked too
seldom to learn from alone. It weighs what the neighbours' answers say, not the cosine only, under a proper prior. And
the mean over all that ask is bounded, not each look-up: who is surest is served until the budget is used up. A miss is
computed anyway, so its answer is a lesson that costs nothing; ``explore_least`` of what could be served is computed all
the same, by a coin. If more of those looks are wrong than believed, all chances are taken to be so much higher. Still
the budget is one of *estimates*; the bound that is reported rests on the coin alone (``looks.py``).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from math import log

from engine.cache_config import SemanticConfig
from engine.events import TextMarks
from engine.policy.learning import OnlineLogistic, Vector, logistic, moderated
from engine.policy.looks import Looks
from engine.policy.rules import Candidate, Judgement, Key, Lesson, RuleStats
from engine.policy.spending import Spending
from engine.policy.vetoes import vetoed
from engine.values import Struct

FIRST = (-1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)  # weights
DEVIATION = 3.0
CLEARLY_WRONG = 0.1  # chance from which on lessons weigh less: most misses are far from what could be served
SERVED_WEIGHT = 5.0  # of a lesson on what could be served: those are few, and what matters
ONE_MORE = 1.0  # error, believed and found
NO_SECOND_COSINE = 0.6


class Pending(Struct):
    """A lesson that may come: what was known then."""

    features: Vector
    chance: float  # of being wrong
    could_serve: bool


class Option(Struct):
    """An answer that may be served, by its nearest candidate, and the chance that it is wrong."""

    at: int
    features: Vector
    chance: float


class AdaptiveRule:
    """See ``Rule``."""

    def __init__(self, config: SemanticConfig) -> None:
        self._vetoes, self._config = config.vetoes, config.adaptive
        self._looks = Looks(self._config.explore_least, self._config.confidence)
        self._model = OnlineLogistic(FIRST, DEVIATION)
        self._strict = Spending(self._config.wrong_share)
        self._relaxed = Spending(self._config.approximate_wrong_share)
        self._pending: OrderedDict[tuple[Key, int, bool], Pending] = OrderedDict()
        self._expected = self._found = 0.0  # errors at looks: as believed, and as found
        self._asked = self._lessons = self._wrong = 0

    def judge(self, marks: TextMarks, near: Sequence[Candidate], relaxed: bool, draw: int) -> Judgement:
        """See ``Rule``."""
        self._asked += 1
        purse = self._relaxed if relaxed else self._strict
        best = self._best(marks, near)
        if best is None:
            purse.pass_by()
            return Judgement()
        chosen = near[best.at]
        chance = min(1.0, best.chance * self._worse())
        could_serve = purse.offer(chance)
        serve = could_serve and not self._looks.looks(chosen.key, chosen.cosine_millionths, draw)
        self._await((chosen.key, chosen.cosine_millionths, serve), Pending(best.features, best.chance, could_serve))
        if not serve:
            return Judgement(compare=best.at)
        purse.spend(chance)
        right = round(1_000_000 * (1 - chance))
        return Judgement(best.at, None, relaxed and not self._strict.affordable(chance), right)

    def _worse(self) -> float:
        """So many times as often as believed were the looks wrong; a factor, never below 1."""
        return max(1.0, (self._found + ONE_MORE) / (self._expected + ONE_MORE))

    def _best(self, marks: TextMarks, near: Sequence[Candidate]) -> Option | None:
        """Of each answer that may be served, the nearest candidate; of those, the one that is least likely wrong."""
        best: Option | None = None
        seen: set[str] = set()
        for at, candidate in enumerate(near):
            if not candidate.servable or candidate.answer in seen or vetoed(self._vetoes, marks, candidate.marks):
                continue
            if candidate.answer:
                seen.add(candidate.answer)
            found = features(near, at)
            chance = logistic(-moderated(*self._model.predict(found)))
            if best is None or chance < best.chance:
                best = Option(at, found, chance)
        return best

    def _await(self, key: tuple[Key, int, bool], pending: Pending) -> None:
        self._pending[key] = pending
        self._pending.move_to_end(key)
        while len(self._pending) > self._config.pending_most:
            self._pending.popitem(last=False)

    def learn(self, lesson: Lesson) -> None:
        """See ``Rule``. What has left the bounded memory meanwhile teaches nothing."""
        self._lessons += 1
        self._wrong += not lesson.right
        looked = self._looks.learn(lesson)
        pending = self._pending.pop((lesson.key, lesson.cosine_millionths, lesson.audit), None)
        if pending is None:
            return
        if looked:
            self._expected += pending.chance
            self._found += not lesson.right
        weight = SERVED_WEIGHT if pending.could_serve else CLEARLY_WRONG / max(CLEARLY_WRONG, pending.chance)
        self._model.learn(pending.features, lesson.right, weight)

    def forget(self, key: Key) -> None:
        """See ``Rule``: nothing is known of single entries, and answers under way may still teach something."""

    def stats(self) -> RuleStats:
        """See ``Rule``."""
        looks = self._looks
        return RuleStats(
            self._asked, looks.served, looks.explored, self._lessons, self._wrong, looks.bound_millionths(self._asked)
        )

    def check(self) -> None:
        """Invariants."""
        assert self._looks.served + self._looks.explored <= self._asked, "no more served than asked"
        assert len(self._pending) <= self._config.pending_most, "what is awaited is bounded"
        self._model.check()
        self._looks.check()
        self._strict.check()
        self._relaxed.check()


def features(near: Sequence[Candidate], at: int) -> Vector:
    """What speaks for the candidate ``at``: 1; its cosine; its lead on another answer; the share of votes, each by
    ``cosine ** 12``; the next cosine of the same answer; the share of the votes; how nearly it is the same question."""
    cosines = [each.cosine_millionths / 1_000_000 for each in near]
    cosine, answer = cosines[at], near[at].answer
    own = [other == at or (bool(answer) and near[other].answer == answer) for other in range(len(near))]
    another, second, votes, own_votes = cosines[-1], NO_SECOND_COSINE, 0.0, 0.0
    contested = False
    for other, each in enumerate(cosines):
        fourth = max(each, 0.05) ** 4
        vote = fourth * fourth * fourth
        votes += vote
        if own[other]:
            own_votes += vote
            if other != at:
                second = max(second, each)
        elif not contested:
            contested, another = True, each
    return (
        1.0,
        (cosine - 0.85) * 10,
        (cosine - another) * 10,
        own_votes / votes * 2 - 1,
        (second - 0.85) * 10,
        sum(own) / len(own) * 2 - 1,
        -log(1.005 - cosine) - 2,
    )

"""Rule ``adaptive``: what it may serve, what it pays for it, and that it learns what a cosine does not say.

Run: python -m pytest tests/policy/test_adaptive.py -q
Mutations it caught: a vetoed or an unservable candidate served; no looks; the budget not charged; the worst answer
instead of the best; one budget for both standards; looks that change nothing; a lost look forgotten.
"""

from __future__ import annotations

import random
from math import log

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from engine.cache_config import AdaptiveConfig, SemanticConfig
from engine.events import TextMarks
from engine.policy.adaptive import AdaptiveRule, features
from engine.policy.learning import logistic
from engine.policy.rules import DRAWS, Candidate, Judgement, Lesson
from engine.policy.vetoes import vetoed

NONE, FIVE = TextMarks(), TextMarks(numbers=b"5555")
MARKS = st.sampled_from([NONE, FIVE])
CANDIDATES = st.lists(
    st.tuples(st.integers(-200_000, 1_000_000), st.sampled_from(["", "a", "b"]), MARKS, st.booleans()), max_size=8
)


def near_of(rows) -> list[Candidate]:
    ranked = sorted(rows, key=lambda row: -row[0])
    return [
        Candidate((b"", bytes([at])), cosine, answer, marks, servable)
        for at, (cosine, answer, marks, servable) in enumerate(ranked)
    ]


class Asking(RuleBasedStateMachine):
    """Any candidates, any outcomes, lessons in any order, some never."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SemanticConfig(
            vetoes=("numbers",), adaptive=AdaptiveConfig(wrong_share=0.3, pending_most=5, explore_least=0.25)
        )
        self.rule = AdaptiveRule(self.config)
        self.asked = self.served = self.learned = 0
        self.due: list[tuple[Candidate, bool]] = []

    @rule(marks=MARKS, rows=CANDIDATES, relaxed=st.booleans(), draw=st.integers(0, DRAWS - 1))
    def ask(self, marks, rows, relaxed, draw):
        near = near_of(rows)
        said = self.rule.judge(marks, near, relaxed, draw)
        self.asked += 1
        may = [c for c in near if c.servable and not vetoed(("numbers",), marks, c.marks)]
        if not may:
            assert said == Judgement()
            return
        assert (said.serve is None) != (said.compare is None), "what is not served is a lesson"
        at = said.serve if said.serve is not None else said.compare
        assert near[at] in may
        assert not near[at].answer or near[at] == next(c for c in may if c.answer == near[at].answer)
        self.due.append((near[at], said.serve is not None))
        if said.serve is not None:
            assert draw >= DRAWS // 4, "the coin decides alone"
            assert relaxed or not said.approximate
            self.served += 1

    @rule(right=st.booleans(), which=st.integers(0, 100))
    def learn(self, right, which):
        if self.due:
            candidate, audit = self.due.pop(which % len(self.due))
            self.rule.learn(Lesson(candidate.key, candidate.cosine_millionths, right, audit))
            self.learned += 1

    @invariant()
    def holds(self):
        self.rule.check()
        found = self.rule.stats()
        assert (found.asked, found.served, found.lessons) == (self.asked, self.served, self.learned)
        assert self.asked == 0 or found.bound_millionths * self.asked <= 1e6 * self.served + self.asked


TestAsking = Asking.TestCase
TestAsking.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)


@given(CANDIDATES.filter(bool), st.data())
def test_features_are_what_the_formula_says(rows, data):
    near = near_of(rows)
    at = data.draw(st.integers(0, len(near) - 1))
    cosines = [each.cosine_millionths / 1e6 for each in near]
    own = [i for i, each in enumerate(near) if i == at or (near[at].answer and each.answer == near[at].answer)]
    others = [cosines[i] for i in range(len(near)) if i not in own]
    votes = [max(c, 0.05) ** 12 for c in cosines]
    second = max([0.6, *(cosines[i] for i in own if i != at)])
    assert features(near, at)[:-1] == pytest.approx(
        [
            1,
            10 * (cosines[at] - 0.85),
            10 * (cosines[at] - (max(others) if others else cosines[-1])),
            2 * sum(votes[i] for i in own) / sum(votes) - 1,
            10 * (second - 0.85),
            2 * len(own) / len(near) - 1,
        ]
    )
    assert features(near, at)[-1] == pytest.approx(-log(1.005 - cosines[at]) - 2)


def ask(rule: AdaptiveRule, truth: random.Random, steep: float, relaxed: bool = False) -> tuple[bool, bool]:
    """One question, whose nearest answer is right the more surely the farther another one is: served, and wrong."""
    cosine, lead = truth.uniform(0.7, 1.0), truth.uniform(0.0, 0.3)
    near = near_of([(round(1e6 * c), a, NONE, True) for c, a in ((cosine, "a"), (cosine - lead, "b"))])
    right = truth.random() < logistic(steep * (lead - 0.1))
    said = rule.judge(NONE, near, relaxed, truth.randrange(DRAWS))
    if said.serve == 0:
        return True, not right
    if said.serve == 1:
        return True, right
    looked = near[said.compare]
    rule.learn(Lesson(looked.key, looked.cosine_millionths, right == (said.compare == 0), False))
    return False, False


def test_keeps_its_share_of_wrong_answers_in_nearly_all_runs_and_its_bound_in_all_but_few():
    kept = bounded = served = 0
    for seed in range(20):
        rule, truth = AdaptiveRule(SemanticConfig(adaptive=AdaptiveConfig(wrong_share=0.02))), random.Random(seed)
        outcomes = [ask(rule, truth, steep=60) for _ in range(1500)]
        wrong = sum(wrong for _, wrong in outcomes) / len(outcomes)
        served += sum(hit for hit, _ in outcomes)
        kept += wrong <= 0.02
        bounded += wrong * 1e6 <= rule.stats().bound_millionths
    assert served > 0.4 * 20 * 1500, "it learns to serve"
    assert kept >= 17
    assert bounded >= 19


def test_spends_no_more_by_its_own_estimates_than_came_in():
    rule, truth = AdaptiveRule(SemanticConfig(adaptive=AdaptiveConfig(wrong_share=0.05))), random.Random(1)
    for _ in range(1500):
        ask(rule, truth, steep=30)
    spent = 0.0
    near = [
        near_of([(round(1e6 * (0.7 + 0.3 * at / 99)), "a", NONE, True), (690_000, "b", NONE, True)])
        for at in range(100)
    ]
    for at in range(20_000):
        said = rule.judge(NONE, near[truth.randrange(100)], False, DRAWS - 1)
        spent += said.serve is not None and 1 - said.odds_millionths / 1e6
        assert spent <= 0.05 * (1500 + at + 1) + 1e-6 * at
    assert spent > 0.02 * 20_000, "and most of it"


def test_relaxed_has_a_budget_of_its_own():
    rule, truth = AdaptiveRule(SemanticConfig()), random.Random(1)
    strict, relaxed = (
        sum(ask(rule, truth, steep=30, relaxed=each)[0] for _ in range(1500)) for each in (False, True)
    )
    assert relaxed > 1.2 * strict > 0


def test_stops_serving_soon_when_nothing_is_right_any_more():
    rule, truth = AdaptiveRule(SemanticConfig()), random.Random(1)
    for _ in range(1500):
        ask(rule, truth, steep=60)
    served = [0, 0]
    for at in range(1000):
        near = near_of([(950_000, "a", NONE, True), (700_000, "b", NONE, True)])
        said = rule.judge(NONE, near, False, truth.randrange(DRAWS))
        if said.serve is None:
            rule.learn(Lesson(near[said.compare].key, near[said.compare].cosine_millionths, False, False))
        else:
            served[at >= 500] += 1
    assert served[0] > 0, "it was sure"
    assert served[1] == 0


def test_a_lost_exploration_counts_as_an_error_found():
    rule, truth = AdaptiveRule(SemanticConfig(adaptive=AdaptiveConfig(explore_least=0.2))), random.Random(1)
    for _ in range(1500):
        ask(rule, truth, steep=200)
    before = rule.stats()
    near = near_of([(999_999, "a", NONE, True), (600_000, "b", NONE, True)])
    for _ in range(5):
        assert rule.judge(NONE, near, False, 0).compare == 0
    after = rule.stats()
    assert after.explored == before.explored + 5
    assert after.bound_millionths > before.bound_millionths + 10_000


def test_looks_that_are_worse_than_believed_make_it_careful():
    near = near_of([(990_000, "a", NONE, True), (600_000, "b", NONE, True)])
    config = SemanticConfig(adaptive=AdaptiveConfig(wrong_share=0.2))
    odds = []
    for audit in (False, True):  # the same lesson; only the first is a look, that nobody could choose
        rule, truth = AdaptiveRule(config), random.Random(1)
        for _ in range(3000):
            ask(rule, truth, steep=200)
        said = rule.judge(NONE, near, False, DRAWS - 1 if audit else 0)
        assert (said.serve if audit else said.compare) == 0
        rule.learn(Lesson(near[0].key, 990_000, False, audit))
        odds.append(rule.judge(NONE, near, False, DRAWS - 1).odds_millionths)
    assert 0 < odds[0] < odds[1]

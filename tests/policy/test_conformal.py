"""Rule ``conformal``: one cosine, the nearest candidate that may serve, and few enough wrong answers.

Run: python -m pytest tests/policy/test_conformal.py -q
Mutations it caught: an unservable candidate served; no looks; errors that tighten nothing; moves of any size; a band
that borrows nothing; one cosine for both standards; approximate hits not marked.
"""

from __future__ import annotations

import random

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from engine.cache_config import ConformalConfig, SemanticConfig
from engine.events import TextMarks
from engine.policy.conformal import EVERY, ConformalRule
from engine.policy.rules import DRAWS, Candidate, Judgement, Lesson
from engine.policy.vetoes import vetoed

NONE, FIVE = TextMarks(), TextMarks(numbers=b"5555")
MARKS = st.sampled_from([NONE, FIVE])
CANDIDATES = st.lists(
    st.tuples(st.integers(-200_000, 1_000_000), st.sampled_from(["", "a", "b"]), MARKS, st.booleans()), max_size=4
)


class Asking(RuleBasedStateMachine):
    """Any candidates, any outcomes, lessons in any order, some never."""

    def __init__(self) -> None:
        super().__init__()
        conformal = ConformalConfig(start=0.6, step=0.05, explore_least=0.25)
        self.rule = ConformalRule(SemanticConfig(vetoes=("numbers",), conformal=conformal))
        self.asked = self.served = self.learned = 0
        self.due: list[tuple[Candidate, bool]] = []

    @rule(marks=MARKS, rows=CANDIDATES, relaxed=st.booleans(), draw=st.integers(0, DRAWS - 1))
    def ask(self, marks, rows, relaxed, draw):
        ranked = sorted(rows, key=lambda row: -row[0])
        near = [Candidate((b"", bytes([at])), *row) for at, row in enumerate(ranked)]
        said = self.rule.judge(marks, near, relaxed, draw)
        self.asked += 1
        may = [at for at, c in enumerate(near) if c.servable and not vetoed(("numbers",), marks, c.marks)]
        if not may:
            assert said == Judgement()
            return
        cosine, threshold = near[may[0]].cosine_millionths, self.rule.stats().threshold_millionths
        assert (said.serve, said.compare) in ((may[0], None), (None, may[0])), "the nearest that may"
        self.due.append((near[may[0]], said.serve is not None))
        if said.serve is None:
            assert cosine < threshold or draw < DRAWS // 4, "a strict hit is computed by the coin alone"
        else:
            assert draw >= DRAWS // 4
            assert said.approximate == (cosine < threshold)
            assert relaxed or not said.approximate
            self.served += 1

    @rule(right=st.booleans(), which=st.integers(0, 100))
    def learn(self, right, which):
        if self.due:
            candidate, audit = self.due.pop(which % len(self.due))
            before = self.rule.stats().threshold_millionths
            self.rule.learn(Lesson(candidate.key, candidate.cosine_millionths, right, audit))
            after = self.rule.stats().threshold_millionths
            raised = audit and not right and candidate.cosine_millionths >= before
            assert after == min(1_000_000, before + 50_000) if raised else after in (before, before + 50_000, 1_000_000)
            self.learned += 1

    @invariant()
    def holds(self):
        self.rule.check()
        found = self.rule.stats()
        assert (found.asked, found.served, found.lessons) == (self.asked, self.served, self.learned)


TestAsking = Asking.TestCase
TestAsking.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)


def ask(rule: ConformalRule, truth: random.Random, steep: float, audits: float = 0.0, relaxed: bool = False) -> tuple:
    """One question whose nearest answer is wrong with chance ``(1 - cosine) ** steep``: served, and wrong."""
    cosine = truth.uniform(0.5, 1.0)
    right = truth.random() >= (1 - cosine) ** steep
    near = [Candidate((b"", b"a"), round(1e6 * cosine), "a", NONE)]
    said = rule.judge(NONE, near, relaxed, truth.randrange(DRAWS))
    served = said.serve is not None
    if not served or truth.random() < audits:
        rule.learn(Lesson(near[0].key, near[0].cosine_millionths, right, served, said.approximate))
    return served, served and not right


def test_keeps_its_share_of_wrong_answers_in_nearly_all_runs_and_its_bound_in_all_but_few():
    kept = bounded = 0
    for seed in range(20):
        rule, truth = ConformalRule(SemanticConfig(conformal=ConformalConfig(wrong_share=0.02))), random.Random(seed)
        outcomes = [ask(rule, truth, steep=1.5) for _ in range(5000)]
        wrong = sum(wrong for _, wrong in outcomes) / len(outcomes)
        assert sum(served for served, _ in outcomes) > 0.1 * len(outcomes), "it learns to serve"
        kept += wrong <= 0.02
        bounded += wrong * 1e6 <= rule.stats().bound_millionths
    assert kept >= 17
    assert bounded >= 19


def test_starts_strict_and_moves_by_no_more_than_a_step():
    rule, truth = ConformalRule(SemanticConfig()), random.Random(1)
    before = rule.stats().threshold_millionths
    assert before == 970_000
    for _ in range(40):
        for _ in range(EVERY):
            ask(rule, truth, steep=3.0)
        after = rule.stats().threshold_millionths
        assert before - 2000 <= after
        before = after
    assert before < 940_000, "where next to nothing is wrong it loosens"


def test_audited_errors_make_it_stricter():
    plain, audited = (ConformalRule(SemanticConfig()) for _ in range(2))
    for each in (plain, audited):
        truth = random.Random(1)
        for _ in range(3000):
            ask(each, truth, steep=3.0)
    loose = audited.stats().threshold_millionths
    assert plain.stats().threshold_millionths == loose < 950_000
    for at in range(5):
        audited.learn(Lesson((b"", b"a"), 990_000, right=False, audit=True))
        assert audited.stats().threshold_millionths == loose + 2000 * (at + 1)
    plain.learn(Lesson((b"", b"a"), loose - 1, right=False, audit=False))
    assert plain.stats().threshold_millionths == loose, "what would not have been served costs nothing at once"


def test_relaxed_is_looser():
    rule, truth = ConformalRule(SemanticConfig()), random.Random(1)
    for _ in range(5000):
        ask(rule, truth, steep=1.5)
    strict, relaxed = (
        sum(ask(rule, truth, steep=1.5, relaxed=each)[0] for _ in range(1000)) for each in (False, True)
    )
    assert relaxed > 1.3 * strict > 0
    threshold = rule.stats().threshold_millionths
    for cosine in (threshold, threshold - 1):
        said = rule.judge(NONE, [Candidate((b"", b"a"), cosine, "a", NONE)], True, DRAWS - 1)
        assert said == Judgement(serve=0, approximate=cosine < threshold)

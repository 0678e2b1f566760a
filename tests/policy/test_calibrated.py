"""Rule ``calibrated``: its promises on any candidates, against a naive reading of the formula.

Run: python -m pytest tests/policy/test_calibrated.py -q
Mutations it caught: an entry served that may not; a vetoed wording passed over for another of the same answer; the
margin taken to the nearest entry of any answer.
"""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.cache_config import CalibratedConfig, SemanticConfig, Weights
from engine.events import TextMarks
from engine.policy.calibrated import CalibratedRule, evidence, log_odds, options
from engine.policy.learning import logistic
from engine.policy.rules import Candidate
from engine.policy.vetoes import vetoed

WORDS = st.lists(st.sampled_from([b"aaaa", b"bbbb", b"cccc"]), unique=True).map(lambda words: b"".join(sorted(words)))
MARKS = st.builds(TextMarks, words=WORDS, numbers=st.sampled_from([b"", b"1111"]))
CANDIDATES = st.lists(
    st.tuples(st.integers(-200_000, 1_000_000), st.sampled_from(["", "a", "b", "c"]), MARKS, st.booleans()), max_size=8
)
VETOES = st.sampled_from([(), ("numbers",)])


def near_of(rows) -> list[Candidate]:
    ranked = sorted(rows, key=lambda row: -row[0])
    return [
        Candidate((b"", bytes([at])), cosine, answer, marks, servable)
        for at, (cosine, answer, marks, servable) in enumerate(ranked)
    ]


@given(MARKS, CANDIDATES, VETOES, st.booleans())
def test_serves_only_what_may_serve_and_is_sure_enough(marks, rows, vetoes, relaxed):
    config = SemanticConfig(vetoes=vetoes)
    rule, near = CalibratedRule(config), near_of(rows)
    said = rule.judge(marks, near, relaxed, draw=0)
    rule.check()
    assert said.compare is None
    if said.serve is None:
        assert said == type(said)()
        return
    chosen = near[said.serve]
    own = next(group for group in options(near) if said.serve in group)
    assert chosen.servable
    assert not any(vetoed(vetoes, marks, near[at].marks) for at in own), "no wording of the answer is vetoed"
    assert not any(near[at].servable for at in own if at < said.serve), "the nearest of the answer that may"
    weights = config.calibrated.known if chosen.answer else config.calibrated.unknown
    bias, *others = msgspec.structs.astuple(weights)
    odds = log_odds(tuple(others), bias, evidence(marks, near, own, said.serve))
    strict = config.calibrated.least if chosen.answer else config.calibrated.least_unknown
    assert said.approximate == (odds < strict)
    assert relaxed or not said.approximate
    assert said.odds_millionths == round(1e6 * logistic(odds))


@given(MARKS, CANDIDATES)
def test_relaxed_serves_whatever_strict_serves(marks, rows):
    rule, near = CalibratedRule(SemanticConfig()), near_of(rows)
    if rule.judge(marks, near, False, 0).serve is not None:
        assert rule.judge(marks, near, True, 0).serve is not None


@given(MARKS, CANDIDATES.filter(bool))
def test_evidence_is_what_the_formula_says(marks, rows):
    near = near_of(rows)
    cosines = [each.cosine_millionths / 1e6 for each in near]
    for own in options(near):
        at = own[0]
        answer = near[at].answer
        group = [i for i, each in enumerate(near) if (each.answer == answer if answer else i == at)]
        assert own == group
        other = [c for c, each in zip(cosines, near, strict=True) if answer and each.answer and each.answer != answer]
        same = [cosines[i] for i in group[1:]]
        weighed = [[max(c, 0.05) ** power for c in cosines] for power in (12, 24)]
        ours, theirs = ({m.words[i : i + 4] for i in range(0, len(m.words), 4)} for m in (marks, near[at].marks))
        expected = [
            cosines[at],
            cosines[at] - max(other) if other else cosines[at] - min(cosines) + 0.05,
            len(group) / len(near),
            *(sum(w[i] for i in group) / sum(w) for w in weighed),
            same[0] if same else 0,
            float(not same),
            same[1] if same[1:] else 0,
            float(not same[1:]),
            len(ours & theirs) / len(ours | theirs) if ours | theirs else 0,
            min(cosines),
        ]
        assert evidence(marks, near, own, at) == pytest.approx(expected)


def test_weights_are_in_the_order_of_the_evidence():
    names = [field.name for field in msgspec.structs.fields(Weights)]
    near = near_of([(900_000, "a", TextMarks(words=b"aaaa"), True), (700_000, "b", TextMarks(), True)])
    found = dict(zip(names[1:], evidence(TextMarks(words=b"aaaa"), near, [0], 0), strict=True))
    assert found["cosine"] == 0.9
    assert found["margin"] == pytest.approx(0.2)
    assert (found["no_second"], found["no_third"], found["overlap"], found["last"]) == (1, 1, 1, 0.7)


def test_other_answers_nearby_are_evidence_against():
    rule = CalibratedRule(SemanticConfig())
    mine = [(950_000 - 10_000 * at, "a", TextMarks(), True) for at in range(4)]
    alone = near_of([*mine, *((500_000, "b", TextMarks(), True) for _ in range(4))])
    contested = near_of([*mine, *((945_000, "b", TextMarks(), True) for _ in range(4))])
    assert rule.judge(TextMarks(), alone, False, 0).serve == 0
    assert rule.judge(TextMarks(), contested, False, 0).serve is None


def test_a_vetoed_wording_vetoes_its_answer_unless_some_are_allowed():
    five, none = TextMarks(numbers=b"5555"), TextMarks()
    near = near_of([*((950_000 - 1000 * at, "a", none, True) for at in range(5)), (940_000, "a", five, True)])
    strict = SemanticConfig(vetoes=("numbers",))
    assert CalibratedRule(strict).judge(none, near, False, 0).serve is None
    mild = msgspec.structs.replace(strict, calibrated=CalibratedConfig(vetoed_most=1, least=-99.0))
    assert CalibratedRule(mild).judge(none, near, False, 0).serve == 0
    assert CalibratedRule(mild).judge(five, near, False, 0).serve is None, "its nearest wording is vetoed"


def test_nobody_near_is_a_miss():
    rule = CalibratedRule(SemanticConfig())
    assert rule.judge(TextMarks(), [], True, 0).serve is None
    assert (rule.stats().asked, rule.stats().served) == (1, 0)

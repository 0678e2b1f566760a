"""Rule ``calibrated``: its promises on any candidates, against a naive reading of the formula.

Run: python -m pytest tests/policy/test_calibrated.py -q
Mutations it caught: an entry served that may not; a vetoed wording passed over for another of the same answer; the
margin taken to the nearest entry of any answer; the relaxed threshold for all; the weights of known answers for all;
an entry without a known answer served past a nearer one that was vetoed.
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
    bad = [vetoed(vetoes, marks, each.marks) for each in near]
    assert not bad[own[0]], "what vetoes an answer's nearest wording vetoes the answer"
    assert not bad[said.serve]
    assert chosen.answer or not any(bad[: said.serve]), "its answer may be that of a nearer one that was vetoed"
    assert not any(near[at].servable and not bad[at] for at in own if at < said.serve), "the nearest that may"
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
    mine = [(950_000 - 5_000 * at, "a", TextMarks(), True) for at in range(8)]
    alone = near_of(mine)
    contested = near_of([*mine[:4], *((945_000, "b", TextMarks(), True) for _ in range(4))])
    assert rule.judge(TextMarks(), alone, False, 0).serve == 0
    assert rule.judge(TextMarks(), contested, False, 0).serve is None


FIVE, NONE = TextMarks(numbers=b"5555"), TextMarks()
SERVES_ALL = SemanticConfig(vetoes=("numbers",), calibrated=CalibratedConfig(least=-99.0, least_unknown=-99.0))


def test_the_nearest_wording_that_is_vetoed_vetoes_its_answer_and_a_farther_one_only_itself():
    near = near_of([(950_000, "a", NONE, False), (945_000, "a", FIVE, True), (940_000, "a", NONE, True)])
    rule = CalibratedRule(SERVES_ALL)
    assert rule.judge(FIVE, near, False, 0).serve is None
    assert rule.judge(NONE, near, False, 0).serve == 2


def test_an_unknown_answer_may_be_that_of_a_nearer_vetoed_entry():
    rule = CalibratedRule(SERVES_ALL)
    rows = [(950_000, "", NONE, True), (940_000, "", FIVE, True)]
    assert rule.judge(FIVE, near_of(rows), False, 0).serve is None
    assert rule.judge(NONE, near_of(rows), False, 0).serve == 0
    known = [(950_000, "a", NONE, True), (940_000, "b", FIVE, True)]
    assert rule.judge(FIVE, near_of(known), False, 0).serve == 1, "another answer is another answer"


@pytest.mark.parametrize(("answer", "slope", "strict", "loose"), [("a", 10, 8, 6), ("", 20, 18, 12)])
def test_each_sort_of_answer_has_its_own_weights_and_thresholds(answer, slope, strict, loose):
    """Log-odds are ``slope`` times the cosine: below, between and above the two thresholds of this sort."""
    rule = CalibratedRule(
        SemanticConfig(
            calibrated=CalibratedConfig(
                known=Weights(cosine=10.0), least=8.0, approximate_least=6.0,
                unknown=Weights(cosine=20.0), least_unknown=18.0, approximate_least_unknown=12.0,
            )
        )
    )  # fmt: skip
    for odds, served, when_relaxed in ((loose - 0.5, 0, 0), ((strict + loose) / 2, 0, 1), (strict + 0.5, 1, 1)):
        near = near_of([(round(1e6 * odds / slope), answer, TextMarks(), True)])
        said = rule.judge(TextMarks(), near, False, 0)
        relaxed = rule.judge(TextMarks(), near, True, 0)
        assert (said.serve is not None, relaxed.serve is not None) == (served, when_relaxed)
        assert said.approximate is False
        assert relaxed.approximate == (when_relaxed and not served)
        if relaxed.serve is not None:
            assert relaxed.odds_millionths == pytest.approx(1e6 * logistic(odds), abs=1)


def test_nobody_near_is_a_miss():
    rule = CalibratedRule(SemanticConfig())
    assert rule.judge(TextMarks(), [], True, 0).serve is None
    assert (rule.stats().asked, rule.stats().served) == (1, 0)

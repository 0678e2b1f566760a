"""Neighbours against the real index, and a replay against a naive loop through that index.

Run: python -m pytest tests/quality/test_replay.py -q
Mutations it caught: ties ranked by row; the list's end taken for the end of the cache; a served question stored; a
question that finds itself, by the ranked list or without it.
"""

from __future__ import annotations

import numpy as np
import pytest

from engine.cache_config import SemanticConfig
from engine.events import TextMarks
from engine.model.index import VectorIndex
from engine.policy.calibrated import CalibratedRule
from engine.policy.fixed import FixedRule
from engine.policy.rules import Candidate, Judgement
from sim.quality.fill import Replay
from sim.quality.fit import rows_against, rows_of
from sim.quality.neighbours import Neighbours, Present
from sim.quality.questions import Questions

DIMS = 384


def made(size: int, seed: int, scopes: int = 1) -> Questions:
    """Clusters of questions, and some twice."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(8, DIMS))
    labels = rng.integers(0, 8, size)
    vectors = centres[labels] + rng.normal(size=(size, DIMS)) * rng.uniform(0.1, 1.0, (size, 1))
    vectors[size // 2 : size // 2 + size // 8] = vectors[: size // 8]
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    marks = tuple(TextMarks(words=bytes(rng.integers(97, 100, 4, dtype=np.uint8))) for _ in range(size))
    return Questions(
        tuple(f"text {i}" for i in range(size)), tuple(f"label {i}" for i in labels), marks, vectors,
        tuple(f"scope {i % scopes}" for i in range(size)), np.ones(size, bool),
    )  # fmt: skip


@pytest.mark.parametrize("depth", [4, 40, 1000])
@pytest.mark.parametrize("scopes", [1, 3])
def test_neighbours_are_those_of_the_index(depth, scopes):
    questions = made(160, seed=1, scopes=scopes)
    neighbours, present, index = Neighbours(questions, depth), Present(160), VectorIndex(DIMS, backend="numpy")
    for row in np.random.default_rng(2).permutation(160).tolist():
        rows, cosines = neighbours.nearest(row, present, 8)
        found = index.search(questions.scopes[row].encode(), questions.vectors[row], 8)
        assert [(at.to_bytes(4, "big"), c) for at, c in zip(rows, cosines, strict=True)] == found
        present.insert(row)
        index.add(questions.scopes[row].encode(), row.to_bytes(4, "big"), questions.vectors[row])


@pytest.mark.parametrize("k", [3, 59, 60])
def test_a_question_never_finds_itself(k):
    """By the ranked list, and where that is too short for ``k``."""
    questions = made(60, seed=3)
    present = Present(60)
    for row in range(60):
        present.insert(row)
    neighbours = Neighbours(questions)
    assert all(row not in neighbours.nearest(row, present, k)[0] for row in range(60))


@pytest.mark.parametrize("size", [4, 60])
def test_what_is_asked_again_is_neither_served_nor_fitted_on_by_itself(size):
    """All rows are in the cache already, and none is another's duplicate."""
    replay = Replay(made(160, seed=9).take(range(20, 20 + size)))
    rows = range(size)
    rule = FixedRule(SemanticConfig(cosine=0.9999))
    assert not replay.fill(rule, rows, stored=rows).served.any()
    assert rows_against(replay, rows, rows).found[:, 0].max() < 0.9999
    assert replay.fill(FixedRule(SemanticConfig(cosine=0.2)), rows, stored=rows).served.any(), "or else nobody is near"


@pytest.mark.parametrize("insert", [True, False])
@pytest.mark.parametrize("make", [FixedRule, CalibratedRule])
def test_a_replay_is_the_naive_loop(make, insert):
    questions = made(200, seed=4)
    config = SemanticConfig(cosine=0.7)
    order = np.random.default_rng(5).permutation(200)[:150]
    stored = [row for row in range(200) if row not in set(order.tolist())]
    outcomes = Replay(questions).fill(make(config), order, stored, insert)
    rule, index = make(config), VectorIndex(DIMS, backend="numpy")
    for row in stored:
        index.add(b"", row.to_bytes(4, "big"), questions.vectors[row])
    for at, row in enumerate(order.tolist()):
        found = [(int.from_bytes(key, "big"), c) for key, c in index.search(b"", questions.vectors[row], 8)]
        near = [Candidate((b"", i.to_bytes(4, "big")), c, questions.labels[i], questions.marks[i]) for i, c in found]
        serve = rule.judge(questions.marks[row], near, False, 0).serve
        assert outcomes.served[at] == (serve is not None)
        assert outcomes.wrong[at] == (serve is not None and near[serve].answer != questions.labels[row])
        if serve is None and insert:
            index.add(b"", row.to_bytes(4, "big"), questions.vectors[row])
    assert outcomes.served.any()


class Listening(FixedRule):
    """Serves as ``fixed``, wants every miss compared, and keeps what it is told."""

    def __init__(self, config):
        super().__init__(config)
        self.told = []

    def judge(self, marks, near, relaxed, draw):
        said = super().judge(marks, near, relaxed, draw)
        return said if said.serve is not None or not near else Judgement(compare=0)

    def learn(self, lesson):
        super().learn(lesson)
        self.told.append(lesson)


def test_lessons_are_the_explorations_and_the_audited_hits():
    replay = Replay(made(200, seed=6))
    rule = Listening(SemanticConfig(cosine=0.6))
    outcomes = replay.fill(rule, np.arange(200), audit_share=0.5, seed=1)
    audits = [lesson for lesson in rule.told if lesson.audit]
    assert len(rule.told) - len(audits) == outcomes.explored.sum()
    assert len(audits) == outcomes.audited.sum()
    assert sum(not lesson.right for lesson in audits) == (outcomes.audited & outcomes.wrong).sum()
    assert 0 < outcomes.audited.sum() < outcomes.served.sum()


def test_the_fit_sees_what_the_rule_sees(monkeypatch):
    """Of a replay that keeps everything: the evidence that the rule weighs is what the fit was given."""
    from engine.policy import calibrated

    questions = made(90, seed=7)
    replay = Replay(questions)
    seen = rows_of(replay, range(90), 1, seed=8)
    weighed = []
    real = calibrated.evidence
    monkeypatch.setattr(calibrated, "evidence", lambda *given: weighed.append(real(*given)) or weighed[-1])
    order = _order(90, seed=8)
    never = SemanticConfig()
    never = never.__class__(calibrated=never.calibrated.__class__(least=1e9, least_unknown=1e9))
    replay.fill(CalibratedRule(never), order)
    assert np.array_equal(np.array(weighed), seen.found)
    assert 0 < seen.right.sum() < len(seen.right)


def _order(size: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng([seed, 0])
    rng.random(size)
    return rng.permutation(np.arange(size))

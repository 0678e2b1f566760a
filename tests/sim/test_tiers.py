"""What each cache tier adds: rows differ by one tier, on the same arrivals, and the table says what was counted.

Run: python -m pytest tests/sim/test_tiers.py -q    (20 s)
Mutations it caught: a tier that stays off, or on; another sale for each row; gains over the first row; an interval of
one degree of freedom too many; last resorts counted as answers; tokens of followers counted as the model's.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from engine.events import RequestRecord
from engine.scenario import load
from sim import sale
from sim.desk import tiers
from sim.desk.tiers import NONE, REFERENCE, ROWS, Outcome, Rows, mean, measure, table
from sim.twin import cost
from sim.twin.vectors import semantic_classes
from sim.twin.workload import flash_sale, read_corpus

SETS = ("model.name=fake", "semantic.cosine=0.88", "semantic.vetoes=[]", "replicas=32")
SEEDS = [3, 4]
NAMES = [name for name, _ in ROWS]


@pytest.fixture(scope="module")
def rows() -> Rows:
    """Made-up vectors: questions of one answer are near, and so are some others."""
    scenario = load("flash-sale", SETS).scenario
    bench = sale.make_bench(load("flash-sale", SETS), cost.load(REFERENCE))
    corpus, rng, topics = read_corpus(scenario), np.random.default_rng(3), {}
    vectors = {}
    for q in (q for name in semantic_classes(scenario) for q in corpus[name]):
        mixed = topics.setdefault(q.answer_id, rng.normal(size=384)) + 0.2 * rng.normal(size=384)
        vectors[bench._facts.text_key("storefront", q.text)] = (mixed / np.linalg.norm(mixed)).astype(np.float32)
    bench._vectors = vectors
    return measure(bench, "flash-sale", SETS, "ci", 15.0, SEEDS, lambda line: None)


def test_each_row_adds_one_tier(rows: Rows) -> None:
    assert list(rows) == [NONE, *NAMES]
    exact, flights, semantic, flying = (rows[name] for name in NAMES)
    for seed in range(len(SEEDS)):
        assert rows[NONE][seed].deflected == 0
        assert exact[seed].tiers["coalesced"] == exact[seed].tiers["semantic"] == flights[seed].tiers["semantic"] == 0
        assert flights[seed].tiers["coalesced"] > 0 < semantic[seed].tiers["semantic"]
        assert flying[seed].tiers["coalesced"] > semantic[seed].tiers["coalesced"]
        deflected = [row[seed].deflected for row in (exact, flights, semantic, flying)]
        tokens = [row[seed].tokens for row in (rows[NONE], exact, flights, semantic)]
        assert deflected == sorted(deflected) and tokens == sorted(tokens, reverse=True)


def test_all_rows_are_the_same_sale(rows: Rows) -> None:
    scenario = load("flash-sale", SETS).scenario
    for seed, *outcomes in zip(SEEDS, *rows.values(), strict=True):
        assert {o.offered for o in outcomes} == {len(flash_sale(scenario, "ci", 15.0, seed))}


def test_tokens_are_those_that_the_model_computed_for_each_answer() -> None:
    def record(tier: str | None, outcome: str = "served", computed: int = 0, output: int = 24) -> RequestRecord:
        return RequestRecord("r", "t", "c", 0, outcome, 0, tier, computed_tokens=computed, output_tokens=output)

    served = [record("model", computed=100), record("coalesced"), record("exact"), record("semantic")]
    assert tiers._tokens(served) == 124 / 4
    assert tiers._tokens([*served, record("fallback", output=0), record(None, "rejected", output=0)]) == 124 / 4


def test_gains_are_over_the_row_above_and_paired() -> None:
    def outcome(deflected: float) -> Outcome:
        return Outcome(100, deflected, dict.fromkeys(tiers.DEFLECTED, 0.0), 0.0, 1.0, 1.0, 0.0, tiers.share(0, 100))

    made = {name: [outcome(a), outcome(b)] for name, a, b in zip(
        (NONE, *NAMES), (0, 0.1, 0.3, 0.4, 0.5), (0, 0.5, 0.7, 0.8, 0.95), strict=True
    )}
    gains = [line.split("|")[3].strip() for line in list(table(made))[2:]]
    assert gains[:4] == ["", "", "+20.00 ± 0.00", "+10.00 ± 0.00"]
    assert gains[4] == f"+12.50 ± {12.7062 * 5 / math.sqrt(2) / math.sqrt(2):.2f}"


def test_an_interval_is_student_s() -> None:
    found = mean([1.0, 2.0, 3.0])
    assert found.half is not None
    assert (found.value, round(found.half, 3)) == (2.0, round(4.3027 / math.sqrt(3), 3))
    assert mean([1.0]).half is None

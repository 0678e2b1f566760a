"""A replica's journal as steps: what the costs make of them, and which of them nobody measured.

Run: python -m pytest tests/sim/test_steps.py -q
Mutations it caught: the first step of a run counted for all of them; rows that do not grow; predicted over measured
turned round; a hull read from the wrong side.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.events import StepShape
from engine.model.blockhash import Hasher
from engine.stepcost import StepCost
from sim.twin.cost import FEATURES, Calibration, Fit, this_machine
from sim.twin.driver import Lags
from sim.twin.steps import LoggedStep, cost_error, logged_steps, outside_share, outside_words, shapes
from sim.twin.system import TwinSystem
from tests.equivalence.test_virtual_time import COST, TENANTS, scenario, workload


@pytest.fixture(scope="module")
def journal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a replica that took exactly what COST says, and nothing between its steps."""
    folder = tmp_path_factory.mktemp("run")
    hasher = Hasher(b"key", 16)
    arrivals = [arrival for *_, arrival in workload(hasher, 5)]
    TwinSystem(scenario(), TENANTS, COST, Lags(admit_ns=1000, pipe_ns=500), arrivals, hasher, folder).run()
    return folder / "journal" / "replica-0.ndjson"


def calibration(cost: StepCost, **hull: tuple[int, int]) -> Calibration:
    quality = Fit(100, 0, 0.0, 10, 0.0, 0.0, 0.0, 0.0, 0.0)
    ranges = dict.fromkeys(FEATURES, (0, 10 ** 9)) | hull
    return Calibration("m", "d", this_machine(1, "t", "cpu", "float32"), "now", cost, Lags(), quality, ranges)


def test_true_costs_have_no_error_and_doubled_ones_are_100_percent_high(journal: Path) -> None:
    exact = cost_error(calibration(COST), journal)
    assert exact.steps == len(list(logged_steps(journal))) > 100
    assert abs(exact.total) < 1e-3 and exact.median < 1e-3
    twice = StepCost(**{name: 2 * getattr(COST, name) for name in COST.__struct_fields__})
    high = cost_error(calibration(twice), journal)
    assert high.total == pytest.approx(1.0, abs=1e-2) and high.median == pytest.approx(1.0, abs=1e-2)
    assert "total +100" in str(high) or "total +99" in str(high)


def test_every_step_of_a_run_is_held_against_the_hull(journal: Path) -> None:
    steps = list(logged_steps(journal))
    every = [shape for step in steps for shape in shapes(step)]
    assert len(every) == sum(step.steps for step in steps) > len(steps), "some runs have several steps"
    assert outside_share(calibration(COST), journal) == (0.0, len(every))
    half = sorted(shape.decode_kv_tokens for shape in every)[len(every) // 2]
    share, _ = outside_share(calibration(COST, decode_kv_tokens=(0, half)), journal)
    assert share == sum(shape.decode_kv_tokens > half for shape in every) / len(every) > 0
    assert outside_words(calibration(COST, decode_rows=(-2, -1)), journal).startswith("100.0% of")


def test_rows_grow_by_a_token_a_step() -> None:
    first = StepShape(decode_rows=3, decode_kv_tokens=30)
    assert [s.decode_kv_tokens for s in shapes(LoggedStep(0, 9, 3, first))] == [30, 33, 36]

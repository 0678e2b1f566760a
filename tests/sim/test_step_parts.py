"""A replica's journal says what its steps went into, where the runner timed it; journals without it are read as ever.

Run: python -m pytest tests/sim/test_step_parts.py -q
"""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.config import ReplicaConfig
from engine.events import Plan, SeqEnd, StepDone, StepShape, Submit
from engine.ledger.journal import JournalWriter
from engine.policy.replica import Replica
from engine.stepcost import StepCost
from sim.twin.replay import replay
from sim.twin.steps import cost_error, logged_steps
from tests.sim.test_steps import calibration

MS = 10**6
COST = StepCost(fixed_ns=10 * MS, prefill_token_ns=0, prefill_row_ns=0, decode_row_ns=0, decode_kv_ns=0, area_ns=0)


def written(path: Path, **parts: int) -> Path:
    """One request of two steps of 10 ms each, the second with ``parts``."""
    machine = Replica(ReplicaConfig())
    journal = JournalWriter(path, "replica", machine.config, b"k" * 16)
    ended = (SeqEnd(1, "length"),)
    for at_ms, event in (
        (0, Submit(1, 1, "t", "c", 1, 0, 10**12, 20, 2)), (0, Plan()), (10, StepDone(1, (1,), forward_ns=0)),
        (12, Plan()), (22, StepDone(1, ended=ended, **parts)),
    ):
        journal.write(at_ms * MS, event, machine.handle(at_ms * MS, event))
    journal.close()
    return path


def test_parts_are_read_and_told_as_shares_of_the_time(tmp_path: Path) -> None:
    journal = written(tmp_path / "replica-0.ndjson", forward_ns=8 * MS, sample_ns=MS)
    first, second = logged_steps(journal)
    assert (first.ns, first.forward_ns, first.sample_ns) == (10 * MS, 0, 0)
    assert (second.ns, second.forward_ns, second.sample_ns) == (10 * MS, 8 * MS, MS)
    error = cost_error(calibration(COST), journal)
    assert (error.total, error.forward, error.sampling) == (pytest.approx(0), 0.4, 0.05)
    assert str(error).endswith("; of the time 40.0% in the model, 5.0% sampling")
    assert replay(journal).identical


def test_a_journal_without_parts_says_nothing_of_them(tmp_path: Path) -> None:
    journal = written(tmp_path / "replica-0.ndjson")
    assert "forward_ns" not in journal.read_text()
    assert str(cost_error(calibration(COST), journal)).endswith("(2 runs of steps)")
    assert all(isinstance(step.shape, StepShape) for step in logged_steps(journal))

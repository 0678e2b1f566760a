"""The certificate's arithmetic on runs whose agreement is known.

Run: python -m pytest tests/sim/test_compare.py -q
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pandas as pd
import pytest

from engine.units import MS_NS
from sim.desk.bootstrap import blocks, quantile_intervals, wilson
from sim.desk.compare import confusion, decisions, pair, ratios
from sim.desk.frames import DTYPES


def frame(tiers: list[str | None], e2e_ms: list[int]) -> pd.DataFrame:
    rows = [
        {
            "request_id": f"r{i}", "traffic_class": "qa", "arrived_ns": i * MS_NS, "tier": tier, "level": 0,
            "outcome": "served" if tier else "rejected", "error_code": None if tier else "overloaded",
            "ttft_ns": ms * MS_NS // 2, "e2e_ns": ms * MS_NS, "replica": 0 if tier == "model" else None,
        }
        for i, (tier, ms) in enumerate(zip(tiers, e2e_ms, strict=True))
    ]
    return pd.DataFrame(rows, columns=list(DTYPES)).astype(DTYPES)


def test_pairs_go_by_id_and_decisions_are_counted() -> None:
    first = frame(["model", "exact", "model", None], [100, 4, 200, 1])
    second = frame(["model", "model", "model", None], [200, 80, 400, 1]).sample(frac=1, random_state=3)
    pairs = pair(first, second)
    assert len(pairs) == 4
    table = confusion(pairs)
    assert table.loc["model", "model"] == 2
    assert table.loc["exact", "model"] == table.loc["overloaded", "overloaded"] == 1


def test_latency_ratios_are_second_over_first() -> None:
    pairs = pair(frame(["model", "model"], [100, 200]), frame(["model", "model"], [200, 400]))
    assert ratios(pairs, "e2e").tolist() == pytest.approx([2.0, 2.0])


def test_a_run_agrees_with_itself() -> None:
    run = frame(["model", "exact", "fallback", None] * 5, [100, 4, 3, 1] * 5)
    table = confusion(pair(run, run))
    assert sum(table.loc[name, name] for name in table.index if name in table.columns) == 20
    assert list(decisions(run)[:4]) == ["model", "exact", "fallback", "overloaded"]


def test_wilson_against_a_published_value() -> None:
    found = wilson(81, 263)  # Newcombe 1998, table I: 0.2553 to 0.3662
    assert found.value == pytest.approx(0.308, abs=1e-3)
    assert (found.low, found.high) == (pytest.approx(0.2553, abs=5e-4), pytest.approx(0.3662, abs=5e-4))


def test_blocks_are_runs_of_neighbours_and_intervals_hold_what_is_true() -> None:
    for index in blocks(50, 7, 20, 1):
        assert len(index) == 50
        assert all((b - a) % 50 == 1 for a, b in pairwise(index[:7]))
    rng = np.random.default_rng(2)
    a = rng.lognormal(16, 0.5, 400)
    (interval,) = quantile_intervals(a, a * 1.2, [0.5], block=10)
    assert interval is not None
    assert interval[0] <= 0.2 + 1e-9 and interval[1] >= 0.2 - 1e-9

"""What became of each class at the height of a sale: counted from rows made by hand, and on two short sales.

Run: python -m pytest tests/sim/test_plateau.py -q
"""

from __future__ import annotations

import pytest

from engine.events import LevelRecord, RequestRecord
from engine.scenario import load
from engine.units import MS_NS, S_NS
from sim import sale
from sim.desk.frames import level_frame, requests_frame
from sim.desk.plateau import Held, held, rows_of, table
from sim.desk.report import RunView
from sim.desk.summary import summarise
from sim.desk.tiers import REFERENCE
from sim.twin import cost
from sim.twin.workload import flash_sale

SALE = load("flash-sale").scenario  # "ci": plateau from 5 to 11 s of 14


def row(name: str, at_s: float, cls: str, tier: str | None, ttft_ms: int = 1, e2e_ms: int = 2, **more) -> RequestRecord:
    return RequestRecord(
        request_id=name, tenant="t", traffic_class=cls, arrived_ns=round(at_s * S_NS),
        outcome="served" if tier else "rejected", level=0, tier=tier,
        ttft_ns=ttft_ms * MS_NS if tier else None, e2e_ns=e2e_ms * MS_NS, **more,
    )


def view(records: list[RequestRecord], levels: list[LevelRecord]) -> RunView:
    frame, steps = requests_frame(records), level_frame(levels, 20 * S_NS)
    return RunView(summarise(frame, SALE, "sim", 1, 20.0, steps, 0.5), frame, steps, SALE)


def test_what_is_counted() -> None:
    records = [
        row("early", 4.9, "product_qa", "model"), row("late", 11.0, "product_qa", "model"),
        row("good", 5.0, "product_qa", "model", 2999, 5999, prompt_tokens=80, cached_tokens=32),
        row("slow start", 6, "product_qa", "model", 3001, 5000),
        row("slow end", 6, "product_qa", "model", 100, 6001), row("cached", 7, "product_qa", "exact"),
        row("shed", 8, "product_qa", None), row("tip", 8, "recommendation", "fallback"),
        row("no tip", 8, "recommendation", None),
        row("paid", 9, "payment_fraud", "model", 900, 1400, queue_ns=7 * MS_NS),
        row("paid late", 9, "payment_fraud", "model", 900, 1501, queue_ns=9 * MS_NS),
    ]
    levels = [LevelRecord(round(at * S_NS), level) for at, level in ((1, 1), (6, 2), (12, 3), (15.5, 1), (16, 0))]
    found = held(view(records, levels), SALE, "ci")
    assert (found.model_good, found.model_late, found.offered, found.good) == (2, 3, 9, 4)
    assert (found.critical, found.critical_good) == (2, 1)
    assert found.critical_wait_p99_ms == pytest.approx(8.98, abs=0.01)
    assert (found.sheddable, found.sheddable_answered) == (2, 1)
    assert (found.level_changes, found.changes_in_10_s) == (5, 3)
    assert (found.prompt_tokens, found.cached_tokens) == (80, 32)
    assert found.calm_after_s == pytest.approx(2.0), "of 14 s, level 0 from 16 s on"


def test_the_table_pools_counts_and_shows_the_worst() -> None:
    one = Held(90, 10, 5, 5, 20.0, 10, 10, 200, 150, 4, 2, -1.0, 1000, 500)
    two = Held(110, 0, 5, 4, 50.0, 10, 9, 200, 170, 8, 3, 2.5, 1000, 400)
    [*_, last] = table({"x": [one, two]}, capacity_rps=10.0, plateau_s=10.0)
    assert last.split(" | ")[1:] == [
        "100.0%", "4.76%", "80.0%", "9 of 10", "50 ms", "95.0%", "6, 3", "2.5 s", "45.0% |",
    ]


def test_side_by_side_on_the_same_sale_the_share_keeps_more_in_time() -> None:
    made, found = cost.load(REFERENCE), {}
    rows = rows_of(SALE)
    for name in ("first come, first served", "a share, by lot"):
        resolved = load("flash-sale", ("model.name=fake", "semantic.enabled=false", *rows[name]))
        bench = sale.make_bench(resolved, made)
        run = bench.run(flash_sale(SALE, "ci", 6.0, 1), resolved.scenario)
        frame = requests_frame(run.requests)
        steps = level_frame(run.levels, run.end_ns)
        seen = RunView(summarise(frame, resolved.scenario, "sim", 1, 14.0, steps, 0.5), frame, steps, resolved.scenario)
        found[name] = held(seen, SALE, "ci")
    equal, shared = found.values()
    assert equal.offered == shared.offered and equal.critical == shared.critical > 0
    assert shared.critical_good == shared.critical > equal.critical_good
    assert shared.good > equal.good and equal.level_changes == 0 < shared.level_changes

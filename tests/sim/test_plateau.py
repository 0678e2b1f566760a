"""What became of each class at the height of a sale: counted from rows made by hand, and on two short sales.

Run: python -m pytest tests/sim/test_plateau.py -q
"""

from __future__ import annotations

import time
from pathlib import Path

from engine.events import LevelRecord, RequestRecord
from engine.scenario import load
from engine.units import MS_NS, S_NS
from sim import sale
from sim.desk.frames import read_records, read_run, requests_frame
from sim.desk.held import ALONE, Held, held
from sim.desk.plateau import rows_of, table
from sim.desk.spike_plot import side_by_side
from sim.desk.tiers import REFERENCE
from sim.desk.unloaded import CALM_WITHIN_S, sale_between
from sim.twin import cost
from sim.twin.workload import flash_sale

SALE = load("flash-sale").scenario  # "ci": plateau from 5 to 11 s of 14


def row(name: str, at_s: float, cls: str, tier: str | None, ttft_ms: int = 1, e2e_ms: int = 2, **more) -> RequestRecord:
    return RequestRecord(
        request_id=name, tenant="t", traffic_class=cls, arrived_ns=round(at_s * S_NS),
        outcome="served" if tier else "rejected", level=0, tier=tier,
        ttft_ns=ttft_ms * MS_NS if tier else None, e2e_ns=e2e_ms * MS_NS, **more,
    )


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
    alone = [row(f"a{n}", n, "payment_fraud", "model", queue_ns=n * MS_NS) for n in (2, 4)]
    texts = {"paid": "yes", "paid late": "no", "lost": "yes"}, {"paid": "yes", "paid late": "yes", "other": "no"}
    found = held(requests_frame(records), levels, SALE, "ci", texts=texts, alone=alone)
    assert (found.model_good, found.model_late, found.offered, found.good) == (2, 3, 9, 4)
    assert (found.critical, found.critical_good) == (2, 1)
    assert (found.wait_ms, found.alone_wait_ms) == ([7.0, 9.0], [2.0, 4.0])
    assert (found.ttft_ms, found.e2e_ms) == ([900.0, 900.0], [1400.0, 1501.0])
    assert (found.compared, found.same) == (2, 1)
    assert (found.sheddable, found.sheddable_answered) == (2, 1)
    assert (found.changes_s, found.changes_in_10_s) == ([1.0, 6.0, 12.0, 15.5, 16.0], 3)
    assert (found.prompt_tokens, found.cached_tokens) == (80, 32)
    assert found.calm_after_s == 2.0, "of 14 s, level 0 from 16 s on"


def test_a_level_that_never_comes_back_is_no_calm() -> None:
    lasting = held(requests_frame([]), [LevelRecord(3 * S_NS, 2)], SALE, "ci")
    assert lasting.calm_after_s == float("inf")
    late = held(requests_frame([]), [LevelRecord(3 * S_NS, 2), LevelRecord(90 * S_NS, 0)], SALE, "ci", start_ns=S_NS)
    assert late.calm_after_s == 89 - 14, "records go on after the last request"


def test_the_table_pools_counts_and_latencies_and_shows_the_worst() -> None:
    times = [3.0], [90.0], [200.0]
    one = Held(90, 10, 5, 5, 10, 10, 200, 150, [1.0, 5.0, 60.0], -1.0, 1000, 500, [20.0] * 98, *times, 7, 7)
    two = Held(110, 0, 5, 4, 10, 9, 200, 170, [1.0], 2.5, 1000, 400, [20.0, 70.0], *times, 7, 6)
    [*_, last] = table({"x": [one, two]}, capacity_rps=10.0, plateau_s=10.0)
    assert last.split(" | ")[1:] == [
        "100.0%", "4.76%", "80.0%", "9 of 10", "21, 90, 200 ms", "3 ms", "13 of 14", "95.0%", "2, 2", "2.5 s",
        "45.0% |",
    ]


def test_side_by_side_on_the_same_sale_the_share_keeps_more_in_time() -> None:
    made, found = cost.load(REFERENCE), {}
    rows = rows_of(SALE)
    for name in ("first come, first served", "a share, by lot"):
        resolved = load("flash-sale", ("model.name=fake", "semantic.enabled=false", *rows[name]))
        bench = sale.make_bench(resolved, made)
        run = bench.run(flash_sale(SALE, "ci", 6.0, 1), resolved.scenario)
        found[name] = held(requests_frame(run.requests), run.levels, SALE, "ci")
    equal, shared = found.values()
    assert equal.offered == shared.offered and equal.critical == shared.critical > 0
    assert shared.critical_good == shared.critical > equal.critical_good
    assert shared.good > equal.good and len(equal.changes_s) == 0 < len(shared.changes_s)


def test_live_every_payment_is_asked_alone_first_and_gets_the_same_answer(tmp_path: Path) -> None:
    sets = ("model.name=fake", "semantic.enabled=false", "overload.hold_ms=1000")
    resolved = load("flash-sale", sets)
    requests = flash_sale(SALE, "ci", 8.0, 1)
    began_s = time.monotonic()
    texts = sale_between(resolved, sets, requests, 14.0, 1, tmp_path)
    took_s = time.monotonic() - began_s
    run = read_run(tmp_path)
    found = held(run.frame, run.records, SALE, "ci", run.start_ns, texts, read_records(tmp_path / ALONE))
    payments = sum(r.traffic_class == "payment_fraud" for r in requests)
    assert found.compared == found.same == payments > found.critical > 0
    assert len(found.alone_wait_ms) == payments
    assert found.calm_after_s < CALM_WITHIN_S, "it was waited for"
    assert took_s < 14 + CALM_WITHIN_S, "and no longer than it took: starting both engines and asking takes less"
    assert len(run.frame) == len(requests), "those that were alone are no part of the sale"
    drawn = side_by_side({"x": tmp_path, "again": tmp_path}, SALE, "ci")
    assert f"{payments} of {payments} in time" in " ".join(drawn.get_suptitle().split())

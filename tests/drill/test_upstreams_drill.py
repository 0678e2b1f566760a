"""The flash sale through the door before two servers that are not ours; one of them is killed on the plateau.

    make drill    (or: python -m pytest -m drill tests/drill/test_upstreams_drill.py)

``tests/service/test_upstream.py`` shows the rules with a server that misbehaves on purpose. Here ``doorbuster serve``
stands before llama.cpp's server and vLLM's, the sale of the scenario comes in from a process of its own, and vLLM's is
killed by signal with requests in it. What became of each request, and what breaker and router did, is published.

Mutation it caught: a request that is called off is not hung up on; both went on computing for nobody for 20 s.
"""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from engine.errors import STATUS_OF_CODE
from engine.events import BreakerRecord, LedgerRecord, ReplicaLost, RequestRecord
from engine.scenario import load
from engine.units import S_NS
from sim.desk.frames import read_records
from sim.desk.report import write_report
from sim.live import LiveEngine, live_engine
from sim.loadgen import Seen
from sim.sale import record_live
from sim.twin.replay import replay_all
from sim.twin.workload import flash_sale, profile_of
from tests.drill.conftest import Publish, Row
from tests.drill.load import player
from tests.drill.upstreams import SLOTS, Other, llama, vllm
from tests.service.harness import CHAT, body, journal
from tests.waiting import until

pytestmark = pytest.mark.drill

NAMES = ("llama", "vllm")  # numbered so
DIES, STAYS = 1, 0
WINDOW = 4  # eight at once in llama.cpp on one thread make four tokens take four seconds: no payment survives that
IDLE_WITHIN_S = 3.0  # whoever goes on has 600 tokens to make
BROKEN_OFF = {"model_failed", "replica_lost"}  # what a stream that had begun may end with
SETS = (
    "workload.base_rate_rps=1.5",
    # few enough to open when all that ran on the dead one fail
    'breaker.window="count"', "breaker.window_size=6", "breaker.minimum_calls=3",
    # a class for answers long enough to be walked away from
    'classes.long.criticality="standard"', 'classes.long.tenant="storefront"', "classes.long.max_tokens=600",
    'classes.long.caches="none"', "classes.long.timeout_ms=120000",
)


def walk_away(engine: LiveEngine, others: list[Other]) -> float:
    """Two answers are begun, one on each; both clients leave. Seconds until both servers compute nothing."""
    headers = {"authorization": f"Bearer {engine.keys['storefront']}", "x-doorbuster-class": "long"}
    with ExitStack() as stack:
        client = stack.enter_context(
            httpx.Client(base_url=engine.url, headers=headers, timeout=60, trust_env=False)
        )
        reading: list[Iterator[bytes]] = []
        for n in range(2):
            ask = body(f"Write a long story about parcel number {n} and everybody it meets.", stream=True)
            got = stack.enter_context(client.stream("POST", CHAT, json=ask))
            reading.append(got.iter_raw())  # a reader that is dropped hangs up
            next(reading[-1])
        assert [other.busy() for other in others] == [True, True], "one each: the router spreads calm traffic"
    left_s = time.monotonic()
    until(lambda: not any(other.busy() for other in others), "it goes on computing for nobody", IDLE_WITHIN_S)
    return time.monotonic() - left_s


def per_class(seen: list[Seen]) -> list[Row]:
    rows: list[Row] = []
    for name in sorted({s.traffic_class for s in seen}):
        mine = [s for s in seen if s.traffic_class == name]
        e2e_ms = sorted((s.e2e_ns or 0) / 1e6 for s in mine if s.status == 200 and not s.error_code)
        rows.append({
            "class": name, "asked": len(mine), "no answer": sum(s.status == 0 for s in mine),
            "tiers": dict(Counter(s.tier for s in mine if s.status == 200 and not s.error_code)),
            "errors": dict(Counter(s.error_code for s in mine if s.error_code)),
            "e2e p50 ms": round(e2e_ms[len(e2e_ms) // 2]) if e2e_ms else None,
            "e2e p99 ms": round(e2e_ms[int(0.99 * len(e2e_ms))]) if e2e_ms else None,
        })
    return rows


def per_upstream(records: list[LedgerRecord], lost_ns: dict[int, int], killed_ns: int, metrics: str) -> list[Row]:
    rows: list[Row] = []
    for n, name in enumerate(NAMES):
        mine = [r for r in records if isinstance(r, RequestRecord) and r.replica == n]
        moves = [r for r in records if isinstance(r, BreakerRecord) and r.boundary == f"replica-{n}"]
        shown = [line for line in metrics.splitlines() if f'boundary="replica-{n}"' in line and "breaker_state" in line]
        rows.append({
            "upstream": name, "last sent": len(mine),
            "computed": sum(r.outcome == "served" and r.tier == "model" for r in mine),
            "of these after the kill": sum(
                r.outcome == "served" and r.tier == "model" and r.arrived_ns > killed_ns for r in mine
            ),
            "breaker": [f"{r.after} {(r.at_ns - killed_ns) / S_NS:+.2f} s" for r in moves],
            "lost": f"{(lost_ns[n] - killed_ns) / S_NS:+.2f} s" if n in lost_ns else "no",
            "breaker in /metrics": shown[0].rsplit(" ", 1)[1] if shown else "missing",
        })
    return rows


def test_a_sale_through_two_foreign_servers_one_of_which_dies(tmp_path: Path, publish: Publish) -> None:
    with ExitStack() as stack:
        others = [stack.enter_context(start()) for start in (llama, vllm)]
        sets = SETS + tuple(
            f"upstreams.{other.name}.{key}={json.dumps(value)}" for other in others
            for key, value in {"url": other.url, "window": WINDOW, "reserved": 2, "health_path": "/health"}.items()
        )
        resolved = load("flash-sale", sets)
        assert resolved.scenario.replicas == 2
        requests = flash_sale(resolved.scenario, "demo", resolved.scenario.workload.base_rate_rps, seed=11)
        profile = profile_of(resolved.scenario, "demo")
        with live_engine(resolved, sets, tmp_path) as engine, player(engine.url, engine.keys) as play:
            idle_s = walk_away(engine, others)
            playing = play(requests)
            time.sleep(profile.base_s + profile.ramp_s + profile.plateau_s / 2)  # the load is in its own process
            killed_ns = time.monotonic_ns() - engine.epoch_ns
            others[DIES].kill()
            seen = playing.result(180)
            metrics = httpx.get(f"{engine.url}/metrics", trust_env=False).text
    start_ns = seen[0].scheduled_ns - requests[0].at_ns - engine.epoch_ns
    view = record_live(resolved, requests, seen, start_ns, engine.epoch_ns, profile.duration_s, 11, tmp_path)
    page = write_report(tmp_path, view, None, None, {}).read_text()
    records = read_records(tmp_path)
    lost_ns = {e.event.replica: e.at_ns for e in journal(tmp_path) if isinstance(e.event, ReplicaLost)}
    classes, upstreams = per_class(seen), per_upstream(records, lost_ns, killed_ns, metrics)
    publish("upstreams_classes", classes)
    publish("upstreams", upstreams)
    publish("upstreams_left", [{"idle after both clients left, s": round(idle_s, 2)}])

    assert len(seen) == len(requests)
    assert not [s for s in seen if s.status == 0], "no request without an answer"
    errors = [s for s in seen if s.error_code]
    assert all(s.error_code in STATUS_OF_CODE for s in errors), "and each in our own words"
    begun = [s for s in errors if s.status == 200]
    assert {s.error_code for s in begun} <= BROKEN_OFF and len(begun) <= SLOTS, "only what had begun on the dead one"
    payments = [s for s in seen if s.traffic_class == "payment_fraud" and s not in begun]
    assert {(s.status, s.tier) for s in payments} == {(200, "model")}, "every payment is judged by a model"
    assert all(int(str(row["computed"])) > 0 for row in upstreams), "both had work"
    assert upstreams[DIES]["of these after the kill"] == 0
    assert int(str(upstreams[STAYS]["of these after the kill"])) > 0
    assert upstreams[DIES]["breaker"] or DIES in lost_ns, "the door noticed"
    [shown] = re.findall(r"Computed by llama \d+ %, vllm \d+ %; [^<\"]+", page)[:1]
    assert not upstreams[DIES]["breaker"] or "vllm&#39;s breaker was open for" in shown, "and the report shows it"
    assert STAYS not in lost_ns
    assert all(found.identical for found in replay_all(tmp_path))

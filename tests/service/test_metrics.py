"""``/metrics`` tells the truth: every number of a mixed run is computed again from what the run has written down.

Three witnesses: the gateway's journal (records, pressure), the ledger (the same records), and the replica's journal,
replayed through a fresh replica machine that counts lookups, hits and preemptions by itself.

Run: ``pytest tests/service/test_metrics.py``. Deliberate breaks that it caught: TTFT of served requests only, latency
of all, queue time of all that were submitted; cached tokens as "not computed"; tokens of unread answers left out;
preempted requests instead of preemptions; a bound in the wrong bucket, buckets not cumulative or one behind; fallbacks
among the rejections; free blocks as used; pressure or records not heard; a lost replica's last words kept; a proxy, a
private address or a tenant's key let in; no word on a wrong method.
"""

from __future__ import annotations

import asyncio
import contextlib
from bisect import bisect_left
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import prometheus_client
import pytest
from prometheus_client.parser import text_string_to_metric_families

from engine.config import BatcherConfig, PrefixConfig, ReplicaConfig
from engine.events import BreakerRecord, Ended, LevelRecord, Pressure, Record, RequestRecord, Waiting
from engine.ledger.journal import open_journal
from engine.model.wire import Output
from engine.policy.replica import Replica, ReplicaStats
from engine.policy.retries import RetryStats
from engine.service.metrics import BOUNDS_NS, Histogram, Metrics, is_local
from engine.units import S_NS
from tests.service.conftest import Starter
from tests.service.harness import CHAT, SCENARIO, STEP_20_MS, Engine, body, check_error, journal, start

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def read(text: str) -> Samples:
    """Samples by name and labels; every family has a type and words, and no sample comes twice."""
    out: Samples = {}
    for family in text_string_to_metric_families(text):
        assert family.name.startswith("doorbuster:") and family.documentation and family.type != "unknown"
        for sample in family.samples:
            key = (sample.name.removeprefix("doorbuster:"), frozenset(sample.labels.items()))
            assert key not in out
            out[key] = sample.value
    return out


def scrape(engine: Engine) -> Samples:
    with engine.http(None) as client:
        got = client.get("/metrics")
    assert got.status_code == 200 and got.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    return read(got.text)


def one(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, frozenset(labels.items())]


def every(samples: Samples, name: str) -> dict[frozenset[tuple[str, str]], float]:
    """Those that are not zero."""
    return {labels: value for (found, labels), value in samples.items() if found == name and value}


def told(*pairs: tuple[str, str]) -> frozenset[tuple[str, str]]:
    return frozenset(pairs)


# ---------------------------------------------------------------- the truth


LONG = "word " * 150


def mixed_run(engine: Engine) -> None:
    """Model, exact, coalesced, preempted, cancelled, limited, late, and one refusal that no machine hears of."""
    words = [f"item {i} please " + f"and number {i} " * 9 for i in range(6)]
    fraud = {"x-doorbuster-class": "fraud"}
    with ThreadPoolExecutor(8) as pool, engine.http() as shop, engine.http("bank", **fraud) as bank:
        with engine.frozen():
            asked = [pool.submit(shop.post, CHAT, json=body(text)) for text in [*words, words[0], words[1]]]
            engine.waiting(8)
        assert {each.result().status_code for each in asked} == {200}
        assert shop.post(CHAT, json=body(words[0])).headers["x-doorbuster-tier"] == "exact"
        with contextlib.ExitStack() as streams:
            for i in range(3):  # all the slots that there are for them
                stream = streams.enter_context(shop.stream("POST", CHAT, json=body(f"{LONG}{i}", stream=True)))
                lines = streams.enter_context(contextlib.closing(stream.iter_lines()))
                assert next(lines)
            with engine.frozen():
                asked = [pool.submit(bank.post, CHAT, json=body(f"card {i} was used")) for i in range(6)]
                engine.waiting(9)
            assert {each.result().status_code for each in asked} == {200}
        engine.waiting(0)  # all three have left
        with engine.http("trickle") as trickle:
            assert [trickle.post(CHAT, json=body("hello?")).status_code for _ in range(3)] == [200, 429, 429]
        with engine.frozen():
            late = {"x-doorbuster-class": "hasty"}
            assert shop.post(CHAT, json=body("too late"), headers=late).status_code == 504
        assert shop.post(CHAT, json={}).status_code == 400
        assert shop.post(CHAT, json=body("one more, so that the replica says how it stands")).status_code == 200
    engine.quiet()


def replayed(folder: Path) -> ReplicaStats:
    found = open_journal(folder / "journal" / "replica-0.ndjson")
    config = found.config()
    assert isinstance(config, ReplicaConfig)
    machine = Replica(config)
    for entry in found.entries():
        machine.handle(entry.at_ns, entry.event)  # type: ignore[arg-type]
    return machine.stats()


def test_every_number_can_be_computed_again_from_what_the_run_left_behind(tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "prefix": PrefixConfig(blocks=96, pinned_blocks=24),
        "batcher": BatcherConfig(slots=4, reserved_slots=1, reserved_blocks=4),
    }
    with start(tmp_path, msgspec.structs.replace(STEP_20_MS, fixed_ns=5e6), **changes) as engine:
        mixed_run(engine)
        page = scrape(engine)
        stats = engine.stats()
    entries = journal(tmp_path)
    records = [a.record for e in entries for a in e.actions if isinstance(a, Record)]
    lines = (tmp_path / "ledger" / "records.ndjson").read_bytes().splitlines()
    assert [msgspec.json.encode(record) for record in records] == lines, "journal and ledger tell the same"
    rows = [record for record in records if isinstance(record, RequestRecord)]
    assert len(rows) == stats.ended == 23
    replica, ends = replayed(tmp_path), [e.event for e in entries if isinstance(e.event, Ended)]

    # tokens: the replica's own count, not the records'
    assert one(page, "prefix_cache_queries_total") == one(page, "prompt_tokens_total") == replica.prefix.query_tokens
    assert one(page, "prefix_cache_hits_total") == replica.prefix.hit_tokens > 0
    assert one(page, "generation_tokens_total") == sum(end.output_tokens for end in ends) > 100
    assert one(page, "num_preemptions_total") == replica.preemptions > 0

    # requests
    classes = Counter(row.traffic_class for row in rows if row.outcome == "served")
    assert every(page, "request_success_total") == {told(("traffic_class", n)): v for n, v in classes.items()}
    tiers = Counter((row.tier, row.traffic_class) for row in rows if row.tier)
    assert every(page, "requests_by_tier_total") == {
        told(("tier", str(tier)), ("traffic_class", name)): n for (tier, name), n in tiers.items()
    }
    assert {tier for tier, _ in tiers} == {"model", "exact", "coalesced"}
    assert {row.outcome for row in rows} == {"served", "cancelled", "rejected"}
    ends_by = Counter((row.outcome, row.error_code or "", row.traffic_class) for row in rows)
    assert every(page, "requests_by_outcome_total") == {
        told(("outcome", outcome), ("error_code", code), ("traffic_class", name)): n
        for (outcome, code, name), n in ends_by.items()
    }
    limited = sum(row.error_code == "rate_limited" for row in rows)
    assert every(page, "admission_rejections_total") == {told(("reason", "rate_limited")): limited}
    assert every(page, "limiter_rejections_total") == {told(("scope", "tenant")): limited}
    assert limited == stats.limiter.limited == 2
    assert every(page, "ingress_refusals_total") == {told(("reason", "invalid_request")): 1}

    # durations
    for name, values in (
        ("time_to_first_token_seconds", [(r.traffic_class, r.ttft_ns) for r in rows if r.ttft_ns is not None]),
        ("e2e_request_latency_seconds", [(r.traffic_class, r.e2e_ns) for r in rows if r.outcome == "served"]),
        ("request_queue_time_seconds", [(r.traffic_class, r.queue_ns) for r in rows if r.computed_tokens]),
    ):
        for traffic_class in SCENARIO.classes:
            mine = [value for found, value in values if found == traffic_class]
            assert one(page, f"{name}_count", traffic_class=traffic_class) == len(mine)
            assert one(page, f"{name}_sum", traffic_class=traffic_class) == sum(mine) / S_NS
            for (found, labels), count in page.items():
                if found == f"{name}_bucket" and ("traffic_class", traffic_class) in labels:
                    most = float(dict(labels)["le"])
                    assert count == sum(value / S_NS <= most for value in mine)

    # gauges
    last = [e.event for e in entries if isinstance(e.event, Pressure)][-1]
    assert one(page, "num_requests_running", replica="0") == last.running == replica.running == 0
    assert one(page, "num_requests_waiting", replica="0") == sum(w.count for w in last.waiting) == replica.waiting == 0
    used = replica.prefix.used / replica.prefix.total
    assert one(page, "kv_cache_usage_perc", replica="0") == pytest.approx(used) and used > 0, "the pinned prompt stays"
    assert one(page, "num_requests_in_gateway") == 0 and one(page, "overload_level") == stats.level == 0
    assert one(page, "breaker_state", boundary="replica-0") == 0 and stats.fleet.breakers[0].state == "closed"


def test_gauges_follow_a_request_on_its_way(started: Starter) -> None:
    engine = started(STEP_20_MS, replica_restarts=0)
    with engine.http() as client:
        with client.stream("POST", CHAT, json=body("word " * 70, stream=True)) as stream:
            lines = stream.iter_lines()  # a generator that is let go hangs up
            assert next(lines)
            page = scrape(engine)
            assert (one(page, "num_requests_running", replica="0"), one(page, "num_requests_in_gateway")) == (1, 1)
            prompt_blocks = engine.call(lambda: next(iter(engine.inside.driver.machine._trips.values()))).ask.blocks
            assert len(prompt_blocks) / 1024 <= one(page, "kv_cache_usage_perc", replica="0") <= 512 / 16 / 1024
        engine.quiet()
        client.post(CHAT, json=body("so that the replica says how it stands", max_tokens=1))
        engine.quiet()
        page = scrape(engine)
        assert (one(page, "num_requests_running", replica="0"), one(page, "num_requests_in_gateway")) == (0, 0)
        with ThreadPoolExecutor(1) as pool, engine.frozen():
            asked = pool.submit(client.post, CHAT, json=body("wait here"))
            engine.waiting(1)
            first, second = (one(scrape(engine), "oldest_waiting_seconds", traffic_class="chat") for _ in range(2))
            assert 0 < first < second < 20
            assert one(scrape(engine), "oldest_waiting_seconds", traffic_class="fraud") == 0
            engine.worker.kill()
            assert asked.result().status_code == 503
    page = scrape(engine)
    lost = {"outcome": "failed", "error_code": "replica_lost", "traffic_class": "chat"}
    assert one(page, "requests_by_outcome_total", **lost) == 1
    assert not any(name in ("num_requests_running", "kv_cache_usage_perc") for name, _ in page), "nobody knows any more"


def test_what_was_refused_before_the_gateway_heard_of_it_is_counted_by_code(engine: Engine) -> None:
    before = scrape(engine)
    with engine.http() as client, engine.http(None) as stranger:
        client.get("/nowhere")
        client.get(CHAT)
        client.post(CHAT, content=b"{")
        client.post(CHAT, content=b" " * 20_001)
        stranger.post(CHAT, json=body("x"))
        stranger.post(CHAT, json=body("y"))
        client.post(CHAT, json=body("z"), headers={"x-doorbuster-class": "fraud"})
    after, name = scrape(engine), "ingress_refusals_total"
    more = Counter({dict(labels)["reason"]: int(n) for labels, n in every(after, name).items()})
    more.subtract({dict(labels)["reason"]: int(n) for labels, n in every(before, name).items()})
    assert +more == {
        "not_found": 1, "method_not_allowed": 1, "invalid_request": 1, "body_too_large": 1, "unauthorized": 2,
        "forbidden": 1,
    }


def test_series_are_there_before_anything_has_happened(started: Starter) -> None:
    engine, other = started(), started()
    with engine.http() as client:
        client.post(CHAT, json=body("counted here only"))
    engine.quiet()
    page = scrape(other)
    assert one(page, "request_success_total", traffic_class="chat") == 0
    assert one(scrape(engine), "request_success_total", traffic_class="chat") == 1
    for reason in ("rate_limited", "overloaded", "breaker_open", "draining"):
        assert one(page, "admission_rejections_total", reason=reason) == 0
    assert one(page, "requests_by_tier_total", tier="fallback", traffic_class="fraud") == 0
    assert one(page, "num_requests_running", replica="0") == one(page, "kv_cache_usage_perc", replica="0") == 0
    assert "doorbuster" not in prometheus_client.generate_latest().decode(), "the library's global registry is not used"


# ---------------------------------------------------------------- who may read


def test_the_machine_itself_needs_no_key_and_no_tenants_key_opens(engine: Engine) -> None:
    with engine.http(None) as client:
        assert client.head("/metrics").status_code == 200
        assert check_error(client.post("/metrics"), 405, "method_not_allowed")
    for header in ("x-forwarded-for", "forwarded", "via", "x-real-ip"):
        with engine.http(None, **{header: "127.0.0.1"}) as stranger, engine.http("bank", **{header: "::1"}) as tenant:
            check_error(stranger.get("/metrics"), 401, "unauthorized")
            assert "admin" in check_error(tenant.get("/metrics"), 403, "forbidden")


@pytest.mark.parametrize(("key", "status"), [("", 401), ("db-wrong", 401), ("shop", 403), ("office", 200)])
@pytest.mark.parametrize("path", ["/metrics", "/"])
def test_another_machine_needs_an_admins_key(engine: Engine, path: str, key: str, status: int) -> None:
    """On the ASGI interface itself: this machine has no other to ask from."""
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    async def receive() -> dict[str, Any]:
        raise AssertionError("nobody reads a body")

    headers = [(b"authorization", f"Bearer {engine.keys.get(key, key)}".encode())] if key else []
    scope = {"type": "http", "path": path, "method": "GET", "headers": headers, "client": ("203.0.113.5", 4000)}
    asyncio.run_coroutine_threadsafe(engine.inside.app(scope, receive, send), engine.loop).result(20)
    assert sent[0]["status"] == status and (b"doorbuster" in sent[1]["body"]) == (status == 200)


@pytest.mark.parametrize(
    ("address", "local"),
    [
        ("127.0.0.1", True), ("127.8.9.1", True), ("::1", True), ("::ffff:127.0.0.1", True), ("10.0.0.1", False),
        ("::ffff:10.0.0.1", False), ("2001:db8::1", False), ("fe80::1%eth0", False), ("localhost", False), ("", False),
    ],
)
def test_loopback_is_an_address(address: str, local: bool) -> None:
    assert is_local((address, 1), []) == local
    assert not is_local((address, 1), [(b"x-forwarded-for", b"127.0.0.1")])
    assert not is_local(None, [])
    for host in (b"localhost", b"127.0.0.1:8000", b"[::1]:80"):
        assert is_local((address, 1), [(b"host", host)]) == local
    for host in (b"evil.example", b"127.0.0.1.evil.example:80", b"localhost.evil", b""):
        assert not is_local((address, 1), [(b"host", host)])


# ---------------------------------------------------------------- what a fake run does not show


def test_a_bound_belongs_to_its_bucket() -> None:
    histogram = Histogram()
    for value_ns in (0, BOUNDS_NS[0], BOUNDS_NS[0] + 1, BOUNDS_NS[-1], BOUNDS_NS[-1] + 1):
        histogram.add(value_ns)
    buckets = dict(histogram.buckets())
    assert (buckets["0.001"], buckets["0.0025"], buckets["30.0"], buckets["60.0"], buckets["+Inf"]) == (2, 3, 3, 4, 5)
    assert bisect_left(BOUNDS_NS, 10**9) == BOUNDS_NS.index(10**9)


def test_an_overload_is_counted(engine: Engine) -> None:
    """Its records and its pressure: it takes a real engine seconds to get there."""
    metrics = Metrics(SCENARIO)
    row = RequestRecord("r", "shop", "chat", 0, "served", 2, "fallback", "overloaded", ttft_ns=0)
    for record in (
        row, msgspec.structs.replace(row, outcome="rejected", tier=None, ttft_ns=None), LevelRecord(1, 2, "chat", 5),
        BreakerRecord(7, "replica-0", "closed", "open", "failing"),
        msgspec.structs.replace(row, tier="approximate", error_code=None),
        msgspec.structs.replace(
            row, outcome="rejected", tier=None, error_code="deadline_exceeded", replica=0, prompt_tokens=9, ttft_ns=None
        ),
        msgspec.structs.replace(
            row, tier="model", error_code=None, replica=0, prompt_tokens=5, computed_tokens=7, queue_ns=4, preemptions=2
        ),
    ):
        metrics.append(record)
    metrics.hear(Output([Pressure(0, 7, 3, (Waiting("chat", 4, 10), Waiting("fraud", 2, 20)), free_blocks=768)]))
    stats = engine.stats()
    overload = msgspec.structs.replace(stats.overload, share_millionths=1_250_000, retries=RetryStats(7, 2))
    limiter = msgspec.structs.replace(stats.limiter, by_scope=(("total", 4), ("user", 3)))
    stats = msgspec.structs.replace(stats, overload=overload, limiter=limiter, level=4)
    page = read(metrics.page(2 * S_NS, stats, {"chat": S_NS}).decode())
    assert one(page, "overload_level") == 4
    assert one(page, "admission_share", criticality="standard") == 1
    assert one(page, "admission_share", criticality="sheddable") == 0.25
    assert one(page, "retries_seen_total") == 7 and one(page, "retries_refused_total") == 2
    limited = every(page, "limiter_rejections_total")
    assert limited == {told(("scope", "total")): 4, told(("scope", "user")): 3}
    assert every(page, "admission_rejections_total") == {told(("reason", "overloaded")): 1}, "late is not turned away"
    by_tier = every(page, "requests_by_tier_total")
    assert {dict(labels)["tier"]: n for labels, n in by_tier.items()} == {"fallback": 1, "approximate": 1, "model": 1}
    assert one(page, "prompt_tokens_total") == 5, "what no step has held was not looked up"
    assert one(page, "request_queue_time_seconds_count", traffic_class="chat") == 1
    assert one(page, "num_preemptions_total") == 2
    assert one(page, "requests_by_outcome_total", outcome="served", error_code="overloaded", traffic_class="chat") == 1
    assert one(page, "overload_level_changes_total") == 1
    assert one(page, "breaker_transitions_total", boundary="replica-0", state="open") == 1
    assert one(page, "router_ahead_tokens", replica="0") == 0
    assert one(page, "num_requests_running", replica="0") == 3 and one(page, "num_requests_waiting", replica="0") == 6
    assert one(page, "kv_cache_usage_perc", replica="0") == 0.25
    assert one(page, "oldest_waiting_seconds", traffic_class="chat") == 1

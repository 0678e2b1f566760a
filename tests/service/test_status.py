"""The status page's numbers against a naive count of the same records, its feed, who may watch, and the routes.

Run: ``pytest tests/service/test_status.py``. Deliberate breaks that it caught: the second that goes on counted; TTFT of
served requests only; quantiles a rank too low; an old record as new; a computation for each viewer, or for nobody;
places not given back; a slow viewer waited for; viewers kept in a shutdown; the page for everybody; more than 100
tries, or those of the first who asked the same; what was not served left out.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import RequestError
from engine.events import Arrive, RequestRecord
from engine.service.feed import Feed
from engine.service.metrics import Metrics, shares
from engine.service.recent import LEAST_NS, NOT_SERVED, SECONDS, Latency, Recent
from engine.service.status import RATE_S, Status, StatusMaker
from engine.units import MS_NS, S_NS
from engine.upstream_config import UpstreamConfig
from tests.service.conftest import Starter
from tests.service.harness import CHAT, SCENARIO, STEP_20_MS, Engine, body, check_error, journal

TIERS = ("model", "exact", "fallback")


# ---------------------------------------------------------------- the last minute


@st.composite
def records(draw: st.DrawFn) -> list[RequestRecord]:
    """In the order in which they end, as a gateway writes them."""
    out, end_ns = [], 1000 * S_NS
    for _ in range(draw(st.integers(0, 60))):
        end_ns += draw(st.integers(0, 8 * S_NS))
        e2e_ns = draw(st.integers(1, 20 * S_NS))
        outcome = draw(st.sampled_from(["served", "rejected", "cancelled", "failed"]))
        served = outcome == "served"
        ttft_ns = draw(st.integers(0, e2e_ns)) if served or draw(st.booleans()) else None
        out.append(RequestRecord(
            "r", "t", draw(st.sampled_from("ab")), end_ns - e2e_ns, outcome, 0,  # type: ignore[arg-type]
            draw(st.sampled_from(TIERS)) if served else None, ttft_ns=ttft_ns, e2e_ns=e2e_ns,  # type: ignore[arg-type]
        ))
    return out


@given(records(), st.integers(0, 70 * S_NS))
def test_the_last_minute_is_what_ended_in_its_whole_seconds(rows: list[RequestRecord], later_ns: int) -> None:
    recent = Recent()
    for row in rows:
        recent.append(row)
    ends = [row.arrived_ns + row.e2e_ns for row in rows]
    now_ns = max(ends, default=0) + later_ns
    first = now_ns // S_NS - SECONDS
    lately = [row for row, end_ns in zip(rows, ends, strict=True) if first <= end_ns // S_NS < now_ns // S_NS]
    for tier in (*TIERS, NOT_SERVED):
        wanted = [0] * SECONDS
        for row in lately:
            wanted[(row.arrived_ns + row.e2e_ns) // S_NS - first] += (row.tier or NOT_SERVED) == tier
        assert recent.per_second(now_ns, tier) == tuple(wanted)
    for name in "ab":
        mine = [row for row in lately if row.traffic_class == name]
        served = [row for row in mine if row.outcome == "served"]
        assert recent.ended(now_ns, name) == (len(served), len(mine) - len(served))
        ttfts = [row.ttft_ns for row in mine if row.ttft_ns is not None]
        for kind, times in (("ttft", ttfts), ("e2e", [row.e2e_ns for row in served])):
            near(recent.latency(now_ns, (kind, name)), sorted(times))


def near(found: Latency, times: list[int]) -> None:
    """Nearest-rank quantiles, within half a step of 5 %."""
    assert found.number == len(times)
    for value, share in ((found.p50_ns, 50), (found.p95_ns, 95)):
        if not times:
            assert value is None
            continue
        true = max(times[-(-share * len(times) // 100) - 1], LEAST_NS)
        assert value is not None and abs(value / true - 1) < 0.026, (value, true)


def test_what_is_remembered_is_bounded() -> None:
    recent = Recent()
    for n in range(20_000):
        recent.append(RequestRecord("r", "t", "a", n * MS_NS, "served", 0, "exact", ttft_ns=n, e2e_ns=n))
    steps = sum(len(second.latencies) for second in recent._ring if second)
    assert len(recent._ring) == SECONDS + 1 and steps < 2 * 21 * 64, "20,000 latencies, some steps of each second"


def test_a_record_of_long_ago_is_not_counted_as_new() -> None:
    recent = Recent()
    for at_s in (1000, 1000 - SECONDS - 1):
        recent.append(RequestRecord("r", "t", "a", at_s * S_NS, "served", 0, "exact"))
    assert recent.ended(1001 * S_NS, "a") == (1, 0)


@pytest.mark.parametrize(
    ("millionths", "level", "graded", "standard", "sheddable"),
    [(2_000_000, 0, True, 1, 1), (1_250_000, 1, True, 1, 0.25), (400_000, 3, True, 0.4, 0), (0, 4, True, 0, 0),
     (2_000_000, 1, False, 1, 1), (2_000_000, 2, False, 1, 0), (2_000_000, 3, False, 0, 0)],
)
def test_sheddable_work_goes_first(
    engine: Engine, millionths: int, level: int, graded: bool, standard: float, sheddable: float
) -> None:
    stats = engine.stats()
    overload = msgspec.structs.replace(stats.overload, share_millionths=millionths)
    assert shares(msgspec.structs.replace(stats, overload=overload, level=level), graded) == (standard, sheddable)


# ---------------------------------------------------------------- the feed


class Client:
    """One end of an ASGI exchange; ``deaf``: takes the start of a response and nothing more."""

    def __init__(self, deaf: bool = False) -> None:
        self.sent: list[dict[str, Any]] = []
        self.left, self.hears = asyncio.Event(), asyncio.Event()
        self.deaf = deaf

    async def receive(self) -> dict[str, Any]:
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: dict[str, Any]) -> None:
        if self.deaf and message["type"] == "http.response.body":
            await self.hears.wait()
        self.sent.append(message)

    async def got(self, count: int) -> None:
        async with asyncio.timeout(10):
            while len(self.sent) < count:
                await asyncio.sleep(0.001)


START = {"type": "http.response.start", "status": 200, "headers": []}


def test_one_computation_serves_all_and_none_is_made_for_nobody() -> None:
    looks = iter(range(10**6))

    async def play() -> None:
        feed = Feed(lambda: b"%d" % next(looks), lambda: False, period_s=0.02)
        clients = [Client() for _ in range(5)]
        tasks = [asyncio.create_task(feed.serve(each.receive, each.send, dict(START))) for each in clients]
        await asyncio.gather(*(each.got(4) for each in clients))
        for each in clients:
            texts = [message["body"] for message in each.sent[1:4]]
            assert texts == [b"data: 0\n\n", b"data: 1\n\n", b"data: 2\n\n"], "all see the same, from the first on"
            each.left.set()
        await asyncio.gather(*tasks)
        assert len(feed) == 0 and all(message.get("more_body", True) for each in clients for message in each.sent)
        made = next(looks)
        async with asyncio.timeout(10):
            while feed._timer is not None:  # the tick that finds nobody is the last
                await asyncio.sleep(0.001)
        assert next(looks) == made + 1 and len(asyncio.all_tasks()) == 1

    asyncio.run(play())


def test_there_is_room_for_so_many_viewers_and_a_place_that_is_left_is_free() -> None:
    async def play() -> None:
        feed, clients = Feed(lambda: b"{}", lambda: False, period_s=0.01, most=2), [Client() for _ in range(3)]
        tasks = [asyncio.create_task(feed.serve(each.receive, each.send, dict(START))) for each in clients[:2]]
        await asyncio.gather(*(each.got(2) for each in clients[:2]))
        with pytest.raises(RequestError, match="2 viewers watch already"):
            await feed.serve(clients[2].receive, clients[2].send, dict(START))
        assert clients[2].sent == []
        clients[0].left.set()
        await tasks[0]
        again = asyncio.create_task(feed.serve(clients[2].receive, clients[2].send, dict(START)))
        await clients[2].got(3)
        clients[1].left.set()
        clients[2].left.set()
        await asyncio.gather(tasks[1], again)

    asyncio.run(play())


def test_who_takes_nothing_loses_the_place_and_holds_nobody_up() -> None:
    async def play() -> None:
        feed = Feed(lambda: b"{}", lambda: False, period_s=0.01, slow_s=0.05)
        deaf, good = Client(deaf=True), Client()
        tasks = [asyncio.create_task(feed.serve(each.receive, each.send, dict(START))) for each in (deaf, good)]
        async with asyncio.timeout(10):
            while len(feed) == 2:
                await asyncio.sleep(0.001)
        await good.got(20)
        assert len(feed) == 1 and not tasks[0].done(), "its connection is the protocol's to close"
        deaf.hears.set()
        await tasks[0]
        assert [message.get("body") for message in deaf.sent] == [None, b""], "an end, should it hear again"
        good.left.set()
        await tasks[1]

    asyncio.run(play())


def test_viewers_are_let_go_when_the_server_shuts_down() -> None:
    async def play() -> None:
        over: list[bool] = []
        feed, client = Feed(lambda: b"{}", lambda: bool(over), period_s=0.01), Client()
        task = asyncio.create_task(feed.serve(client.receive, client.send, dict(START)))
        await client.got(2)
        over.append(True)
        await asyncio.wait_for(task, 10)
        assert client.sent[-1] == {"type": "http.response.body", "body": b"", "more_body": False}

    asyncio.run(play())


# ---------------------------------------------------------------- over HTTP


def first_status(engine: Engine, tenant: str | None = None, **headers: str) -> Status:
    with engine.http(tenant, **headers) as client, client.stream("GET", "/status/events") as stream:
        assert stream.status_code == 200 and stream.headers["content-type"] == "text/event-stream; charset=utf-8"
        line = next(stream.iter_lines())
    return msgspec.json.decode(line.removeprefix("data: "), type=Status)


def test_the_page_says_what_the_machine_knows(started: Starter) -> None:
    own = started(msgspec.structs.replace(STEP_20_MS, fixed_ns=1e6))
    with own.http() as client, own.http("trickle") as trickle:
        for text in ("one", "one", "two"):
            assert client.post(CHAT, json=body(text)).status_code == 200
        assert [trickle.post(CHAT, json=body("more")).status_code for _ in range(2)] == [200, 429]
    with ThreadPoolExecutor(1) as pool, own.frozen(), own.http() as client:
        asked = pool.submit(client.post, CHAT, json=body("three"))
        own.waiting(1)
        busy = first_status(own)
        own.worker.resume()
        asked.result()
    assert (busy.model, busy.level, busy.level_word, busy.draining, busy.in_flight) == ("fake", 0, "normal", False, 1)
    assert (busy.share_standard, busy.share_sheddable, busy.limited, busy.retries_seen) == (1, 1, 1, 0)
    assert busy.encoder_breaker is None
    chat = next(row for row in busy.classes if row.name == "chat")
    assert (chat.criticality, chat.slo_ttft_ms) == ("standard", 60_000) and chat.oldest_ms > 0
    (row,) = busy.replicas
    assert (row.name, row.up, row.blocks, row.breaker) == ("replica-0", True, 1024, "closed")
    maker = own.inside.app.status
    assert maker is not None
    own.until(lambda: sum(sum(tier.per_second) for tier in maker.look(False).tiers) == 6)  # its second is over
    now = own.call(lambda: maker.look(False))
    ended = {tier.name: sum(tier.per_second) for tier in now.tiers}
    assert (ended["model"], ended["exact"], ended[NOT_SERVED]) == (4, 1, 1)
    assert all(tier.rps == sum(tier.per_second[-RATE_S:]) / RATE_S for tier in now.tiers)


def test_a_replica_that_died_says_nothing(started: Starter) -> None:
    own = started(replica_restarts=0)
    with own.http() as client:
        assert client.post(CHAT, json=body("one")).status_code == 200
    own.worker.kill()
    own.until(lambda: not own.inside.driver.machine.stats().fleet.up)
    (row,) = first_status(own).replicas
    assert (row.up, row.running, row.waiting, row.free_blocks, row.blocks) == (False, 0, 0, None, 1024)


def test_upstreams_have_names_and_no_blocks(engine: Engine) -> None:
    scenario = msgspec.structs.replace(SCENARIO, upstreams={"left": UpstreamConfig(url="http://left:1")})
    maker = StatusMaker(scenario, "fake", engine.inside.driver, Metrics(scenario), has_encoder=True)
    now = engine.call(lambda: maker.look(True))
    (row,) = now.replicas
    assert (row.name, row.up, row.free_blocks, row.blocks) == ("left", True, None, None)
    assert now.encoder_breaker == "closed" and now.draining


def test_who_may_watch(engine: Engine) -> None:
    with engine.http(None) as client:
        page = client.get("/")
        assert page.status_code == 200 and page.headers["content-type"] == "text/html; charset=utf-8"
        assert page.headers["x-request-id"] and "default-src 'none'" in page.headers["content-security-policy"]
        assert client.head("/").status_code == 200
        check_error(client.head("/status/events") and client.post("/status/events"), 405, "method_not_allowed")
    for path in ("/", "/status/events"):
        with engine.http(None, via="proxy") as stranger, engine.http("shop", via="proxy") as tenant:
            check_error(stranger.get(path), 401, "unauthorized")
            check_error(tenant.get(path), 403, "forbidden")
    assert first_status(engine, "office", via="proxy").model == "fake"
    with engine.http(None, via="proxy") as stranger:
        assert stranger.get("/openapi.json").status_code == 200, "the document needs no key"
    engine.quiet()


def test_nothing_of_a_tenant_is_shown(engine: Engine) -> None:
    with engine.http() as client:
        client.post(CHAT, json=body("a question that stays between us"))
    with engine.http(None) as client:
        text = msgspec.json.encode(first_status(engine)).decode() + client.get("/").text
    assert all(word not in text for word in (*engine.keys, *engine.keys.values(), "between us"))


# ---------------------------------------------------------------- second tries


@pytest.mark.parametrize(
    ("said", "attempt"),
    [(None, 0), ("0", 0), ("1", 1), ("100", 100), ("101", 0), ("-1", 0), ("01", 0), ("1.0", 0), ("two", 0), ("", 0),
     ("9" * 400, 0)],
)
def test_a_client_says_how_often_it_has_tried(started: Starter, said: str | None, attempt: int) -> None:
    own = started()
    headers = {} if said is None else {"x-stainless-retry-count": said}
    with own.http(**headers) as client, own.http() as fresh:
        assert client.post(CHAT, json=body("again")).status_code == 200
        assert client.post(CHAT, json=body("again")).status_code == 200, "out of the memo"
        assert fresh.post(CHAT, json=body("again")).headers["x-doorbuster-tier"] == "exact", "no key depends on it"
        legacy = {"model": "default", "prompt": "again"}
        assert client.post("/v1/completions", json=legacy).status_code == 200
    assert own.stats().overload.retries.seen == 3 * bool(attempt)
    own.call(own.inside.flush)
    asked = [entry.event.attempt for entry in journal(own.folder) if isinstance(entry.event, Arrive)]
    assert asked == [attempt, attempt, 0, attempt]

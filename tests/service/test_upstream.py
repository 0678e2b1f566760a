"""A door before other people's servers: a second engine of ours as the upstream, and one that misbehaves on purpose.

Mutations it caught: the class's system prompt not sent; no seed, no stop strings; pieces counted as tokens; usage
forgotten; a cancelled request left running; retried after the first token; retried where it had just failed; never
retried; 429 as a failure; 4xx as a failure of the upstream; 401 as the request's own; an answer that stops in the
middle taken for a whole one; an error event passed over; a lost upstream never looked for; its open requests forgotten;
its window ignored; a new connection for each request; refused connections overlooked; affinity without events.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from engine.config import BreakerConfig, ClassConfig, ExactConfig, OverloadConfig, RouterConfig
from engine.errors import UserError
from engine.events import BreakerRecord, LedgerRecord, RequestRecord
from engine.service.upstream_pool import UpstreamPool
from engine.upstream_config import UpstreamConfig
from sim.twin.replay import replay_all
from tests.service.conftest import Starter
from tests.service.harness import CHAT, SCENARIO, STEP_20_MS, Engine, body, check_error, dial, start
from tests.service.rogue import WORDS, Mood, Rogue, rogue

NO_CACHE = ExactConfig(enabled=False, single_flight=False)
SURE = BreakerConfig(window="count", window_size=20, minimum_calls=20)  # does not open by accident
Doors = Callable[..., Engine]


@pytest.fixture
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Doors]:
    """``door(url, ..., window=, section=...)``: an engine whose replicas are these servers."""
    with ExitStack() as stack:
        def make(*urls: str, exact: ExactConfig = NO_CACHE, **changes: Any) -> Engine:
            names = UpstreamConfig.__struct_fields__
            config = {"health_ms": 200, "start_ms": 5000} | {n: changes.pop(n) for n in names if n in changes}
            upstreams = {f"u{n}": UpstreamConfig(url=url, **config) for n, url in enumerate(urls)}
            changes = {"breaker": SURE, **changes}
            return stack.enter_context(
                start(tmp_path_factory.mktemp("door"), upstreams=upstreams, replicas=len(urls), exact=exact, **changes)
            )

        yield make


@pytest.fixture
def bad() -> Iterator[Rogue]:
    with rogue() as server:
        yield server


@pytest.fixture
def good() -> Iterator[Rogue]:
    with rogue() as server:
        yield server


def pool_of(engine: Engine) -> UpstreamPool:
    pool = engine.inside.pool
    assert isinstance(pool, UpstreamPool)
    return pool


def records(engine: Engine) -> list[LedgerRecord]:
    engine.inside.flush()
    decode = msgspec.json.Decoder(LedgerRecord).decode
    return [*map(decode, (engine.folder / "ledger" / "records.ndjson").read_bytes().splitlines())]


def streamed(client: httpx.Client, text: str, **more: Any) -> tuple[str, list[dict[str, Any]]]:
    """All the text, and all events."""
    with client.stream("POST", CHAT, json=body(text, stream=True, **more)) as got:
        got.read()
        assert got.status_code == 200, got.text
    events = [json.loads(line[6:]) for line in got.text.splitlines() if line.startswith("data: {")]
    pieces = [c["delta"].get("content") or "" for e in events if "choices" in e for c in e["choices"]]
    return "".join(pieces), events


def ask(engine: Engine, text: str = "Is it so?", **more: Any) -> httpx.Response:
    with engine.http() as client:
        return client.post(CHAT, json=body(text, **more))


# ---------------------------------------------------------------- another engine of ours


def test_text_is_what_the_upstream_itself_says(
    started: Starter, door: Doors, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = started()
    monkeypatch.setenv("OTHER_KEY", other.keys["shop"])
    front = door(other.url, api_key_env="OTHER_KEY")
    assert front.inside.ready.model == "fake"
    cases: list[tuple[str, dict[str, Any]]] = [
        ("Where is my parcel?", {}), ("And the other?", {"max_tokens": 3}), ("Cut", {"stop": ["e", " t"]}),
    ]
    for text, more in cases:
        with other.http() as client:
            want = client.post(CHAT, json=body(text, **more)).json()
        with front.http() as client:
            assert client.post(CHAT, json=body(text, **more)).json()["choices"] == want["choices"]
            whole, events = streamed(client, text, stream_options={"include_usage": True}, **more)
        assert whole == want["choices"][0]["message"]["content"]
        for count in ("prompt_tokens", "completion_tokens"):
            assert events[-1]["usage"][count] == want["usage"][count], "as the upstream counts"
        assert events[-2]["choices"][0]["finish_reason"] == want["choices"][0]["finish_reason"]


def test_the_key_is_sent_and_a_missing_one_is_told_before_anything_starts(
    good: Rogue, door: Doors, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("A_KEY", "sesame")
    front = door(good.url, api_key_env="A_KEY")
    assert ask(front).status_code == 200
    assert b"authorization: Bearer sesame\r\n" in good.headers[0].replace(b"Authorization", b"authorization")
    monkeypatch.delenv("A_KEY")
    with pytest.raises(UserError, match="A_KEY is not set"):
        door(good.url, api_key_env="A_KEY")


def test_what_is_sent(good: Rogue, door: Doors) -> None:
    front = door(good.url)
    chat = {**body("Hello?"), "temperature": 0.5, "top_p": 0.9, "top_k": 7, "seed": 3, "stop": ["x"], "max_tokens": 5}
    with front.http() as client:
        assert client.post(CHAT, json=chat).status_code == 200
        assert client.post("/v1/completions", json={"model": "default", "prompt": "Once"}).status_code == 200
    with front.http("bank") as client:
        assert client.post(CHAT, json=body("Is it stolen?")).status_code == 200
    first, bare, fraud = good.asked
    common = {"model": "rogue-1", "stream": True, "stream_options": {"include_usage": True}}
    assert first == common | {
        "messages": [{"role": "user", "content": "Hello?"}], "temperature": 0.5, "top_p": 0.9, "top_k": 7, "seed": 3,
        "stop": ["x"], "max_tokens": 5,
    }
    assert bare == common | {"prompt": "Once", "temperature": 0, "max_tokens": 200}
    assert [turn["role"] for turn in fraud["messages"]] == ["system", "user"]
    assert "payment" in fraud["messages"][0]["content"], "the class's own prompt goes along"
    assert good.connections <= 2, "one for requests and one for looks are used again"


def test_a_client_that_leaves_is_hung_up_on_upstream(
    started: Starter, door: Doors, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before its first token and after it: nothing is computed for nobody, and the place here is free again."""
    other = started(STEP_20_MS)
    monkeypatch.setenv("OTHER_KEY", other.keys["shop"])
    front = door(other.url, api_key_env="OTHER_KEY", window=2, reserved=1)
    for reads in (True, False):
        with other.frozen() if not reads else ExitStack():
            line = dial_chat(front, "Tell me all", stream=True, max_tokens=200)
            if reads:
                assert b"200 OK" in line.recv(4096)
            other.waiting(1)
            line.close()
            front.quiet()
            other.until(lambda: other.inside.app.in_flight == 0)
        other.quiet()
        assert front.call(pool_of(front).stats)["u0"].running == 0
    rows = [r for r in records(front) if isinstance(r, RequestRecord)]
    assert [row.outcome for row in rows] == ["cancelled", "cancelled"]


def dial_chat(engine: Engine, text: str, **more: Any) -> socket.socket:
    data = json.dumps(body(text, **more)).encode()
    head = f"POST {CHAT} HTTP/1.1\nhost: x\nauthorization: Bearer {engine.keys['shop']}\ncontent-length: {len(data)}"
    return dial(engine, head, data)


def test_a_shared_prompt_stays_where_it_is_cached(bad: Rogue, good: Rogue, door: Doors) -> None:
    """Nobody says what these servers have cached; what was sent there is remembered."""
    front = door(bad.url, good.url)
    with front.http("bank") as client:
        for n in range(4):
            assert client.post(CHAT, json=body(f"Is payment {n} stolen?")).status_code == 200
    assert sorted([len(bad.asked), len(good.asked)]) == [0, 4]
    with front.http() as client:
        for n in range(4):
            assert client.post(CHAT, json=body(f"{n} parcels: where are they?")).status_code == 200
    assert min(len(bad.asked), len(good.asked)) >= 2, "calm traffic with nothing in common is spread"


# ---------------------------------------------------------------- who misbehaves


def test_the_official_protocol_with_all_that_others_add(good: Rogue, door: Doors) -> None:
    front = door(good.url)
    got = ask(front).json()
    assert got["choices"][0]["message"]["content"] == "".join(WORDS)
    assert got["usage"]["completion_tokens"] == 6
    assert got["usage"]["prompt_tokens_details"]["cached_tokens"] == 4
    good.mood = "no usage"
    assert ask(front).json()["usage"]["completion_tokens"] == 6, "without a word on it, pieces are counted"


@pytest.mark.parametrize(
    "mood", ["broken", "no key", "html", "garbage", "binary", "cut early", "closes", "redirects"]
)
def test_what_fails_before_the_first_token_is_computed_elsewhere_once(
    bad: Rogue, good: Rogue, door: Doors, mood: Mood
) -> None:
    front = door(bad.url, good.url)
    bad.mood = mood
    for n in range(4):
        assert ask(front, f"Is it {n}?").json()["choices"][0]["message"]["content"] == "".join(WORDS)
    assert len(bad.asked) >= 2 and len(good.asked) == 4, "each had been asked, and only one of them again"
    good.mood = mood
    check_error(ask(front), 503, "replica_lost")
    more = mood == "closes"  # on a kept connection that is no failure yet: it is sent again on a new one
    assert len(good.asked) == 5 + more, "once elsewhere, and no more"


def test_a_kept_connection_that_is_closed_as_it_is_written_to_is_no_failure(bad: Rogue, door: Doors) -> None:
    front = door(bad.url)
    bad.mood = "closes kept"
    for n in range(4):
        assert ask(front, f"Is it {n}?").json()["choices"][0]["message"]["content"] == "".join(WORDS)
    assert len(bad.asked) == 7, "each but the first was written to the connection before, and then to a new one"
    assert {r.replica for r in records(front) if isinstance(r, RequestRecord) and r.outcome == "served"} == {0}


@pytest.mark.parametrize("mood", ["cut", "error event", "no end"])
def test_what_fails_after_the_first_token_is_not_computed_again(
    bad: Rogue, good: Rogue, door: Doors, mood: Mood
) -> None:
    front = door(bad.url, good.url)
    bad.mood = good.mood = mood
    check_error(ask(front), 500, "model_failed")
    assert len(bad.asked) + len(good.asked) == 1
    with front.http() as client:
        text, events = streamed(client, "Is it so?")
    assert "".join(WORDS).startswith(text) and text
    assert events[-1]["error"]["code"] == "model_failed"
    assert len(bad.asked) + len(good.asked) == 2


def test_what_the_upstream_refuses_is_nobodys_failure(bad: Rogue, good: Rogue, door: Doors) -> None:
    front = door(bad.url, good.url)
    bad.mood = good.mood = "refuses"
    check_error(ask(front), 500, "model_failed")
    assert len(bad.asked) + len(good.asked) == 1, "the next one would refuse it too"
    fleet = front.stats().fleet
    assert sum(b.failed for b in fleet.breakers) == 0 and sum(b.silent for b in fleet.breakers) == 1


@pytest.mark.parametrize("mood", ["busy", "loading"])
def test_who_is_busy_is_asked_again_and_nobody_fails(bad: Rogue, door: Doors, mood: Mood) -> None:
    front = door(bad.url)
    bad.moods = [mood]
    assert ask(front).status_code == 200
    assert len(bad.asked) == 2
    stats = front.stats().fleet.breakers[0]
    assert (stats.failed, stats.ok) == (0, 1)
    assert pool_of(front).stats()["u0"].refused == 1


def test_who_stays_busy_sends_its_requests_elsewhere(bad: Rogue, good: Rogue, door: Doors) -> None:
    front = door(bad.url, good.url)
    bad.mood = "busy"
    for n in range(4):
        assert ask(front, f"Is it {n}?").status_code == 200
    good.mood = "busy"
    check_error(ask(front), 503, "upstream_busy")
    assert sum(b.failed for b in front.stats().fleet.breakers) == 0


def test_what_waits_for_a_busy_one_is_pressure(bad: Rogue, door: Doors) -> None:
    """The level rises though nothing failed: sheddable work learns of it."""
    chat = ClassConfig(criticality="standard", slo_ttft_ms=1000, max_tokens=200)
    front = door(bad.url, overload=OverloadConfig(), classes=SCENARIO.classes | {"chat": chat})
    bad.moods, bad.retry_after = ["busy"], b"30"
    got = ask(front)
    check_error(got, 504, "deadline_exceeded")
    assert front.call(lambda: front.inside.driver.machine.overload.stats()).rises >= 1


def test_silence_ends(bad: Rogue, good: Rogue, door: Doors) -> None:
    """Before the first token somebody else is asked; after it the client is told."""
    front = door(bad.url, good.url, silence_ms=300)
    bad.mood = "hangs"
    assert all(ask(front, f"Is it {n}?").status_code == 200 for n in range(2))
    assert len(bad.asked) == bad.closed >= 1, "hung up on, so that it need not go on"
    bad.mood = good.mood = "silent"
    check_error(ask(front), 500, "model_failed")


def test_no_more_than_its_window_is_sent_and_critical_passes(bad: Rogue, door: Doors) -> None:
    front = door(bad.url, window=3, reserved=1)
    bad.mood = "hangs"
    with ThreadPoolExecutor(8) as threads:
        others = [threads.submit(ask, front, f"Is it {n}?") for n in range(5)]
        front.waiting(5)
        front.until(lambda: pool_of(front).stats()["u0"].running == 2)
        with front.http("bank") as client:
            fraud = threads.submit(client.post, CHAT, json=body("Is it stolen?"))
            front.until(lambda: bad.open == 3)
            bad.mood = "well"
            bad.release()
            assert fraud.result().status_code == 200
        assert [other.result().status_code for other in others] == [200] * 5
    assert bad.most_open == 3


def test_one_that_dies_is_lost_and_one_that_comes_back_is_found(bad: Rogue, good: Rogue, door: Doors) -> None:
    front = door(bad.url, good.url)
    bad.away = True
    front.until(lambda: pool_of(front).up == (1,))
    assert front.stats().fleet.up == (1,)
    assert all(ask(front, f"Is it {n}?").status_code == 200 for n in range(3))
    assert not bad.asked
    good.away = True
    front.until(lambda: pool_of(front).up == ())
    check_error(ask(front), 503, "replica_lost")
    with front.http(None) as client:
        check_error(client.get("/readyz"), 503, "replica_lost")
    bad.away = False
    front.until(lambda: pool_of(front).up == (0,))
    assert ask(front).status_code == 200 and len(bad.asked) == 1


def test_refused_connections_tell_of_a_death_before_the_next_look(bad: Rogue, good: Rogue, door: Doors) -> None:
    front = door(bad.url, good.url, health_ms=60_000)
    bad.kill()
    assert [ask(front, f"Is it {n}?").status_code for n in range(8)] == [200] * 8
    assert front.stats().fleet.up == pool_of(front).up == (1,)
    assert not bad.asked


def test_a_server_that_talks_is_there_however_its_looks_go(bad: Rogue, door: Doors) -> None:
    """Eight looks go wrong in a row while tokens come; three are enough once they do not."""
    front = door(bad.url)
    bad.mood = "chatty"
    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(ask, front)
        front.until(lambda: bad.open == 1)
        bad.away, bad.looks = True, 0
        front.until(lambda: bad.looks >= 8)
        assert pool_of(front).up == (0,)
        bad.release()
        assert asked.result().status_code == 200
        front.until(lambda: not pool_of(front).up)


def test_a_silent_server_that_misses_its_looks_is_lost_with_all_it_has(bad: Rogue, door: Doors) -> None:
    front = door(bad.url, silence_ms=10_000)
    bad.mood = "silent"
    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(ask, front)
        front.until(lambda: bad.open == 1)
        bad.away = True
        front.until(lambda: not pool_of(front).up)
        check_error(asked.result(), 503, "replica_lost")
    front.until(lambda: bad.closed == 1)  # its own thread hears of it a moment later


def test_killed_in_the_middle_everybody_gets_an_answer(door: Doors) -> None:
    """Streams that had begun end with an error, the rest with the other one's answer; the breaker opens."""
    chat = msgspec.structs.replace(SCENARIO.classes["chat"], max_tokens=40)
    with rogue() as one, rogue() as two:
        front = door(
            one.url, two.url, window=4, reserved=1, health_ms=60_000, classes=SCENARIO.classes | {"chat": chat},
            breaker=BreakerConfig(window="count", window_size=10, minimum_calls=4, open_ms=60_000),
            router=RouterConfig(stale_ms=0),
        )
        one.mood = two.mood = "silent"
        with ThreadPoolExecutor(24) as threads:
            asked = [threads.submit(ask, front, f"Is it {n}?") for n in range(16)]
            front.until(lambda: one.open == two.open == 3)
            two.mood = "well"
            one.mood = "closes"
            one.kill()
            two.release()
            codes = [got.result() for got in asked]
            later = [threads.submit(ask, front, f"And {n}?").result().status_code for n in range(8)]
        begun = [got for got in codes if got.status_code != 200]
        for got in begun:
            check_error(got, 500, "model_failed")
        assert len(begun) == 3, "who had a first token from the one that died"
        assert later == [200] * 8
        moves = [r for r in records(front) if isinstance(r, BreakerRecord)]
        assert {(r.boundary, r.after) for r in moves} == {("replica-0", "open")}
        rows = [r for r in records(front) if isinstance(r, RequestRecord)]
        assert len(rows) == 24 and all(r.replica == 1 for r in rows if r.outcome == "served")
        front.quiet()
    front.inside.flush()
    found = replay_all(front.folder)
    assert sorted(Path(one.journal).stem for one in found) == ["gateway-0", "lane-0", "lane-1"]
    assert all(one.identical for one in found)


def test_a_door_before_nothing_says_so(door: Doors, bad: Rogue) -> None:
    bad.away = True
    with pytest.raises(UserError) as told:
        door(bad.url, "http://127.0.0.1:9", start_ms=300)
    assert told.value.what == "no upstream answers"
    assert "/v1/models says 503" in told.value.why and "ConnectError" in told.value.why

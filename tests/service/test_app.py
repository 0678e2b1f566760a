"""The HTTP face of a real engine: what the official client gets, headers, and every refusal that costs no work."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from engine.errors import RequestError
from engine.events import Arrive, Ended
from engine.ledger.journal import open_journal
from engine.service.exchange import LINGER_BYTES, Exchange
from engine.service.facts import FactMaker
from sim.twin.replay import replay
from tests.service.conftest import Starter
from tests.service.harness import CHAT, SCENARIO, STEP_20_MS, Engine, body, check_error, dial, journal, start

MOST = SCENARIO.ingress.max_body_bytes


# ---------------------------------------------------------------- answers


def test_the_official_client_gets_the_same_text_streamed_and_whole(engine: Engine) -> None:
    text = "Would the blue kettle fit on a small stove? Ask for me: grüße, 😀 and thanks."
    with engine.official() as client:
        whole = client.chat.completions.create(**body(text), max_tokens=100)
        events = list(
            client.chat.completions.create(
                **body(text), max_tokens=101, stream=True, stream_options={"include_usage": True}
            )
        )
    assert whole.choices[0].message.content == text
    assert "".join(e.choices[0].delta.content or "" for e in events if e.choices) == text
    assert events[0].choices[0].delta.role == "assistant"
    assert [e.choices[0].finish_reason for e in events if e.choices][-1] == whole.choices[0].finish_reason == "stop"
    assert whole.usage is not None and events[-1].usage is not None and not events[-1].choices
    assert events[-1].usage.completion_tokens == whole.usage.completion_tokens > 10
    assert events[-1].usage.prompt_tokens == whole.usage.prompt_tokens > 10
    assert whole.model == events[0].model == "fake" and whole.id.startswith("chatcmpl-")


def test_an_answer_at_its_limit_says_length(engine: Engine) -> None:
    with engine.official() as client:
        got = client.chat.completions.create(**body("a rather long question about shoes"), max_completion_tokens=3)
    assert got.choices[0].finish_reason == "length"
    assert got.usage is not None and got.usage.completion_tokens == 3


def test_cached_prompt_tokens_are_reported(engine: Engine) -> None:
    """The class's pinned prompt is computed once; its second asker reads it from the prefix cache."""
    with engine.official("bank") as client:
        usages = [client.chat.completions.create(**body(text)).usage for text in ("card 1 of 9", "card 2 of 9")]
    cached = [u.prompt_tokens_details.cached_tokens for u in usages if u and u.prompt_tokens_details]
    assert cached[1] > 100 and cached[1] % 16 == 0


def test_models_answer_to_their_name_and_to_default(engine: Engine) -> None:
    with engine.official() as client:
        assert [model.id for model in client.models.list()] == ["fake", "default"]
        for name in ("fake", "default"):
            assert client.chat.completions.create(**body(f"hi {name}") | {"model": name}).model == "fake"


def test_an_exact_repeat_says_where_and_when_it_was_computed(engine: Engine) -> None:
    with engine.http() as client:
        ask = body("what is it that you repeat?")
        first = client.post(CHAT, json=ask, headers={"x-request-id": "the.First_1-x"})
        again = client.post(CHAT, json=ask)
        streamed = client.post(CHAT, json={**ask, "stream": True})
    assert (first.headers["x-doorbuster-tier"], first.headers["x-request-id"]) == ("model", "the.First_1-x")
    assert "x-doorbuster-age-s" not in first.headers and "x-doorbuster-source" not in first.headers
    for got in (again, streamed):
        assert got.headers["x-doorbuster-tier"] == "exact" and got.headers["x-doorbuster-level"] == "0"
        assert got.headers["x-doorbuster-source"] == "the.First_1-x"
        assert re.fullmatch(r"\d+\.\d{3}", got.headers["x-doorbuster-age-s"])
        assert got.headers["x-request-id"] != "the.First_1-x"
    assert again.json()["choices"] == first.json()["choices"]
    assert streamed.text.endswith("data: [DONE]\n\n")


def test_a_sample_without_a_seed_is_never_repeated_from_a_cache(engine: Engine) -> None:
    with engine.http() as client:
        tiers = [
            client.post(CHAT, json=body("throw the dice", temperature=0.8, **more)).headers["x-doorbuster-tier"]
            for more in ({}, {}, {"seed": 5}, {"seed": 5}, {"seed": 5, "top_k": 3}, {"seed": 5, "top_k": 4})
        ]
    assert tiers == ["model", "model", "model", "exact", "model", "model"]


def test_an_answer_ends_before_its_stop_string_streamed_and_whole(engine: Engine) -> None:
    text = "Three kettles. One is blue, grüße 😀. STOP here and say no more of it"
    with engine.official() as client:
        whole = client.chat.completions.create(**body(text), max_tokens=100, stop=["STOP here", "never"])
        events = list(client.chat.completions.create(**body(text), max_tokens=101, stop=" STOP", stream=True))
        bare = client.completions.create(model="default", prompt=text, stop="no", max_tokens=100)
        free = client.chat.completions.create(**body(text), max_tokens=100)
    assert whole.choices[0].message.content == text[: text.index("STOP")]
    assert "".join(e.choices[0].delta.content or "" for e in events) == text[: text.index(" STOP")]
    assert not any(" S" in (e.choices[0].delta.content or "") for e in events), "nothing that may be taken back"
    assert whole.choices[0].finish_reason == events[-1].choices[0].finish_reason == "stop"
    assert "no" not in bare.choices[0].text and free.choices[0].message.content == text
    assert whole.usage is not None and free.usage is not None
    assert 0 < whole.usage.completion_tokens < free.usage.completion_tokens


def test_an_answer_that_was_cut_is_kept_as_it_was_cut_and_for_its_stop_strings_alone(engine: Engine) -> None:
    with engine.http() as client:
        asks = [("b", "zz"), ("zz", "b", "b"), (), ("c",)]  # order and repetition make no difference
        got = [client.post(CHAT, json=body("what is kept, a or b or c?", stop=list(stops))) for stops in asks]
    tiers = [one.headers["x-doorbuster-tier"] for one in got]
    assert tiers == ["model", "exact", "model", "model"]
    said = [one.json()["choices"][0]["message"]["content"] for one in got]
    assert said == ["what is kept, a or "] * 2 + ["what is kept, a or b or c?", "what is kept, a or b or "]
    assert got[0].json()["usage"] == got[1].json()["usage"]


def test_a_stop_string_ends_the_work_of_the_replica_too(tmp_path: Path) -> None:
    """The replica gives up at once, long before the answer's own end; the record says what the client got."""
    text = "one two END " + "and so on " * 30
    with start(tmp_path, STEP_20_MS) as engine, engine.http() as client:
        got = client.post(CHAT, json=body(text, stop="END")).json()
        engine.quiet()
    assert got["choices"][0]["message"]["content"] == "one two " and got["choices"][0]["finish_reason"] == "stop"
    (ended,) = (entry.event for entry in journal(tmp_path) if isinstance(entry.event, Ended))
    assert (ended.reason, ended.output_tokens) == ("stop", got["usage"]["completion_tokens"])
    replica = list(open_journal(tmp_path / "journal" / "replica-0.ndjson").entries())
    (theirs,) = (action for entry in replica for action in entry.actions if isinstance(action, Ended))
    assert theirs.reason == "aborted" and theirs.output_tokens <= ended.output_tokens + 3
    for name in ("gateway-0", "replica-0"):
        assert replay(tmp_path / "journal" / f"{name}.ndjson").identical


@pytest.mark.parametrize("bad", ["", "two words", "x" * 65, "a/b", "semi;colon"])
def test_a_request_id_that_could_hurt_a_log_is_replaced(engine: Engine, bad: str) -> None:
    with engine.http() as client:
        got = client.get("/healthz", headers={"x-request-id": bad}).headers["x-request-id"]
    assert re.fullmatch(r"req-[0-9a-f]{32}", got)


def test_fifty_who_ask_the_same_at_once_cost_one_computation(started: Starter) -> None:
    engine = started()
    ask = body("does anybody else want the same kettle?")

    async def crowd() -> list[httpx.Response]:
        key = {"authorization": f"Bearer {engine.keys['shop']}"}
        async with httpx.AsyncClient(base_url=engine.url, headers=key, timeout=20, trust_env=False) as client:
            return await asyncio.gather(*(client.post(CHAT, json={**ask, "stream": i % 2 == 1}) for i in range(50)))

    with ThreadPoolExecutor(1) as pool:
        with engine.frozen():
            asked = pool.submit(asyncio.run, crowd())
            engine.waiting(50)
        answers = asked.result()
    assert {got.status_code for got in answers} == {200}
    assert Counter(got.headers["x-doorbuster-tier"] for got in answers) == {"model": 1, "coalesced": 49}
    assert all("same kettle?" in got.text for got in answers[::2])
    leader = next(got for got in answers if got.headers["x-doorbuster-tier"] == "model")
    followers = [got for got in answers[::2] if got is not leader]
    assert {got.headers["x-doorbuster-source"] for got in followers} == {leader.headers["x-request-id"]}
    stats = engine.stats()
    assert (stats.arrived, stats.ended, stats.flights.attached) == (50, 50, 49)


# ---------------------------------------------------------------- refusals that cost nothing


Case = tuple[dict[str, Any], int, str, str | None]
REFUSED: dict[str, Case] = {
    "no key": ({"tenant": None}, 401, "unauthorized", None),
    "wrong key": ({"tenant": None, "headers": {"authorization": "Bearer db-wrong"}}, 401, "unauthorized", None),
    "malformed JSON": ({"content": b'{"model": "fake", "messages": ['}, 400, "invalid_request", None),
    "no JSON at all": ({"content": b"\x00\xff"}, 400, "invalid_request", None),
    "empty body": ({"content": b""}, 400, "invalid_request", None),
    "unknown field": ({"json": body("x", tempratur=1)}, 400, "invalid_request", "tempratur"),
    "wrong type": ({"json": body("x", max_tokens="5")}, 400, "invalid_request", "max_tokens"),
    "not honoured": ({"json": body("x", n=2)}, 400, "invalid_request", "n"),
    "over the context": ({"json": body("shoe " * 600)}, 400, "context_length_exceeded", "messages"),
    "class not granted": (
        {"json": body("x"), "headers": {"x-doorbuster-class": "fraud"}}, 403, "forbidden", "x-doorbuster-class",
    ),
    "unknown class": (
        {"json": body("x"), "headers": {"x-doorbuster-class": "vip"}}, 400, "invalid_request", "x-doorbuster-class",
    ),
    "unknown model": ({"json": {**body("x"), "model": "gpt-9"}}, 404, "not_found", "model"),
    "wrong method": ({"method": "GET"}, 405, "method_not_allowed", None),
    "unknown path": ({"path": "/v1/completion", "json": body("x")}, 404, "not_found", None),
    "too large": ({"content": b" " * (MOST + 1)}, 413, "body_too_large", None),
    "far too large": ({"content": b" " * 3_000_000}, 413, "body_too_large", None),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_request_is_refused_in_words_and_does_no_work(engine: Engine, name: str) -> None:
    ask, status, code, param = REFUSED[name]
    before = engine.stats()
    with engine.http(ask.get("tenant", "shop")) as client:
        got = client.request(
            ask.get("method", "POST"), ask.get("path", CHAT), json=ask.get("json"), content=ask.get("content"),
            headers=ask.get("headers"),
        )
        check_error(got, status, code, param)
        assert client.get("/healthz").status_code == 200
    assert engine.stats() == before
    engine.quiet()


def test_refusals_name_what_would_have_been_right(engine: Engine) -> None:
    with engine.http() as client:
        got = client.get(CHAT)
        assert got.headers["allow"] == "POST" and "POST" in check_error(got, 405, "method_not_allowed")
        got = client.post("/v1/models")
        assert got.headers["allow"] == "GET, HEAD"
        assert CHAT in check_error(client.get("/v2"), 404, "not_found")
        got = client.post(CHAT, json=body("x"), headers={"x-doorbuster-class": "vip"})
        assert "chat, fraud, hasty" in check_error(got, 400, "invalid_request", "x-doorbuster-class")
        got = client.post(CHAT, json={**body("x"), "model": "gpt-9"})
        assert "fake or default" in check_error(got, 404, "not_found", "model")
        assert "byte 10" in check_error(client.post(CHAT, content=b'{"model": }'), 400, "invalid_request")
    with engine.http(None) as client:
        for path in (CHAT, "/v1/models"):
            got = client.request("POST" if path == CHAT else "GET", path)
            assert got.headers["www-authenticate"] == "Bearer"
            check_error(got, 401, "unauthorized")


def test_the_official_client_raises_its_own_errors(engine: Engine) -> None:
    with engine.official() as client:
        with pytest.raises(openai.BadRequestError) as bad:
            client.chat.completions.create(**body("x"), n=2)
        assert (bad.value.code, bad.value.param) == ("invalid_request", "n")
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(**body("x") | {"model": "other"})
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="db-wrong").chat.completions.create(**body("x"))


def pieces(size: int, count: int) -> Iterator[bytes]:
    for _ in range(count):
        yield b" " * size


def test_a_chunked_body_is_cut_off_at_the_limit(engine: Engine) -> None:
    before = engine.stats().arrived
    with engine.http() as client:
        got = client.post(CHAT, content=pieces(1000, MOST // 1000 + 1))
        assert str(MOST) in check_error(got, 413, "body_too_large")
        check_error(client.post(CHAT, content=pieces(1000, 2000)), 413, "body_too_large")
        check_error(client.post(CHAT, content=pieces(1000, MOST // 1000)), 400, "invalid_request")  # just fits
        check_error(client.post(CHAT, content=b" " * MOST), 400, "invalid_request")
    assert engine.stats().arrived == before
    engine.quiet()


def test_a_client_that_hears_nothing_while_it_speaks_hears_the_refusal_all_the_same(engine: Engine) -> None:
    """asyncio drops what it has received when it cannot write: hanging up on such a client would hide the answer."""

    async def speak() -> set[int]:
        key = {"authorization": f"Bearer {engine.keys['shop']}"}
        async with httpx.AsyncClient(base_url=engine.url, headers=key, timeout=20, trust_env=False) as client:
            return {(await client.post(CHAT, content=b" " * 3_000_000)).status_code for _ in range(20)}

    assert asyncio.run(speak()) == {413}


def test_a_body_without_end_is_hung_up_on(engine: Engine) -> None:
    head = f"POST {CHAT} HTTP/1.1\nhost: x\nauthorization: Bearer {engine.keys['shop']}\n"
    for more in ("transfer-encoding: chunked", f"content-length: {100 * LINGER_BYTES}"):
        with dial(engine, head + more, b"5000\r\n" + b" " * 0x5000 + b"\r\n") as line:
            answer = hear_out(line)
        assert answer.startswith(b"HTTP/1.1 413") and b"\r\nconnection: close\r\n" in answer


@pytest.mark.parametrize("declared", [True, False])
def test_no_byte_is_taken_in_past_the_limit(declared: bool) -> None:
    """On the ASGI interface itself: how much is asked for before the refusal."""
    taken = 0

    async def receive() -> dict[str, Any]:
        nonlocal taken
        taken += 400
        return {"type": "http.request", "body": b" " * 400, "more_body": True}

    async def send(message: dict[str, Any]) -> None:
        raise AssertionError(message)

    headers = [(b"content-length", b"1001")] if declared else []
    exchange = Exchange({"path": CHAT, "method": "POST", "headers": headers}, receive, send, 0)
    with pytest.raises(RequestError) as caught:
        asyncio.run(exchange.body(1000))
    assert caught.value.code == "body_too_large"
    assert taken == (0 if declared else 1200)


def hear_out(line: socket.socket) -> bytes:
    out = b""
    while data := line.recv(65536):
        out += data
    return out


@pytest.mark.parametrize(
    ("key", "size", "status"), [("good", 10 * MOST, b"413"), ("bad", 500, b"401"), ("bad", 10 * MOST, b"401")]
)
def test_who_waits_to_be_asked_for_a_body_is_refused_without_it(
    engine: Engine, key: str, size: int, status: bytes
) -> None:
    """"Expect: 100-continue": nobody asks for a body that is not wanted, and the connection is not kept for it."""
    key = engine.keys["shop"] if key == "good" else "db-wrong"
    with dial(
        engine,
        f"POST {CHAT} HTTP/1.1\nhost: x\nauthorization: Bearer {key}\nexpect: 100-continue\ncontent-length: {size}",
    ) as line:
        answer = hear_out(line)
    assert answer.startswith(b"HTTP/1.1 " + status) and b"\r\nconnection: close\r\n" in answer


def test_a_client_that_leaves_while_it_still_speaks_costs_nothing(engine: Engine) -> None:
    before = engine.stats()
    said = json.dumps(body("I have said it all, but for a blank")).encode()  # so that it could be taken for whole
    head = f"POST {CHAT} HTTP/1.1\nhost: x\nauthorization: Bearer {engine.keys['shop']}\n"
    line = dial(engine, f"{head}content-length: {len(said) + 1}", said)
    engine.until(lambda: engine.inside.app.in_flight == 1)
    line.close()
    engine.quiet()
    assert engine.stats() == before


def test_a_bug_is_told_by_its_number_only(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("secret detail")

    monkeypatch.setattr(FactMaker, "arrive", broken)
    with engine.http() as client:
        got = client.post(CHAT, json=body("x"), headers={"x-request-id": "bug-7"})
        assert "bug-7" in check_error(got, 500, "internal_error")
        assert "secret" not in got.text and "ZeroDivision" not in got.text
    assert "request bug-7 failed" in caplog.text and "secret detail" in caplog.text
    engine.quiet()


def test_the_journal_holds_what_passed_and_nothing_else(tmp_path: Path) -> None:
    with start(tmp_path) as engine, engine.http() as client:
        client.post(CHAT, json=body("shoe " * 600))
        client.post(CHAT, json=body("x", n=2))
        client.post(CHAT, json=body("good"), headers={"x-request-id": "good-1"})
        client.post(CHAT, content=b"{")
    arrived = [entry.event for entry in journal(tmp_path) if isinstance(entry.event, Arrive)]
    assert [event.request_id for event in arrived] == ["good-1"]



"""Answers on their way: pieces as they come, refusals after the first, and clients that hang up at any moment."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from engine.events import Abort, Cancel, Ended, Pressure, Record, RequestRecord
from engine.ledger.journal import GatewayEntry
from engine.service.sse import Listener
from engine.service.stream import ClientStream
from tests.service.harness import CHAT, STEP_20_MS, Engine, body, dial, journal, start

LONG = "please repeat after me: " + "shoe and hat and " * 12 + "done"  # some 80 tokens, 1.6 s at 20 ms each


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with start(tmp_path_factory.mktemp("slow"), STEP_20_MS) as engine:
        yield engine


def events(got: httpx.Response) -> Iterator[Any]:
    """Data of each event as it comes; "[DONE]" as text."""
    for line in got.iter_lines():
        if line:
            data = line.removeprefix("data: ")
            yield data if data == "[DONE]" else json.loads(data)


def text_of(event: dict[str, Any]) -> str:
    return "".join(choice["delta"].get("content", "") for choice in event["choices"])


def test_text_is_sent_as_it_comes(slow: Engine) -> None:
    with slow.http() as client, client.stream("POST", CHAT, json=body(LONG, stream=True)) as got:
        assert got.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert got.headers["cache-control"] == "no-store"
        coming = events(got)
        role, first = next(coming), next(coming)
        assert role["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        assert 0 < len(text_of(first)) < len(LONG)
        assert slow.stats().in_flight == 1  # so it is not over yet
        rest = list(coming)
    assert text_of(first) + "".join(text_of(event) for event in rest[:-1]) == LONG
    assert rest[-1] == "[DONE]" and rest[-2]["choices"][0]["finish_reason"] == "stop"
    slow.quiet()


def test_a_deadline_in_the_middle_of_a_stream_is_an_event(slow: Engine) -> None:
    ask = body(LONG, stream=True)
    with slow.http(**{"x-doorbuster-class": "hasty"}) as client, client.stream("POST", CHAT, json=ask) as got:
        assert got.status_code == 200
        *said, last = list(events(got))
    assert said and all("choices" in event for event in said)
    assert last["error"]["code"] == "deadline_exceeded" and last["error"]["type"] == "server_error"
    with slow.official() as official, pytest.raises(openai.APIError, match="within the time"):
        list(official.chat.completions.create(**ask, extra_headers={"x-doorbuster-class": "hasty"}))
    slow.quiet()


def outcome(entries: list[GatewayEntry]) -> dict[str, str]:
    """Request id to how the record says that it ended."""
    records = [a.record for entry in entries for a in entry.actions if isinstance(a, Record)]
    return {r.request_id: r.outcome for r in records if isinstance(r, RequestRecord)}


def test_a_client_that_hangs_up_stops_the_work_and_frees_its_blocks(tmp_path: Path) -> None:
    """In the middle of a stream: Cancel, Abort, and the replica has all its blocks again; long before the end."""
    with start(tmp_path, STEP_20_MS) as engine, engine.http() as client:
        with client.stream("POST", CHAT, json=body(LONG, stream=True), headers={"x-request-id": "leaver"}) as got:
            coming = events(got)
            assert text_of(next(coming)) == "" and text_of(next(coming)) != ""
        engine.quiet()
        stays = client.post(CHAT, json=body("I stay"), headers={"x-request-id": "stayer"})
        assert stays.status_code == 200
        engine.quiet()
    entries = journal(tmp_path)
    cancelled = next(entry for entry in entries if isinstance(entry.event, Cancel))
    aborts = [action for action in cancelled.actions if isinstance(action, Abort)]
    ends = [entry.event for entry in entries if isinstance(entry.event, Ended)]
    assert [abort.sid for abort in aborts] == [ends[0].sid]
    assert ends[0].reason == "aborted" and 0 < ends[0].output_tokens < 60
    assert outcome(entries) == {"leaver": "cancelled", "stayer": "served"}
    pressures = [entry.event for entry in entries if isinstance(entry.event, Pressure)]
    assert min(pressure.free_blocks for pressure in pressures) < pressures[-1].free_blocks == 1024


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_before_the_first_token_is_noticed(tmp_path: Path, stream: bool) -> None:
    with start(tmp_path) as engine:
        with engine.frozen():
            client = socket_request(engine, body("never mind", stream=stream))
            engine.waiting(1)
            client.close()
            engine.until(lambda: engine.inside.app.in_flight == 0)  # the ingress is done while the worker is frozen
        engine.quiet()
    entries = journal(tmp_path)
    assert [type(entry.event) for entry in entries if isinstance(entry.event, Cancel)] == [Cancel]
    assert list(outcome(entries).values()) == ["cancelled"]


def test_one_of_two_who_hangs_up_does_not_stop_the_other(tmp_path: Path) -> None:
    with start(tmp_path) as engine, ThreadPoolExecutor(1) as pool, engine.http() as client:
        with engine.frozen():
            leader = socket_request(engine, body("we both want it"))
            engine.waiting(1)
            follower = pool.submit(client.post, CHAT, json=body("we both want it"))
            engine.waiting(2)
            leader.close()
            engine.until(lambda: engine.inside.app.in_flight == 1)
        got = follower.result()
        assert got.json()["choices"][0]["message"]["content"] == "we both want it"
        assert got.headers["x-doorbuster-tier"] == "coalesced"
        engine.quiet()
    assert not [a for entry in journal(tmp_path) for a in entry.actions if isinstance(a, Abort)]


@pytest.mark.parametrize("stream", [True, False])
def test_nothing_is_said_to_a_client_that_has_gone(slow: Engine, stream: bool) -> None:
    """On the ASGI interface, because uvicorn would swallow it, and another server might complain."""
    said: list[dict[str, Any]] = []
    ask = json.dumps(body(f"words for nobody {stream}", stream=stream)).encode()
    heard: list[dict[str, Any]] = [{"type": "http.disconnect"}, {"type": "http.request", "body": ask}]

    async def receive() -> dict[str, Any]:
        return heard.pop()

    async def send(message: dict[str, Any]) -> None:
        said.append(message)

    headers = [(b"authorization", b"Bearer " + slow.keys["shop"].encode())]
    scope = {"type": "http", "path": CHAT, "method": "POST", "headers": headers}
    asyncio.run_coroutine_threadsafe(slow.inside.app(scope, receive, send), slow.loop).result(20)
    assert not said and not heard
    slow.quiet()


def socket_request(engine: Engine, ask: dict[str, Any]) -> socket.socket:
    """A request on a connection of its own that a test can drop."""
    data = json.dumps(ask).encode()
    head = f"POST {CHAT} HTTP/1.1\nhost: x\nauthorization: Bearer {engine.keys['shop']}\ncontent-length: {len(data)}"
    return dial(engine, head, data)


# ---------------------------------------------------------------- the listener alone, on a loop of the test's own


def listening(leave_with: BaseException | None = None, hang_up: bool = False) -> tuple[list[int], int, str]:
    """What a listener did when it was left: cancelled rids, tasks left over, and what was read."""
    cancelled: list[int] = []

    async def receive() -> dict[str, Any]:
        if not hang_up:
            await asyncio.Event().wait()  # a client that stays, whatever happens
        return {"type": "http.disconnect"}

    async def scene() -> tuple[list[int], int, str]:
        stream = ClientStream(5, "r")
        stream.push("half", 1)
        text = ""
        with contextlib.suppress(ZeroDivisionError, asyncio.CancelledError):
            async with asyncio.timeout(10), Listener(stream, receive, cancelled.append) as listener:
                text = (await listener.read()).text
                if hang_up:
                    text += (await listener.read()).text
                if leave_with is not None:
                    raise leave_with
        return cancelled, len(asyncio.all_tasks()) - 1, text

    return asyncio.run(scene())


@pytest.mark.parametrize("leave_with", [None, ZeroDivisionError(), asyncio.CancelledError()])
def test_a_listener_that_is_left_cancels_and_leaves_no_task(leave_with: BaseException | None) -> None:
    cancelled, tasks, text = listening(leave_with)
    assert (set(cancelled), tasks, text) == ({5}, 0, "half")


def test_a_hang_up_wakes_the_reader() -> None:
    cancelled, tasks, text = listening(hang_up=True)
    assert (set(cancelled), tasks, text) == ({5}, 0, "half")

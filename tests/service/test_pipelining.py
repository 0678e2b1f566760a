"""A request that is late behind one that is being answered: who was in time is answered, whoever is to blame for what.

Caught: a slow head, or a slow body, that takes the answer before it along; a deadline for bytes that the server does
not take, and none left when it does again.
"""

from __future__ import annotations

import asyncio
import json
from functools import partial
from typing import Any

import pytest
import uvicorn
from msgspec.structs import replace

from engine.ingress_config import IngressConfig
from engine.service.connections import Connections
from engine.service.protocol import GuardedProtocol
from tests.service.conftest import Starter
from tests.service.harness import SCENARIO, STEP_20_MS, Engine
from tests.service.test_hostile import chat, converse, statuses

QUICK = replace(SCENARIO.ingress, header_ms=300, keep_alive_ms=600, write_stall_ms=400, receipt_ms=300)
LONG = "word " * 60  # 1.2 s of 20 ms steps
WITHIN_S = 20.0


@pytest.fixture
def patient(started: Starter) -> Engine:
    """Its answers take longer than any of its deadlines."""
    return started(STEP_20_MS, ingress=QUICK)


@pytest.mark.parametrize(
    ("late", "code"),
    [(b"GET /readyz HT", "headers_too_slow"), (b"POST /v1/models HTTP/1.1\r\nhost: x\r\n", "headers_too_slow"),
     (b"", "body_too_slow")],
)  # fmt: skip
def test_who_is_late_takes_nothing_from_the_answer_before(patient: Engine, late: bytes, code: str) -> None:
    """That answer is whole, and the connection is closed after it; the late one never was a request."""
    heard = converse(patient, chat(patient, LONG, request_id="first") + (late or chat(patient, "and then?")[:-5]))
    head, _, data = heard.partition(b"\r\n\r\n")
    assert statuses(heard) == [200] and b"connection: close" in head and b"x-request-id: first" in head
    assert json.loads(data)["choices"][0]["finish_reason"] in ("stop", "length")
    patient.quiet()
    with patient.http() as client:
        assert f'doorbuster:ingress_refusals_total{{reason="{code}"}} 1.0' in client.get("/metrics").text


def test_those_between_are_answered_too(patient: Engine) -> None:
    asked = [chat(patient, LONG + name, request_id=name) for name in ("first", "second")]
    heard = converse(patient, b"".join(asked) + chat(patient, "and then?")[:-5])
    assert statuses(heard) == [200, 200] and b"x-request-id: second" in heard and heard.endswith(b"}")
    patient.quiet()


def test_bytes_that_the_server_does_not_take_are_not_late() -> None:
    """Behind an application that listens to nobody; when it is done, the body still has all of its time."""
    free = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["method"] == "GET":
            await free.wait()
        else:
            while (await receive())["more_body"]:
                pass
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    async def scene() -> None:
        limits = IngressConfig(header_ms=50, receipt_ms=2_000, keep_alive_ms=5_000)
        config = uvicorn.Config(app, ws="none", lifespan="off", log_level="warning", access_log=False)
        connections, state = Connections(limits), uvicorn.server.ServerState()
        make = partial(GuardedProtocol, connections, config=config, server_state=state, app_state={})
        server = await asyncio.get_running_loop().create_server(make, "127.0.0.1", 0)
        async with server, asyncio.timeout(WITHIN_S):
            reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\nPOST / HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\n\r\nab")
            await _until(lambda: any(_paused(each) for each in connections))
            (connection,) = connections
            for _ in range(2):  # twice its time is over, and twice that is no fault of the client's
                connection.deadline_s = before_s = asyncio.get_running_loop().time()
                await _until(lambda before_s=before_s: connection.deadline_s > before_s)
            free.set()
            assert (await reader.readuntil(b"ok")).startswith(b"HTTP/1.1 200")
            left_s = connection.deadline_s - asyncio.get_running_loop().time()
            assert left_s > limits.header_ms / 1000, "a body's time, not a head's"
            writer.write(b"cde")
            assert (await reader.readuntil(b"ok")).startswith(b"HTTP/1.1 200")
            writer.close()

    asyncio.run(scene())


def _paused(connection: Any) -> bool:
    return bool(connection.flow.read_paused)


async def _until(true: Any) -> None:
    while not true():
        await asyncio.sleep(0.001)

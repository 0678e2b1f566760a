"""The load generator against a server that breaks off, ends early or talks nonsense: one request lost, never the run.

Run: python -m pytest tests/sim/test_loadgen.py -q
Mutations it caught: a break after the headers that raises; a status of 200 turned into 0; a stream without its last
word that counts as served; a lateness warning at the median.
"""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from engine.units import MS_NS
from sim.bare_load import client_frame
from sim.loadgen import Seen, late_warning, play
from sim.twin.workload import Request

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nx-doorbuster-tier: model\r\nx-doorbuster-level: 1\r\n"
CHUNKED = HEAD + b"transfer-encoding: chunked\r\n\r\n"
CLOSED = HEAD + b"connection: close\r\n\r\n"
WORD = b'data: {"choices":[{"delta":{"content":"hi"}}]}\n\n'
DONE = b"data: [DONE]\n\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


ANSWERS = {  # what the server sends before it hangs up -> (status, error code)
    "whole": (CHUNKED + chunk(WORD + DONE) + chunk(b""), 200, None),
    "cut in the stream": (CHUNKED + chunk(WORD), 200, "RemoteProtocolError"),
    "cut in a chunk": (CHUNKED + b"ff\r\ndata: {", 200, "RemoteProtocolError"),
    "no last word": (CLOSED + WORD, 200, "cut_off"),
    "not JSON": (CHUNKED + chunk(b"data: {oops\n\n") + chunk(b""), 200, "garbled_answer"),
    "not an object": (CHUNKED + chunk(b"data: [1]\n\n") + chunk(b""), 200, "garbled_answer"),
    "an error without a code": (CHUNKED + chunk(b'data: {"error":"x"}\n\n') + chunk(b""), 200, "garbled_answer"),
    "an error in the stream": (CHUNKED + chunk(b'data: {"error":{"code":"model_failed"}}\n\n'), 200, None),
    "a level that is no number": (CHUNKED.replace(b"level: 1", b"level: x"), 200, "garbled_answer"),
    "nothing at all": (b"", 0, "RemoteProtocolError"),
    "half a head": (b"HTTP/1.1 200 OK\r\ncont", 0, "RemoteProtocolError"),
    "a refusal": (b"HTTP/1.1 503 No\r\ncontent-length: 2\r\n\r\n{}", 503, "http_503"),
}


async def serve_once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer one request by its text, and hang up."""
    head = await reader.readuntil(b"\r\n\r\n")
    if head.startswith(b"GET"):
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
    else:
        length = next(int(h.split(b":")[1]) for h in head.split(b"\r\n") if h.lower().startswith(b"content-length"))
        body = msgspec.json.decode(await reader.readexactly(length))
        writer.write(ANSWERS[body["messages"][0]["content"]][0])
    await writer.drain()
    writer.close()
    await writer.wait_closed()


async def ask_all(names: list[str]) -> list[Seen]:
    server = await asyncio.start_server(serve_once, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        requests = [Request(f"r{i}", 0, "t", "c", "", name) for i, name in enumerate(names)]
        return await play(f"http://127.0.0.1:{port}", {"t": "key"}, requests)


@pytest.fixture(scope="module")
def seen() -> dict[str, Seen]:
    """Every kind of answer, all in one run."""
    return dict(zip(ANSWERS, asyncio.run(ask_all(list(ANSWERS))), strict=True))


@pytest.mark.parametrize("name", [name for name in ANSWERS if name != "an error in the stream"])
def test_a_broken_answer_costs_one_request_and_is_named(seen: dict[str, Seen], name: str) -> None:
    _, status, code = ANSWERS[name]
    found = seen[name]
    assert (found.status, found.error_code) == (status, code)
    assert found.e2e_ns is not None and found.e2e_ns >= 0


def test_what_the_headers_said_is_kept(seen: dict[str, Seen]) -> None:
    assert (seen["cut in the stream"].tier, seen["cut in the stream"].level) == ("model", 1)


def test_an_error_is_named_even_if_the_stream_is_cut_behind_it(seen: dict[str, Seen]) -> None:
    assert seen["an error in the stream"].error_code in ("model_failed", "RemoteProtocolError")


def test_only_the_whole_answer_counts_as_served(seen: dict[str, Seen]) -> None:
    frame = client_frame(list(seen.values())).set_index("request_id")
    served = [name for name, found in seen.items() if frame.loc[found.request_id, "outcome"] == "served"]
    assert served == ["whole"]


def test_a_late_generator_says_so() -> None:
    def with_lateness(late_ns: list[int]) -> list[Seen]:
        return [Seen(f"r{i}", "c", "", 0, ns, 200) for i, ns in enumerate(late_ns)]

    assert late_warning([]) == ""
    assert late_warning(with_lateness([MS_NS] * 99 + [900 * MS_NS])) != ""
    assert late_warning(with_lateness([MS_NS] * 199 + [900 * MS_NS])) == "", "one in two hundred is not the p99"
    assert "60.0 ms at p99" in late_warning(with_lateness([60 * MS_NS] * 50))
    assert late_warning(with_lateness([50 * MS_NS] * 50)) == ""

"""What is no request, or two in one: the right status, a closed connection, never an answer to what was smuggled in.

Over real sockets, byte by byte as an attacker would write it; then whether the machine has heard of anything.
Caught: trailers seen as headers; the first of several pipelined requests not told that its client has gone; a refusal
written into an answer; no Host check; an absolute URL past it; a coding in HTTP/1.0; an endless field or chunk
extension; each of the limits on heads and on pipelining gone; a refusal that is not counted.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import socket
from collections.abc import Iterator

import httpx
import pytest
from msgspec.structs import replace

from engine.events import Cancel
from engine.service.exchange import LINGER_BYTES
from tests.service.conftest import Starter
from tests.service.harness import CHAT, SCENARIO, STEP_20_MS, Engine, body, check_error, journal, start

LIMITS = SCENARIO.ingress


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with start(tmp_path_factory.mktemp("hostile")) as engine:
        yield engine


def connect(engine: Engine) -> socket.socket:
    host, port = engine.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=20)


def converse(engine: Engine, *said: bytes) -> bytes:
    """All that comes back until the server hangs up, whichever way."""
    with connect(engine) as line:
        heard = b""
        with contextlib.suppress(ConnectionError):
            for piece in said:
                line.sendall(piece)
            while data := line.recv(65536):
                heard += data
    return heard


def statuses(heard: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", heard)]


def refused(heard: bytes, status: int, code: str) -> None:
    """One response, and it is a refusal in the usual shape that ends the connection."""
    assert statuses(heard) == [status], heard
    head, _, data = heard.partition(b"\r\n\r\n")
    fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
    assert fields[b"connection"] == b"close"
    got = httpx.Response(status, headers={k.decode(): v.decode() for k, v in fields.items()}, content=data)
    check_error(got, status, code, got.json()["error"]["param"])


def chat(engine: Engine, text: str, *more: str, request_id: str = "smuggled") -> bytes:
    """A good request, whole."""
    data = json.dumps(body(text)).encode()
    head = [
        f"POST {CHAT} HTTP/1.1", "host: x", f"authorization: Bearer {engine.keys['shop']}",
        f"x-request-id: {request_id}", f"content-length: {len(data)}", *more,
    ]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + data


def line_of(*fields: str, target: str = CHAT) -> bytes:
    return "\r\n".join([f"POST {target} HTTP/1.1", *fields]).encode("latin-1") + b"\r\n\r\n"


SMUGGLING: dict[str, bytes] = {
    "both lengths": line_of("host: x", "content-length: 4", "transfer-encoding: chunked") + b"0\r\n\r\n",
    "both lengths, the other way": line_of("host: x", "transfer-encoding: chunked", "content-length: 4") + b"0\r\n\r\n",
    "two lengths": line_of("host: x", "content-length: 2", "content-length: 3") + b"abc",
    "the same length twice": line_of("host: x", "content-length: 3", "content-length: 3") + b"abc",
    "a list of lengths": line_of("host: x", "content-length: 3, 3") + b"abc",
    "a signed length": line_of("host: x", "content-length: +3") + b"abc",
    "a negative length": line_of("host: x", "content-length: -3") + b"abc",
    "a length in hex": line_of("host: x", "content-length: 0x3") + b"abc",
    "a length beyond 64 bits": line_of("host: x", f"content-length: {2**64 + 3}") + b"abc",
    "an unknown coding": line_of("host: x", "transfer-encoding: xchunked"),
    "two codings": line_of("host: x", "transfer-encoding: chunked", "transfer-encoding: identity"),
    "chunked is not the last": line_of("host: x", "transfer-encoding: chunked, gzip"),
    "a tab in the coding": line_of("host: x", "transfer-encoding: \x0bchunked"),
    "a coding in HTTP/1.0": line_of("host: x", "transfer-encoding: chunked").replace(b"1.1", b"1.0") + b"0\r\n\r\n",
    "a blank before the colon": line_of("host: x", "content-length : 3") + b"abc",
    "a folded field": line_of("host: x", "x-a: 1", " content-length: 3") + b"abc",
    "a folded first field": line_of(" host: x", "host: x"),
    "a field without a colon": line_of("host: x", "content-length 3"),
    "no name": line_of("host: x", ": 3"),
    "NUL in a value": line_of("host: x", "x-a: 1\x002"),
    "CR in a value": line_of("host: x", "x-a: 1\r2"),
    "bare line feeds": line_of("host: x").replace(b"\r\n", b"\n"),
    "bare carriage returns": line_of("host: x").replace(b"\r\n", b"\r"),
    "a bare line feed in the head": line_of("host: x").replace(b"x\r\n", b"x\nx-a: 1\r\n"),
    "a chunk size that is none": line_of("host: x", "transfer-encoding: chunked") + b"zz\r\nabc\r\n0\r\n\r\n",
    "a signed chunk size": line_of("host: x", "transfer-encoding: chunked") + b"+3\r\nabc\r\n0\r\n\r\n",
    "a chunk size in C's hex": line_of("host: x", "transfer-encoding: chunked") + b"0x3\r\nabc\r\n0\r\n\r\n",
    "a chunk size of 2**64": line_of("host: x", "transfer-encoding: chunked") + b"10000000000000003\r\nabc\r\n",
    "a chunk longer than it says": line_of("host: x", "transfer-encoding: chunked") + b"3\r\nabcd\r\n0\r\n\r\n",
    "a chunk that ends in a line feed": line_of("host: x", "transfer-encoding: chunked") + b"3\r\nabc\n0\r\n\r\n",
    "a chunk size that ends in a line feed": line_of("host: x", "transfer-encoding: chunked") + b"3\nabc\r\n0\r\n\r\n",
    "an extension that ends in a line feed": line_of("host: x", "transfer-encoding: chunked") + b"3;a\nabc\r\n0\r\n",
    "no Host": line_of("x-a: 1"),
    "two Hosts": line_of("host: x", "host: y"),
    "the same Host twice": line_of("host: x", "host: x"),
    "an empty Host": line_of("host:"),
    "a Host with a path": line_of("host: x/y"),
    "a Host with a user": line_of("host: a@x"),
    "a Host with a port that is none": line_of("host: x:y"),
    "a list of Hosts": line_of("host: x, y"),
    "a target with a blank": line_of("host: x", target="/v1/ chat"),
    "a target beyond ASCII": line_of("host: x", target="/v1/\xe4"),
    "no version": b"POST /v1/models\r\nhost: x\r\n\r\n",
    "a version to come": line_of("host: x").replace(b"HTTP/1.1", b"HTTP/3.0"),
    "HTTP/2 said in HTTP/1": line_of("host: x").replace(b"HTTP/1.1", b"HTTP/2.0"),
    "HTTP/2's preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "TLS": bytes.fromhex("160301020001000 1fc0303".replace(" ", "")) + b"\x00" * 64,
    "a tunnel": b"CONNECT example.com:443 HTTP/1.1\r\nhost: example.com:443\r\n\r\n",
    "a method that is none": line_of("host: x").replace(b"POST", b"P/ST"),
}  # fmt: skip


@pytest.mark.parametrize("name", SMUGGLING)
def test_what_is_ambiguous_is_refused_and_nothing_after_it_is_heard(quick: Engine, name: str) -> None:
    """A chunked body's beginning needs a key to be read at all: with one and without."""
    before = quick.stats()
    key = b"\r\nauthorization: Bearer " + quick.keys["shop"].encode() + b"\r\n"
    for said in (SMUGGLING[name], SMUGGLING[name].replace(b"\r\n", key, 1)):
        heard = converse(quick, said + chat(quick, f"never to be read: {name}"))
        if statuses(heard) == [401]:  # it was refused before its body was looked at: nothing follows that
            assert said == SMUGGLING[name] and b"\r\nconnection: close\r\n" in heard
        else:
            refused(heard, 400, "invalid_request")
            assert b"JSON" not in heard, "it was read as a request, and only then found wanting"
    quick.quiet()
    assert quick.stats() == before


def test_what_follows_an_answered_request_is_no_answer_of_its_own_when_it_is_garbage(quick: Engine) -> None:
    """One good request and garbage behind it: whatever is answered, it is the good one alone; garbage is hung up on."""
    for garbage in (b"\x00\x01\x02", line_of("host: x", "content-length: 1", "transfer-encoding: chunked")):
        heard = converse(quick, chat(quick, f"a good one before {garbage!r}") + garbage + chat(quick, "and after"))
        assert statuses(heard) in ([], [200])
        assert b"and after" not in heard
    quick.quiet()


def test_garbage_on_an_idle_connection_is_refused(quick: Engine) -> None:
    with connect(quick) as line:
        line.sendall(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n")
        assert line.recv(65536).endswith(b'{"status":"alive"}')
        line.sendall(b"\x00nonsense")
        heard = b""
        while data := line.recv(65536):
            heard += data
    refused(heard, 400, "invalid_request")


def test_a_refused_body_is_the_last_that_is_heard(quick: Engine) -> None:
    """A refusal by the application with the body on its way: the rest of it is no request."""
    inner = chat(quick, "hidden in a body")
    for key in ("db-wrong", quick.keys["shop"]):
        head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\ntransfer-encoding: chunked\r\n\r\n"
        big = b"%x\r\n" % (LIMITS.max_body_bytes + 1) + b" " * (LIMITS.max_body_bytes + 1) + b"\r\n0\r\n\r\n"
        before = quick.stats().arrived
        heard = converse(quick, head.encode() + big + inner)
        assert statuses(heard) == [401 if key == "db-wrong" else 413]
        assert quick.stats().arrived == before


def test_good_requests_in_one_go_are_answered_in_their_order(quick: Engine) -> None:
    texts = [f"pipelined {n}" for n in range(LIMITS.max_pipelined)]
    said = b"".join(chat(quick, text, request_id=f"pipe-{n}") for n, text in enumerate(texts))
    heard = converse(quick, said + chat(quick, "the last", "connection: close"))
    assert statuses(heard) == [200] * 9
    assert re.findall(rb'"content":"(.*?)"', heard) == [*(text.encode() for text in texts), b"the last"]
    quick.quiet()


def test_more_in_one_go_are_hung_up_on(quick: Engine) -> None:
    heard = converse(quick, b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n" * 2000)
    assert len(statuses(heard)) <= LIMITS.max_pipelined
    quick.quiet()


def test_who_hangs_up_with_requests_waiting_behind_the_first_stops_the_first(started: Starter) -> None:
    engine = started(STEP_20_MS)
    line = connect(engine)
    line.sendall(chat(engine, "word " * 60) + chat(engine, "behind it"))
    engine.until(lambda: engine.inside.app.in_flight == 1)
    line.close()
    engine.quiet()
    assert engine.stats().arrived == 1
    engine.call(engine.inside.flush)
    assert [entry for entry in journal(engine.folder) if isinstance(entry.event, Cancel)]


def test_a_trailer_is_no_header(quick: Engine) -> None:
    """Trailers come after the head was judged: one that names a class, or a tag, must not change anything."""
    data = json.dumps(body("the trailer's question")).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {quick.keys['shop']}\r\n"
    chunks = b"%x\r\n%s\r\n0\r\nx-doorbuster-tags: !!\r\ncontent-encoding: gzip\r\n\r\n" % (len(data), data)
    said = head.encode() + b"transfer-encoding: chunked\r\n\r\n" + chunks
    heard = converse(quick, said + b"GET /healthz HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
    assert statuses(heard) == [200, 200]


def test_another_protocol_is_not_spoken(quick: Engine, caplog: pytest.LogCaptureFixture) -> None:
    for offered in ("websocket", "h2c"):
        said = b"GET /healthz HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: %s\r\n\r\n" % offered.encode()
        heard = converse(quick, said + b"GET /readyz HTTP/1.1\r\nhost: x\r\n\r\n")
        assert statuses(heard) == [200] and b"alive" in heard and b"\r\nconnection: close\r\n" in heard
    assert not caplog.records


# ---------------------------------------------------------------- hosts


def test_only_names_that_it_goes_by_open_it(started: Starter) -> None:
    engine = started(ingress=replace(LIMITS, hosts=("shop.example", "[::1]")))
    for host in ("shop.example", "SHOP.example:8000", "[::1]:80"):
        assert statuses(converse(engine, ask_health(host))) == [200]
    for host in ("evil.example", "127.0.0.1", "shop.example.evil.example", "[::2]"):
        refused(converse(engine, ask_health(host)), 400, "invalid_request")
    absolute = ask_health("shop.example").replace(b" /healthz", b" http://evil.example/healthz")
    refused(converse(engine, absolute), 400, "invalid_request")
    assert statuses(converse(engine, absolute.replace(b"http://evil", b"http://shop.example:1/healthz?"))) == [200]


def ask_health(host: str, *more: str) -> bytes:
    fields = [f"host: {host}", "connection: close", *more]
    return "\r\n".join(["GET /healthz HTTP/1.1", *fields]).encode() + b"\r\n\r\n"


# ---------------------------------------------------------------- floods


def test_a_head_has_a_size(quick: Engine) -> None:
    most, fields = LIMITS.max_header_bytes, LIMITS.max_headers
    for fits in ([f"x-{n}: 1" for n in range(fields - 2)], ["x-a: " + "a" * (most - 200)]):
        assert statuses(converse(quick, ask_health("x", *fits))) == [200]
    for flood in (
        [f"x-{n}: 1" for n in range(fields - 1)], [f"x-{n}: 1" for n in range(20_000)], ["x-a: " + "a" * most],
        ["x-a: " + "a" * 3_000_000], ["x" * 3_000_000 + ": a"],
    ):  # fmt: skip
        refused(converse(quick, ask_health("x", *flood)), 431, "headers_too_large")
    long = ask_health("x").replace(b"/healthz", b"/healthz?" + b"a" * LIMITS.max_url_bytes)
    refused(converse(quick, long), 414, "uri_too_long")
    quick.quiet()


def speak_without_end(line: socket.socket) -> None:
    """Until the other side has had enough."""
    endless = b"a" * (100 * LINGER_BYTES)
    with pytest.raises(ConnectionError):
        line.sendall(endless)


def test_a_field_without_end_is_hung_up_on(quick: Engine) -> None:
    """Never more than some of it is kept, and the refusal is not waited for by whoever never stops."""
    with connect(quick) as line:
        line.sendall(b"GET /healthz HTTP/1.1\r\nhost: x\r\nx-a: ")
        speak_without_end(line)
    quick.quiet()


def test_trailers_have_a_size_too(quick: Engine) -> None:
    head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {quick.keys['shop']}\r\n"
    said = head.encode() + b"transfer-encoding: chunked\r\n\r\n1\r\n{\r\n0\r\n"
    refused(converse(quick, said + b"x-a: 1\r\n" * 200), 431, "headers_too_large")
    quick.quiet()


def test_a_chunk_extension_without_end_is_hung_up_on(quick: Engine) -> None:
    head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {quick.keys['shop']}\r\n"
    with connect(quick) as line:
        line.sendall(head.encode() + b"transfer-encoding: chunked\r\n\r\n1;")
        speak_without_end(line)
    quick.quiet()


def test_refusals_are_counted_and_no_byte_of_them_is_logged(
    quick: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    def count() -> int:
        with quick.http(None) as client:
            page = client.get("/metrics").text
        found = re.search(r'ingress_refusals_total\{reason="headers_too_large"\} (\d+)', page)
        return int(found[1]) if found else 0

    before = count()
    with caplog.at_level(logging.DEBUG):
        converse(quick, ask_health("x", "x-secret: " + "s3cr3t" * 4000))
        converse(quick, line_of("host: x", "s3cr3t"))
    assert "s3cr3t" not in caplog.text
    assert count() == before + 1

"""Clients that dawdle: with a head, before a request, with reading; and clients that come in crowds from one address.

Deadlines are a second or less here; what is told apart is that the server ends it, and that work and place are given
back. ``tests/drill/test_slowloris_drill.py`` has the numbers of a real attack. Caught: no deadline for who does not
read; a head's deadline counted from its last byte; none for a body that nobody reads, none between requests; an address
that is never counted down; no limit on connections; everybody who is late in one turn.
"""

from __future__ import annotations

import contextlib
import json
import selectors
import socket
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial

import pytest
from msgspec.structs import replace

from engine.errors import RequestError
from engine.events import Cancel
from engine.ingress_config import IngressConfig
from engine.service.connections import AT_ONCE, FOREVER, Connections, counted_address
from tests.service.conftest import Starter
from tests.service.harness import CHAT, SCENARIO, STEP_20_MS, Engine, body, journal, start
from tests.service.test_hostile import ask_health, connect, converse, refused, statuses

SLOW_LORISES = 300
STEP_2_MS = replace(STEP_20_MS, fixed_ns=2e6)
QUICK = replace(SCENARIO.ingress, header_ms=600, keep_alive_ms=600, write_stall_ms=400, receipt_ms=600)


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with start(tmp_path_factory.mktemp("strict"), ingress=QUICK) as engine:
        yield engine


def test_a_head_that_never_ends_is_408(strict: Engine) -> None:
    refused(converse(strict, b"GET /healthz HTTP/1.1\r\nhost: x\r\n"), 408, "headers_too_slow")
    refused(converse(strict, b"G"), 408, "headers_too_slow")
    assert converse(strict, b"") == b""  # who never said a word hears none
    assert converse(strict, b"\r\n") == b""


def test_a_head_that_trickles_in_is_408_all_the_same(strict: Engine) -> None:
    """Each byte is progress and none of it counts: the deadline is the whole head's."""
    with connect(strict) as line:
        began_s, heard = time.monotonic(), b""
        line.settimeout(0.02)
        line.sendall(b"GET /healthz HTTP/1.1\r\nhost: x\r\nx-a: ")
        while time.monotonic() < began_s + 15 and not heard:
            with contextlib.suppress(ConnectionError):
                line.sendall(b"a")
            with contextlib.suppress(TimeoutError):
                heard = line.recv(65536)
    refused(heard, 408, "headers_too_slow")


def test_the_second_head_has_a_deadline_too(strict: Engine) -> None:
    good = b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n"
    heard = converse(strict, good + b"GET /readyz HT")
    assert statuses(heard) in ([200], [200, 408]) and b"alive" in heard


def test_an_idle_connection_is_closed_without_a_word(strict: Engine) -> None:
    heard = converse(strict, b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n")
    assert statuses(heard) == [200]
    strict.until(lambda: not strict.inside.connections)


def test_a_body_that_nobody_reads_has_a_deadline(strict: Engine) -> None:
    """The answer was given without it; its bytes trickle on, and each was once a reason to wait for the next."""
    with connect(strict) as line:
        line.settimeout(0.02)
        line.sendall(f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-length: 10000\r\n\r\n".encode())
        began_s, heard = time.monotonic(), b""
        with contextlib.suppress(ConnectionError):
            while time.monotonic() < began_s + 15:
                with contextlib.suppress(TimeoutError):
                    if not (data := line.recv(65536)):
                        break
                    heard += data
                line.sendall(b" ")
        assert time.monotonic() < began_s + 10
    assert statuses(heard) == [401]


def test_hundreds_who_trickle_are_gone_at_the_deadline_and_nobody_else_is_disturbed(strict: Engine) -> None:
    began_s = time.monotonic()
    with contextlib.ExitStack() as stack, selectors.DefaultSelector() as ready:
        for _ in range(SLOW_LORISES):
            line = stack.enter_context(connect(strict))
            line.sendall(b"GET /healthz HTTP/1.1\r\nhost: x\r\nx-a: ")
            ready.register(line, selectors.EVENT_READ)
        heard = []
        while len(heard) < SLOW_LORISES and time.monotonic() < began_s + 20:
            with strict.http() as client:
                assert client.get("/healthz").status_code == 200
            for key, _ in ready.select(0.02):
                assert isinstance(key.fileobj, socket.socket)
                heard.append(key.fileobj.recv(65536))
                ready.unregister(key.fileobj)
            for key in ready.get_map().values():
                with contextlib.suppress(ConnectionError):
                    key.fileobj.send(b"a")  # type: ignore[union-attr]
    assert statuses(b"".join(heard)) == [408] * SLOW_LORISES
    strict.until(lambda: not strict.inside.connections)


def test_who_does_not_read_is_hung_up_on_and_the_work_stops(started: Starter) -> None:
    """More is said than the kernels' buffers and ours take; then nothing more is kept, and soon nothing is computed."""
    wordy = replace(SCENARIO.classes["chat"], max_tokens=4000, timeout_ms=120_000)
    engine = started(
        STEP_2_MS, ingress=replace(QUICK, max_body_bytes=65536), classes={**SCENARIO.classes, "chat": wordy},
        model=replace(SCENARIO.model, context_tokens=10_000),
    )  # fmt: skip
    line = socket.socket()
    line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    host, port = engine.url.removeprefix("http://").split(":")
    line.connect((host, int(port)))
    data = json.dumps(body("word " * 2500, stream=True)).encode()
    key = engine.keys["shop"]
    head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\ncontent-length: {len(data)}\r\n\r\n"
    line.sendall(head.encode() + data)
    engine.until(lambda: engine.inside.app.in_flight == 1)
    (connection,) = engine.inside.connections
    largest = 0

    def over() -> bool:
        nonlocal largest
        largest = max(largest, connection.transport.get_write_buffer_size())
        return engine.inside.app.in_flight == 0

    engine.until(over)
    engine.quiet()
    line.close()
    assert 32 * 1024 < largest < 70 * 1024
    engine.call(engine.inside.flush)
    cancelled = [entry for entry in journal(engine.folder) if isinstance(entry.event, Cancel)]
    assert len(cancelled) == 1


# ---------------------------------------------------------------- crowds


def test_there_is_room_for_so_many_connections(started: Starter) -> None:
    engine = started(ingress=replace(SCENARIO.ingress, max_connections=3))
    with contextlib.ExitStack() as stack:
        lines = [stack.enter_context(connect(engine)) for _ in range(3)]
        engine.until(lambda: len(engine.inside.connections) == 3)
        refused(converse(engine), 503, "overloaded")
        lines[0].sendall(ask_health("x"))
        assert statuses(lines[0].recv(65536)) == [200]
        engine.until(lambda: len(engine.inside.connections) == 2)
        assert statuses(converse(engine, ask_health("x"))) == [200]


class Somebody:
    """A connection from an address that no test can have."""

    def __init__(self, address: str | None) -> None:
        self.client = (address, 1) if address is not None else None
        self.address, self.deadline_s, self.stalled_s = "", FOREVER, FOREVER
        self.ended_s: float | None = None

    def overdue(self, now_s: float) -> None:
        self.ended_s, self.deadline_s = now_s, FOREVER


def test_many_who_are_late_together_do_not_hold_up_everybody_else(engine: Engine) -> None:
    connections = Connections(QUICK)
    crowd = [Somebody("127.0.0.1") for _ in range(3 * AT_ONCE)]
    for somebody in crowd:
        engine.call(partial(connections.enter, somebody, engine.loop))
        somebody.deadline_s = 0.0
    engine.until(lambda: all(somebody.ended_s is not None for somebody in crowd))
    turns = Counter(somebody.ended_s for somebody in crowd)
    assert max(turns.values()) <= AT_ONCE and len(turns) == 3
    for somebody in crowd:
        engine.call(partial(connections.leave, somebody))


def test_one_address_has_so_many_and_no_more(started: Starter, engine: Engine) -> None:
    connections = Connections(IngressConfig(max_connections_per_address=2))
    enter = lambda somebody: engine.call(lambda: connections.enter(somebody, engine.loop))  # noqa: E731
    first, second, third = (Somebody("192.0.2.1") for _ in range(3))
    enter(first)
    enter(second)
    with pytest.raises(RequestError, match="from this address"):
        enter(third)
    connections.leave(third)  # never was in
    enter(Somebody("192.0.2.2"))
    connections.leave(first)
    connections.leave(first)
    enter(third)
    for _ in range(5):
        enter(Somebody("127.0.0.1"))
    assert connections.by_address == {"192.0.2.1": 2, "192.0.2.2": 1} and len(connections) == 8


@pytest.mark.parametrize(
    ("address", "counted"),
    [
        ("192.0.2.1", "192.0.2.1"), ("127.0.0.1", ""), ("127.8.8.8", ""), ("::1", ""), (None, ""), ("unix", ""),
        ("::ffff:192.0.2.1", "192.0.2.1"), ("::ffff:127.0.0.1", ""), ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
    ],
)  # fmt: skip
def test_an_address_is_whom_it_belongs_to(address: str | None, counted: str) -> None:
    assert counted_address(None if address is None else (address, 1)) == counted

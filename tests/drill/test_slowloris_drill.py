"""Two thousand connections that send a byte of a header a second, and bodies of 100 MB: gone in time, nothing held.

    make drill    (or: python -m pytest -m drill tests/drill/test_slowloris_drill.py; a minute)

The limits are the defaults: a head has 10 s, and the one look at all connections comes once a second.
"""

from __future__ import annotations

import contextlib
import gzip
import socket
import time

import pytest

from engine.ingress_config import IngressConfig
from tests.bench.http_line import ask_often
from tests.drill.conftest import Publish
from tests.drill.test_streams_drill import Served, asking, crowd, crowded, result

pytestmark = pytest.mark.drill

ATTACKERS = 2_000
ALLOWANCE_S = 3.0  # a second of the look, a second of the attacker's own, a second of a busy machine
P99_RISE, FLOOR_MS = 1.2, 5.0  # below which a rise is noise
BODY_BYTES, BODIES = 100 << 20, 10
HELD_BYTES = 8 << 20


def p99_ms(served: Served, seconds: float) -> float:
    """Of good requests, one at a time, for so long."""
    good = asking(served)
    times_s: list[float] = []
    end_s = time.monotonic() + seconds
    while time.monotonic() < end_s:
        times_s += ask_often(served.port, good, 100, 1)
    return sorted(times_s)[len(times_s) * 99 // 100] * 1e3


def test_two_thousand_slow_heads(publish: Publish) -> None:
    with crowded(0, 100) as served:
        p99_ms(served, 2)
        alone_ms = p99_ms(served, 6)
        before = served.process.memory_info().rss
        with crowd("loris", served, ATTACKERS) as process:
            beside_ms = p99_ms(served, 6)
            held = served.process.memory_info().rss - before
            seen = result(process)
    p99s = {"p99 ms alone": round(alone_ms, 2), "beside": round(beside_ms, 2)}
    publish("slowloris", [{**seen, "RSS bytes each": held // ATTACKERS, **p99s}])
    within_s = IngressConfig().header_ms / 1000
    assert seen["408"] == ATTACKERS
    assert within_s - 0.1 <= float(str(seen["first closed s"]))
    assert float(str(seen["last closed s"])) <= within_s + ALLOWANCE_S
    assert beside_ms <= max(P99_RISE * alone_ms, FLOOR_MS)


def test_bodies_without_measure(publish: Publish) -> None:
    """Declared, chunked, compressed: each sent as far as the server lets, many times over."""
    bomb = gzip.compress(b" " * BODY_BYTES)
    blanks = b" " * (1 << 20)
    with crowded(0, 100) as served:
        chunked = asking(served, b"", "transfer-encoding: chunked").replace(b"content-length: 0\r\n", b"")
        heads = {
            "declared": asking(served, b"").replace(b"length: 0", b"length: %d" % BODY_BYTES),
            "chunked": chunked,
            "bomb": asking(served, bomb, "content-encoding: gzip"),
            "field": b"GET / HTTP/1.1\r\nhost: x\r\nx-a: ",
            "extension": chunked + b"1;",
        }
        rows, before = [], 0
        for name, head in heads.items():
            for turn in range(BODIES):
                if turn == 1:
                    before = served.process.memory_info().rss  # the first may make buffers that stay
                sent, heard = 0, b""
                with socket.create_connection(("127.0.0.1", served.port), timeout=30) as line:
                    with contextlib.suppress(ConnectionError):
                        line.sendall(head)
                        while name != "bomb" and sent < BODY_BYTES:
                            line.sendall((b"100000\r\n" if name == "chunked" else b"") + blanks)
                            sent += len(blanks)
                    with contextlib.suppress(ConnectionError):
                        heard = line.recv(4096)
            grown = served.process.memory_info().rss - before
            answer = heard[:12].decode()
            rows.append({"body": name, "sent MiB": sent >> 20, "answer": answer, "RSS grown KiB": grown >> 10})
            assert grown < HELD_BYTES, rows
        alive_ms = p99_ms(served, 1)
    publish("bodies", rows)
    assert {row["body"]: row["answer"] for row in rows}["bomb"] == "HTTP/1.1 415"
    assert alive_ms < 1000

"""Ten thousand streams at one event a second for a minute, and ten thousand idle connections: nothing is lost.

    make drill    (or: python -m pytest -m drill tests/drill/test_streams_drill.py; four minutes)

Server and clients are two processes, each below the limit of open files (fewer connections where that is lower; the
table says how many). ``crowded.py`` says how the engine is set. RSS is the ingress process's own, before and while all
are open, after a first crowd of a tenth has come and gone: what Python keeps of that is no connection's.
"""

from __future__ import annotations

import contextlib
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from tests.bench.http_line import ask_often
from tests.drill.conftest import Publish

pytestmark = pytest.mark.drill

ROOT = Path(__file__).parents[2]
WANTED = 10_000
WORDS = 60  # some 100 tokens, one a second: a minute together, and the time until all have begun
START_S = 120.0
QUESTION = b'{"model":"default","messages":[{"role":"user","content":"is this card stolen?"}]}'
STREAM_BYTES, IDLE_BYTES = 25_000, 12_000


class Served(NamedTuple):
    """A server under test."""

    port: int
    key: str
    process: psutil.Process


def room() -> int:
    """As many connections as one process may open, up to the number that is wanted."""
    return min(WANTED, resource.getrlimit(resource.RLIMIT_NOFILE)[1] - 1_000)


@contextlib.contextmanager
def crowded(step_s: float, slots: int, words: int = 0) -> Iterator[Served]:
    command = [sys.executable, "-m", "tests.drill.crowded", str(step_s), str(slots), str(words)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdin is not None
        try:
            ready = json.loads(process.stdout.readline())
            yield Served(int(ready["url"].rpartition(":")[2]), ready["key"], psutil.Process(ready["pid"]))
        finally:
            process.stdin.close()
            process.wait(START_S)


@contextlib.contextmanager
def crowd(what: str, served: Served, count: int, words: int = 0) -> Iterator[subprocess.Popen[str]]:
    """All of them are there inside."""
    command = [sys.executable, "-m", "tests.drill.crowd", what, str(served.port), served.key, str(count), str(words)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        yield process


def result(process: subprocess.Popen[str]) -> dict[str, object]:
    """What the crowd saw, when it is over."""
    out, _ = process.communicate()
    return json.loads(out.splitlines()[-1])


def asking(served: Served, data: bytes = QUESTION, *fields: str) -> bytes:
    """A request of the critical class, with as many tokens of answer as that may have."""
    head = [
        "POST /v1/chat/completions HTTP/1.1", "host: x", f"authorization: Bearer {served.key}",
        "x-doorbuster-class: fraud", f"content-length: {len(data)}", *fields,
    ]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + data


def test_ten_thousand_streams(publish: Publish) -> None:
    count = room()
    with crowded(1.0, count, WORDS) as served:
        ask_often(served.port, asking(served), count // 10, count // 10)
        before = served.process.memory_info().rss
        began, began_s = served.process.cpu_times(), time.monotonic()
        with crowd("streams", served, count, WORDS) as process:
            held = served.process.memory_info().rss - before
            seen = result(process)
        ended, took_s = served.process.cpu_times(), time.monotonic() - began_s
        most = max(held, served.process.memory_info().rss - before)
    cores = (ended.user + ended.system - began.user - began.system) / took_s
    row = {
        "streams": count, "RSS bytes a stream": held // count, "at the end": most // count,
        "ingress cores": round(cores, 2), **seen,
    }
    publish("streams", [row])
    assert seen["ends"] == {"whole": count}, seen["first bad"]
    assert float(str(seen["all together s"])) >= 60
    assert most / count <= STREAM_BYTES


def test_ten_thousand_idle_connections(publish: Publish) -> None:
    count = room()
    with crowded(0, 100) as served:
        request = asking(served)
        with crowd("idle", served, count // 10) as process:
            result(process)
        alone_s = sorted(ask_often(served.port, request, 500, 1))
        before = served.process.memory_info().rss
        with crowd("idle", served, count) as process:
            held = served.process.memory_info().rss - before
            beside_s = sorted(ask_often(served.port, request, 500, 1))
            seen = result(process)
    publish(
        "idle",
        [{
            **seen, "RSS bytes a connection": held // count, "fraud p99 ms alone": round(alone_s[494] * 1e3, 2),
            "fraud p99 ms beside them": round(beside_s[494] * 1e3, 2),
        }],
    )  # fmt: skip
    assert seen["closed by the server"] == 0
    assert held / count <= IDLE_BYTES

"""Two thousand requests through a real replica process with real weights: its memory does not grow.

    make drill    (or: python -m pytest -m drill tests/drill/test_memory_drill.py)

Spoken to over its own socket, as a gateway does. oneDNN keeps a compiled kernel for each number of rows that a step may
have; the warm-up brings a prompt of every length up to the token budget, so that all are there before the count begins.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from engine.config import BatcherConfig, ModelConfig, PrefixConfig, ReplicaConfig
from engine.model.blockhash import Hasher
from engine.model.process import WorkerSpec
from engine.model.wire import Output, Ready, Unframer, Work, decode_from_replica, frame
from tests.drill.conftest import Publish
from tests.model.hand import prompt_of
from tests.model.held import rss_mb
from tests.model.visitors import Visitors
from tests.waiting import until

pytestmark = pytest.mark.drill

REQUESTS, WARM, AT_A_TIME = 2_000, 200, 32
GROWTH_MB = 20.0
START_S, PATIENCE_S = 300.0, 60.0
KEY = b"k" * 16
CONFIG = ReplicaConfig(
    batcher=BatcherConfig(step_tokens=64, slots=16, reserved_slots=2, reserved_blocks=8),
    prefix=PrefixConfig(blocks=128, pinned_blocks=8),
)


class Line:
    """A process that computes, and the connection to it."""

    def __init__(self, process: subprocess.Popen[bytes], connection: socket.socket, epoch_ns: int) -> None:
        self.process, self.connection, self.epoch_ns = process, connection, epoch_ns
        self.unframer = Unframer()
        connection.settimeout(PATIENCE_S)

    @property
    def now_ns(self) -> int:
        return time.monotonic_ns() - self.epoch_ns

    def hear(self) -> list[Ready | Output]:
        data = self.connection.recv(1 << 20)
        assert data, "the process has hung up"
        return [decode_from_replica(raw) for raw in self.unframer.feed(data)]

    def serve(self, visitors: Visitors, works: Iterator[Work], at_a_time: int) -> None:
        """All of ``works``, never more than ``at_a_time`` on their way."""
        while True:
            while len(visitors.live) < at_a_time and (work := next(works, None)) is not None:
                self.connection.sendall(frame(work))
            if not visitors.live:
                return
            for output in self.hear():
                assert isinstance(output, Output)
                visitors.hear(output)


@contextlib.contextmanager
def worker(folder: Path) -> Iterator[Line]:
    path = str(folder / "replica.sock")
    spec = WorkerSpec(
        path, ModelConfig(name="smollm2", context_tokens=512), CONFIG, KEY, epoch_ns=time.monotonic_ns(), threads=1,
        journal=str(folder / "replica.ndjson"), parent=os.getpid(),
    )  # fmt: skip
    env = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "engine.model.process"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, env=env) as process, socket.socket(socket.AF_UNIX) as line:
        try:
            assert process.stdin is not None
            process.stdin.write(msgspec.msgpack.encode(spec))
            process.stdin.close()
            until(lambda: _connected(line, path, process), "its socket", START_S)
            yield Line(process, line, spec.epoch_ns)
        finally:
            process.kill()


def _connected(line: socket.socket, path: str, process: subprocess.Popen[bytes]) -> bool:
    assert process.poll() is None, "it gave up"
    return line.connect_ex(path) == 0


def test_a_real_process_does_not_grow(tmp_path: Path, publish: Publish) -> None:
    visitors = Visitors(Hasher(KEY, CONFIG.prefix.block_tokens), most_tokens=2, longest_tail=8)
    with worker(tmp_path) as line:
        assert isinstance(line.hear()[0], Ready)
        loaded_mb, rows = rss_mb(line.process.pid), CONFIG.batcher.step_tokens
        every = (visitors.ask_exactly(line.now_ns, prompt_of(n, 1 + n % rows), 1) for n in range(2 * rows))
        line.serve(visitors, every, at_a_time=1)
        line.serve(visitors, (visitors.ask(line.now_ns) for _ in range(WARM)), AT_A_TIME)
        before_mb, began_s = rss_mb(line.process.pid), time.monotonic()
        samples_mb = []
        for _ in range(4):
            line.serve(visitors, (visitors.ask(line.now_ns) for _ in range(REQUESTS // 4)), AT_A_TIME)
            samples_mb.append(round(rss_mb(line.process.pid), 1))
        took_s = time.monotonic() - began_s
    publish(
        "memory",
        [{
            "requests": REQUESTS, "s": round(took_s), "loaded MB": round(loaded_mb, 1), "warm MB": round(before_mb, 1),
            "after each quarter MB": samples_mb, "ends": dict(visitors.ends),
        }],
    )  # fmt: skip
    assert visitors.ends.total() == REQUESTS + WARM + 2 * rows and visitors.ends["failed"] == 0
    assert max(samples_mb) - before_mb < GROWTH_MB

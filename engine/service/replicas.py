"""One replica process and the connection to it, over a unix socket; ``pool.py`` keeps them alive.

Cores are shared out on purpose: torch on the last ones, everything else on the first. Knows processes and sockets;
what is said on them is the machines' business.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from asyncio.subprocess import Process
from collections.abc import Callable
from pathlib import Path

import msgspec

from engine.errors import UserError
from engine.model.process import WorkerSpec, last_words
from engine.model.wire import Output, Ready
from engine.service.replica_line import ReplicaLine

START_TIMEOUT_S = 300.0  # converting weights on first use takes half a minute, a hub download longer


def share_cores(threads: int, replicas: int = 1, gateways: int = 1) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """(cores of gateway and load, cores of all replicas, torch threads of one); no pinning where they do not suffice.

    ``threads`` 0 = all but one core for each gateway, in equal parts. Replica n has ``threads`` cores from
    ``n * threads`` on. Torch beside an encoder on shared cores: a decode step grew from 89 to 2,448 ms; apart, from 136
    to 145 ms (measured on two cores).
    """
    cores = tuple(sorted(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else ()
    count = len(cores) or os.cpu_count() or 1
    threads = threads or max(1, (count - gateways) // replicas)
    others = len(cores) - threads * replicas
    if others < gateways:
        return (), (), threads
    return cores[:others], cores[others:], threads


async def launch(module: str, threads: int) -> Process:
    """A process that waits for a ``WorkerSpec`` on its stdin; torch's threads are settled before torch is imported."""
    env = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": str(max(1, threads))}
    return await asyncio.create_subprocess_exec(sys.executable, "-m", module, stdin=asyncio.subprocess.PIPE, env=env)


class ReplicaProcess(ReplicaLine):
    """One worker process and the connection to it. ``socket_path``: where the worker listens."""

    def __init__(self, hear: Callable[[Output], None], lost: Callable[[], None], socket_path: str) -> None:
        super().__init__(hear, lost)
        self._process: Process | None = None
        self.socket_path = socket_path
        self._met = False

    async def start(self, spec: WorkerSpec, standby: Process | None = None) -> Ready:
        """Spawn, connect, wait for the weights; UserError, the worker's own words if it had any, when it gave up.

        ``standby``: a process of ``launch`` that waits for a spec; it becomes this replica.
        """
        for left in (Path(self.socket_path), last_words(self.socket_path)):  # by a former life
            left.unlink(missing_ok=True)
        spec = msgspec.structs.replace(spec, socket_path=self.socket_path, parent=os.getpid())
        self._process = standby or await launch("engine.model.process", spec.threads)
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.msgpack.encode(spec))
        self._process.stdin.close()
        loop = asyncio.get_running_loop()
        deadline = loop.time() + START_TIMEOUT_S
        while True:
            with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
                await self.connect(self.socket_path)
                self._met = True
                break
            if self._process.returncode is not None:
                raise self._gave_up(self._process.returncode)
            if loop.time() > deadline:
                raise UserError(f"the replica process was not ready within {START_TIMEOUT_S:.0f} s")
            await asyncio.sleep(0.02)
        try:
            return await self.ready
        except ConnectionResetError:
            raise UserError("the replica process died before it was ready") from None

    def _gave_up(self, code: int) -> UserError:
        try:
            raw = last_words(self.socket_path).read_bytes()
        except FileNotFoundError:
            return UserError("the replica process gave up", why=f"exit code {code}; its own last words are above")
        return UserError(*msgspec.msgpack.decode(raw, type=tuple[str, str, str, str]))

    def kill(self) -> None:
        """At once, whatever it is doing; its end is noticed like any other."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()

    async def stop(self, grace_s: float = 5.0) -> None:
        """Hang up; the worker ends by itself, or is killed when its time is up. More than once is fine."""
        self.hang_up()
        if self._process is not None and self._process.returncode is None:
            if not self._met:
                self._process.terminate()  # it is still loading, and would not notice
            try:
                await asyncio.wait_for(self._process.wait(), grace_s)
            except TimeoutError:
                self._process.kill()
                await self._process.wait()

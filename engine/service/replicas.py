"""One replica process and the connection to it, over a unix socket; ``pool.py`` keeps them alive.

Cores are shared out on purpose: torch on the last ones, everything else on the first. Knows processes and sockets;
what is said on them is the machines' business.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import tempfile
from asyncio.subprocess import Process
from collections.abc import Callable
from pathlib import Path

import msgspec

from engine.errors import UserError
from engine.events import Ended
from engine.model.process import WorkerSpec, last_words
from engine.model.wire import Output, Ready, ToReplica, Unframer, Work, decode_from_replica, frame

START_TIMEOUT_S = 300.0  # converting weights on first use takes half a minute, a hub download longer


def share_cores(threads: int, replicas: int = 1) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """(cores of gateway and load, cores of all replicas, torch threads of one); no pinning where they do not suffice.

    ``threads`` 0 = all but one core, in equal parts. Replica n has ``threads`` cores from ``n * threads`` on. Torch
    beside an encoder on shared cores: a decode step grew from 89 to 2,448 ms; apart, from 136 to 145 ms (measured on
    two cores).
    """
    cores = tuple(sorted(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else ()
    count = len(cores) or os.cpu_count() or 1
    threads = threads or max(1, (count - 1) // replicas)
    others = len(cores) - threads * replicas
    if others < 1:
        return (), (), threads
    return cores[:others], cores[others:], threads


async def launch(module: str, threads: int) -> Process:
    """A process that waits for a ``WorkerSpec`` on its stdin; torch's threads are settled before torch is imported."""
    env = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": str(max(1, threads))}
    return await asyncio.create_subprocess_exec(sys.executable, "-m", module, stdin=asyncio.subprocess.PIPE, env=env)


class ReplicaProcess(asyncio.Protocol):
    """One worker process and the connection to it."""

    def __init__(self, hear: Callable[[Output], None], lost: Callable[[], None]) -> None:
        self._hear, self._lost = hear, lost
        self._unframer = Unframer()
        self._transport: asyncio.Transport | None = None
        self._process: Process | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="doorbuster-")
        self._ready: asyncio.Future[Ready] = asyncio.get_running_loop().create_future()
        self._met = self._closing = False
        self._open: set[int] = set()  # submissions that it has not ended
        self._heard = False  # since the last look
        self._silent_looks = 0

    @property
    def socket_path(self) -> str:
        """Where the worker listens; the folder is readable by this user alone."""
        return str(Path(self._folder.name) / "replica.sock")

    async def start(self, spec: WorkerSpec, standby: Process | None = None) -> Ready:
        """Spawn, connect, wait for the weights; UserError, the worker's own words if it had any, when it gave up.

        ``standby``: a process of ``launch`` that waits for a spec; it becomes this replica.
        """
        spec = msgspec.structs.replace(spec, parent=os.getpid())
        self._process = standby or await launch("engine.model.process", spec.threads)
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.msgpack.encode(spec))
        self._process.stdin.close()
        loop = asyncio.get_running_loop()
        deadline = loop.time() + START_TIMEOUT_S
        while True:
            with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
                await loop.create_unix_connection(lambda: self, self.socket_path)
                break
            if self._process.returncode is not None:
                raise self._gave_up(self._process.returncode)
            if loop.time() > deadline:
                raise UserError(f"the replica process was not ready within {START_TIMEOUT_S:.0f} s")
            await asyncio.sleep(0.02)
        return await self._ready

    def _gave_up(self, code: int) -> UserError:
        try:
            raw = last_words(self.socket_path).read_bytes()
        except FileNotFoundError:
            return UserError("the replica process gave up", why=f"exit code {code}; its own last words are above")
        return UserError(*msgspec.msgpack.decode(raw, type=tuple[str, str, str, str]))

    @property
    def connected(self) -> bool:
        """It was there when last looked."""
        return self._transport is not None

    def send(self, message: ToReplica) -> None:
        """Queue a message; to one that has gone, nothing is said."""
        if self._transport is None:
            return
        if isinstance(message, Work):
            self._heard = self._heard or not self._open  # its silence begins now
            self._open.add(message.submit.sid)
        self._transport.write(frame(message))

    def look(self) -> int:
        """For how many looks in a row, this one included, it has had work and said nothing in between."""
        self._silent_looks = self._silent_looks + 1 if self._open and not self._heard else 0
        self._heard = False
        return self._silent_looks

    def kill(self) -> None:
        """At once, whatever it is doing; its end is noticed like any other."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()

    async def stop(self, grace_s: float = 5.0) -> None:
        """Hang up; the worker ends by itself, or is killed when its time is up. More than once is fine."""
        self._closing = True
        if self._transport is not None:
            self._transport.close()
        if self._process is not None and self._process.returncode is None:
            if not self._met:
                self._process.terminate()  # it is still loading, and would not notice
            try:
                await asyncio.wait_for(self._process.wait(), grace_s)
            except TimeoutError:
                self._process.kill()
                await self._process.wait()
        self._folder.cleanup()

    # ------------------------------------------------------------ asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Connected; Ready follows."""
        self._transport, self._met = transport, True  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        """Frames from the worker."""
        for raw in self._unframer.feed(data):
            message = decode_from_replica(raw)
            if isinstance(message, Ready):
                self._ready.set_result(message)
            else:
                self._heard = True
                self._open.difference_update(event.sid for event in message.events if isinstance(event, Ended))
                self._hear(message)

    def connection_lost(self, exc: Exception | None) -> None:
        """The worker has gone, on our word or by itself."""
        self._transport = None
        if self._closing:
            self._ready.cancel()
            return
        if self._ready.done():
            self._lost()
        else:
            self._ready.set_exception(UserError("the replica process died before it was ready"))

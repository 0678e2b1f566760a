"""Several ingress processes over the same replicas: ``doorbuster serve --workers N``.

The supervisor is the process that the user started. It owns the replicas and the ingress processes, starts both anew
when they die, and answers no client: the kernel shares connections out among the ingress processes (``SO_REUSEPORT``).
A gateway that died leaves nothing at the replicas, its journal stays, and the next one has an index and files of its
own. What one gateway is told to forget, all forget.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import socket
import sys
import time
from asyncio.subprocess import Process
from collections import deque
from collections.abc import AsyncIterator, Coroutine
from functools import partial
from pathlib import Path
from typing import Any, Literal

import msgspec

from engine.config import Scenario
from engine.errors import UserError
from engine.service.auth import KeyRing
from engine.service.encoder import EncoderClient
from engine.service.ingress_words import (
    CalledOff,
    Channel,
    DrainNow,
    EncoderHangs,
    GivenUp,
    Hangs,
    IngressSpec,
    Refused,
    Up,
    Word,
)
from engine.service.keeper import SnapshotKeeper
from engine.service.listening import reserve
from engine.service.pool import PAUSE_MAX_S, PAUSE_S, WITHIN_S, ReplicaPool
from engine.service.replicas import share_cores
from engine.service.server import (
    HANG_UP_S,
    LOOPBACK,
    ServeOptions,
    hang_after_s,
    start_encoder,
    worker_specs,
)
from engine.service.shares import part_of_scenario, part_of_tenants

log = logging.getLogger(__name__)

START_S = 300.0  # an ingress process may convert a tokenizer or load an encoder first
GRACE_S = 2.0  # for one that has hung up, or was hung up on
LEAVE_S = 10.0  # beyond the drain: for last answers, a snapshot, the encoder's end


class Worker:
    """One ingress process after the other, in the same place."""

    def __init__(self, number: int, own: socket.socket, snapshot: str) -> None:
        self.number, self.own, self.snapshot = number, own, snapshot
        self.lives = 0
        self.deaths: deque[float] = deque()
        self.process: Process | None = None
        self.channel: Channel | None = None

    @property
    def pid(self) -> int:
        """Of the process that is there now, or was last."""
        return self.process.pid if self.process is not None else 0

    @property
    def url(self) -> str:
        """Where it alone answers, from this machine: its ``/metrics`` are nobody else's."""
        return f"http://{LOOPBACK}:{self.own.getsockname()[1]}"


class Supervisor:
    """Made on the asyncio loop that it lives on; ``supervising`` starts and stops it."""

    def __init__(self, scenario: Scenario, keys: KeyRing, options: ServeOptions, workers: int) -> None:
        """UserError when the port is taken."""
        self._scenario, self._keys, self._options, self._count = scenario, keys, options, workers
        self.epoch_ns = time.monotonic_ns()
        self.lost = asyncio.Event()  # no replica, or no ingress process, is left
        self.left: Literal["no replica", "no ingress process"] = "no replica"  # which of the two
        self.warm_answers = 0
        self._encoder: EncoderClient | None = None  # one for all: it has no state, and 0.3 GB of weights
        self._draining = False
        self._given_up: set[int] = set()  # replicas
        self._hopeless = 0  # workers
        self._gateways = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._port = reserve(options.host, options.port)
        self.workers = [
            Worker(n, reserve(LOOPBACK, 0), _numbered(scenario.snapshot.path, n)) for n in range(workers)
        ]
        self._hash_key = options.hash_key or self._kept_key() or secrets.token_bytes(16)
        self._hang_s = hang_after_s(scenario, options)
        self._pool = ReplicaPool(
            lambda output: None, self._lose, lambda replica: None, partial(self._over, "no replica"),
            scenario.replica_restarts, self._hang_s,
        )

    @property
    def url(self) -> str:
        """Where all of them answer."""
        host, port = self._port.getsockname()[:2]
        return f"http://{host}:{port}"

    async def start(self) -> None:
        """Replicas first, then all ingress processes at once; UserError when one gives up."""
        scenario, options = self._scenario, self._options
        own, cores, threads = share_cores(scenario.model.threads, scenario.replicas, self._count)
        if not options.pin_cores or scenario.upstreams:
            own = cores = ()
        if own:
            os.sched_setaffinity(0, own)  # the ingress processes inherit it
        if not scenario.upstreams:
            tenants = self._keys.tenants
            specs = worker_specs(scenario, tenants, options, self._hash_key, self.epoch_ns, cores, threads)
            await self._pool.start(specs)
        self._encoder, _ = await start_encoder(scenario, own)
        ups = await asyncio.gather(*(self._spawn(worker) for worker in self.workers))
        self.warm_answers = sum(up.warm_answers for up in ups)

    async def drain(self) -> None:
        """All at once: no new work, what runs may end. Returns when every ingress process has left."""
        self._draining = True
        for worker in self.workers:
            if worker.channel is not None:
                worker.channel.say(DrainNow())
        there = [worker.process for worker in self.workers if worker.process is not None]
        within_s = self._options.drain_s + HANG_UP_S + LEAVE_S
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await asyncio.gather(*(process.wait() for process in there))

    async def stop(self) -> None:
        """Whoever is left is killed; the replicas end when nobody is connected any more."""
        self._draining = True
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        for worker in self.workers:
            await _bury(worker)
            worker.own.close()
        self._port.close()
        if self._encoder is not None:
            await self._encoder.stop()
        await self._pool.stop()

    # ------------------------------------------------------------ ingress processes

    async def _spawn(self, worker: Worker) -> Up:
        """A new life; UserError, in its own words if it had any, when it gives up."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        up: asyncio.Future[Up] = asyncio.get_running_loop().create_future()
        gone = asyncio.Event()
        with theirs:
            worker.process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "engine.service.ingress_process", str(theirs.fileno()),
                stdin=asyncio.subprocess.DEVNULL, pass_fds=[theirs.fileno()],
            )
        worker.channel = channel = Channel(partial(self._hear, worker, up), gone.set)
        await asyncio.get_running_loop().create_unix_connection(lambda: channel, sock=ours)
        channel.say(self._spec(worker))
        for replica in self._given_up:
            channel.say(GivenUp(replica))
        if self._draining:
            channel.say(DrainNow())
        ended = asyncio.create_task(gone.wait())
        ends: list[asyncio.Future[Any]] = [up, ended]
        try:
            await asyncio.wait(ends, timeout=START_S, return_when=asyncio.FIRST_COMPLETED)
        finally:
            ended.cancel()
        if not up.done():
            code = await _bury(worker)
            raise UserError("an ingress process gave up", why=f"exit code {code}; its own last words are above")
        if up.exception() is not None:
            await _bury(worker)
        told = up.result()
        self._keep(self._await_end(worker, gone))
        return told

    def _spec(self, worker: Worker) -> IngressSpec:
        scenario, options, count = self._scenario, self._options, self._count
        worker.lives += 1
        gateway, self._gateways = self._gateways, self._gateways + 1
        part = part_of_scenario(scenario, count)
        if part.snapshot.path:
            part = msgspec.structs.replace(
                part, snapshot=msgspec.structs.replace(part.snapshot, path=worker.snapshot)
            )
        upstreams = bool(scenario.upstreams)
        return IngressSpec(
            worker=worker.number, gateway=gateway,
            name=f"{worker.number}" + (f"-life-{worker.lives}" if worker.lives > 1 else ""), scenario=part,
            digests=self._keys.digests, tenants=part_of_tenants(self._keys.tenants, count), admins=self._keys.admins,
            host=options.host, port=self._port.getsockname()[1], own_port=worker.own.getsockname()[1],
            folder=str(options.folder or ""), drain_s=options.drain_s, hash_key=self._hash_key, epoch_ns=self.epoch_ns,
            replicas=() if upstreams else tuple(map(self._pool.socket_path, range(scenario.replicas))),
            hang_s=self._hang_s, encoder=self._encoder.path if self._encoder is not None else "",
        )

    def _hear(self, worker: Worker, up: asyncio.Future[Up], word: Word) -> None:
        match word:
            case Up():
                up.set_result(word)
            case Refused(what=what, where=where, why=why, fix=fix):
                up.set_exception(UserError(what, where, why, fix))
            case Hangs(replica=replica):
                self._pool.kill(replica, f"has work and has said nothing for {self._hang_s:g} s")
            case EncoderHangs() if self._encoder is not None:
                self._encoder.kill()
            case CalledOff():
                self._tell_all(word, but=worker)
            case _:
                pass

    def _tell_all(self, word: Word, but: Worker | None = None) -> None:
        for worker in self.workers:
            if worker.channel is not None and worker is not but:
                worker.channel.say(word)

    async def _await_end(self, worker: Worker, gone: asyncio.Event) -> None:
        """What follows from an ingress process's death."""
        await gone.wait()
        if self._draining:
            return
        code = await _bury(worker)
        if worker.snapshot:  # it did not hear what was called off since, and its next life must not bring that back
            try:
                Path(worker.snapshot).expanduser().unlink(missing_ok=True)
            except OSError as error:
                log.error("snapshot %s cannot be removed: its process goes on without one (%s)", worker.snapshot, error)
                worker.snapshot = ""
        died_s = time.monotonic()
        worker.deaths.append(died_s)
        while True:
            now_s = time.monotonic()
            while worker.deaths and worker.deaths[0] < now_s - WITHIN_S:
                worker.deaths.popleft()
            tries = len(worker.deaths)
            if tries > self._scenario.replica_restarts:
                log.error("ingress process %d is given up after %d deaths in a minute", worker.number, tries)
                self._hopeless += 1
                if self._hopeless == self._count:
                    self._over("no ingress process")
                return
            log.error("ingress process %d has died (%d): it is started anew", worker.number, code)
            await asyncio.sleep(min(PAUSE_MAX_S, PAUSE_S * (2 ** (tries - 1) - 1)))
            try:
                await self._spawn(worker)
            except (UserError, OSError) as error:
                log.error("ingress process %d could not be started anew: %s", worker.number, error)
                worker.deaths.append(time.monotonic())
                continue
            log.warning("ingress process %d is back after %.1f s", worker.number, time.monotonic() - died_s)
            return

    # ------------------------------------------------------------ replicas

    def _lose(self, replica: int, for_good: bool) -> None:
        """Its gateways hear of a death from the connection; of its end for good, from here."""
        if for_good:
            self._given_up.add(replica)
            self._tell_all(GivenUp(replica))

    def _over(self, left: Literal["no replica", "no ingress process"]) -> None:
        self.left = left
        self.lost.set()

    # ------------------------------------------------------------ small things

    def _keep(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _kept_key(self) -> bytes:
        """Of the first snapshot: what was kept is found under no other."""
        first = self.workers[0].snapshot
        if not first:
            return b""
        return SnapshotKeeper(msgspec.structs.replace(self._scenario.snapshot, path=first)).hash_key


@contextlib.asynccontextmanager
async def supervising(
    scenario: Scenario, keys: KeyRing, options: ServeOptions, workers: int
) -> AsyncIterator[Supervisor]:
    """Start everything; stop everything at the end. A start that fails half-way leaves nothing behind but files."""
    before = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    supervisor = Supervisor(scenario, keys, options, workers)
    try:
        await supervisor.start()
        yield supervisor
    finally:
        await supervisor.stop()
        if before:
            os.sched_setaffinity(0, before)


async def _bury(worker: Worker) -> int:
    """Its process has ended when this returns; the exit code. Alone it leaves by itself, or its time is up."""
    if worker.channel is not None:
        worker.channel.close()
    if worker.process is None:
        return 0
    try:
        return await asyncio.wait_for(worker.process.wait(), GRACE_S)
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            worker.process.kill()
        return await worker.process.wait()


def _numbered(path: str, worker: int) -> str:
    """A snapshot of each one's own."""
    return str(Path(path).with_stem(f"{Path(path).stem}-{worker}")) if path else ""

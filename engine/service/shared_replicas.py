"""The way from one of several gateways to replicas that all of them share: a ``ReplicaLink`` for who starts none.

A replica's address is the path of its socket, in every life the same. Where nobody listens a gateway tries again, so
that it need not be told when a replica is back; that one has died is what a broken connection says. Killing one that
hangs, and giving one up, are the supervisor's business.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from engine.events import Drain, Ended, Invalidate
from engine.model.wire import Hello, Output, Ready, ToReplica, Work
from engine.service.pool import LOOKS
from engine.service.replica_line import ReplicaLine

RETRY_S = 0.05  # between two knocks at a socket that nobody listens at
ALL_WITHIN_S = 5.0  # at the start: later, those that are there must do


@dataclass(frozen=True, slots=True)
class Sibling:
    """What makes a gateway one of several over the same replicas."""

    gateway: int  # its machine's index
    name: str  # of its journal and ledger
    epoch_ns: int  # all of them count from here
    replicas: tuple[str, ...]  # their sockets; () = there are upstreams instead
    hang_s: float
    hangs: Callable[[int], None]  # who kills a replica that has work and says nothing
    encoder: str  # its socket; "" = there is none
    encoder_hangs: Callable[[], None]  # who kills it
    tell_others: Callable[[Invalidate], None]
    own_port: int  # on loopback, of this one alone


class SharedReplicas:
    """Made on the asyncio loop that it lives on. ``lost``, ``back``: of a replica, by number."""

    def __init__(
        self, sibling: Sibling, hear: Callable[[Output], None], lost: Callable[[int, bool], None],
        back: Callable[[int], None],
    ) -> None:
        """``hang_s``: work and no word for so long, at most a quarter more, and ``hangs`` is told."""
        self._gateway, self._paths, self._hang_s = sibling.gateway, sibling.replicas, sibling.hang_s
        self._hear, self._lost, self._back, self._hangs = hear, lost, back, sibling.hangs
        self._there: dict[int, ReplicaLine] = {}
        self._ready: list[asyncio.Future[Ready]] = []  # of each replica's first life that was met
        self._greeted = False
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def up(self) -> tuple[int, ...]:
        """Replicas that are there."""
        return tuple(sorted(self._there))

    async def start(self) -> Ready:
        """Wait for all, but not long for more than one."""
        loop = asyncio.get_running_loop()
        self._ready = [loop.create_future() for _ in self._paths]
        self._tasks = [asyncio.create_task(self._keep(n, path)) for n, path in enumerate(self._paths)]
        await asyncio.wait(self._ready, timeout=ALL_WITHIN_S)
        done, _ = await asyncio.wait(self._ready, return_when=asyncio.FIRST_COMPLETED)
        self._tasks.append(asyncio.create_task(self._watch()))
        return done.pop().result()

    def greet(self) -> None:
        """Whoever hears is ready to hear."""
        self._greeted = True
        for line in self._there.values():
            line.send(Hello(self._gateway))

    def send(self, replica: int, message: ToReplica) -> None:
        """See ``driver.ReplicaLink``. One gateway's drain is not the others'."""
        if isinstance(message, Drain):
            return
        if line := self._there.get(replica):
            line.send(message)
        elif isinstance(message, Work):
            asyncio.get_running_loop().call_soon(self._hear, Output([Ended(message.submit.sid, "lost")]))

    async def stop(self) -> None:
        """Hang up on all of them. More than once is fine."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        self._tasks = []

    async def _keep(self, number: int, path: str) -> None:
        """One life of a replica after the other."""
        while True:
            gone = asyncio.Event()
            line = ReplicaLine(self._hear, gone.set)
            try:
                await line.connect(path)
                ready = await line.ready
            except OSError:
                await asyncio.sleep(RETRY_S)
                continue
            except asyncio.CancelledError:
                line.hang_up()
                raise
            self._there[number] = line
            if not self._ready[number].done():
                self._ready[number].set_result(ready)
            if self._greeted:
                self._back(number)
                line.send(Hello(self._gateway))
            try:
                await gone.wait()
            finally:
                del self._there[number]
                line.hang_up()
            self._lost(number, False)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._hang_s / LOOKS)
            for number, line in self._there.items():
                if line.look() >= LOOKS:
                    self._hangs(number)

"""All replica processes of a gateway, kept alive: the live ``ReplicaLink``.

A replica that dies is said to be lost at once, started anew, and said to be back when its weights are loaded. A process
on standby has imported everything by then, so that it takes half the time; a second death within a minute waits for a
pause that doubles. One that has died too often is given up (a start that fails is tried for ever, with pauses); when
none is left, the pool is. One that hangs, which is to
say has work and stays silent, is killed, and then it has died.
"""

from __future__ import annotations

import asyncio
import logging
import tempfile
import time
from asyncio.subprocess import Process
from collections import deque
from collections.abc import Callable, Coroutine
from pathlib import Path

import msgspec

from engine.errors import UserError
from engine.events import Ended
from engine.model.process import WorkerSpec
from engine.model.wire import Output, Ready, ToReplica, Work
from engine.service.replicas import ReplicaProcess, launch

log = logging.getLogger(__name__)

WITHIN_S = 60.0  # deaths of before are forgiven
PAUSE_S, PAUSE_MAX_S = 0.2, 10.0
# every step says something, if only that less is queued; with a calibration `batcher.max_step_ms` says how long one may
# be (without one the server allows more): 40 times that is 10 s by default, 4 times the longest step ever seen (2.4 s,
# torch and encoder on one core)
HANG_STEPS = 40
LOOKS = 4  # in a row without a word. Counted, not timed: who has slept with it has looked once


class ReplicaPool:
    """Made on the asyncio loop that it lives on. ``lost``, ``back``: of a replica, by number; ``dead``: of all."""

    def __init__(
        self, hear: Callable[[Output], None], lost: Callable[[int, bool], None], back: Callable[[int], None],
        dead: Callable[[], None], restarts: int, hang_s: float,
    ) -> None:
        """``hang_s``: work and no word for so long, at most a quarter more, and it is killed."""
        self.hang_s = hang_s
        self._folder = tempfile.TemporaryDirectory(prefix="doorbuster-")  # readable by this user alone
        self._standby: Process | None = None
        self._standing_by = False  # one is being started
        self._hear, self._lost, self._back, self._dead, self._restarts = hear, lost, back, dead, restarts
        self._there: dict[int, ReplicaProcess] = {}
        self._lines: set[ReplicaProcess] = set()  # all that have not been stopped
        self._deaths: dict[int, deque[float]] = {}
        self._given_up: set[int] = set()
        self._specs: list[WorkerSpec] = []
        self._keepers: set[asyncio.Task[None]] = set()
        self._closing = False
        self.restart_s: list[float] = []  # from each death to being back

    @property
    def up(self) -> tuple[int, ...]:
        """Replicas that are there."""
        return tuple(sorted(self._there))

    def socket_path(self, replica: int) -> str:
        """Where it listens, in each of its lives."""
        return str(Path(self._folder.name) / f"replica-{replica}.sock")

    def kill(self, replica: int, why: str) -> None:
        """It hangs. One that is not there is none."""
        if line := self._there.get(replica):
            log.error("replica %d %s: it is killed", replica, why)
            line.kill()

    async def start(self, specs: list[WorkerSpec]) -> list[Ready]:
        """All at once; UserError when one gives up. ``socket_path`` of the specs is ours to say."""
        self._specs = specs
        self._deaths = {n: deque() for n in range(len(specs))}
        starts = [asyncio.create_task(self._spawn(n, spec)) for n, spec in enumerate(specs)]
        self._keep(self._stand_by())
        ready = await asyncio.gather(*starts)
        self._keep(self._watch())
        return list(ready)

    def send(self, replica: int, message: ToReplica) -> None:
        """See ``driver.ReplicaLink``. What is submitted to a lost replica is lost too."""
        if there := self._there.get(replica):
            there.send(message)
        elif isinstance(message, Work):
            asyncio.get_running_loop().call_soon(self._hear, Output([Ended(message.submit.sid, "lost")]))

    async def stop(self) -> None:
        """Hang up on all of them. More than once is fine."""
        self._closing = True
        for keeper in self._keepers:
            keeper.cancel()
        if self._keepers:
            await asyncio.wait(self._keepers)
        if (standby := self._standby) is not None and standby.returncode is None:
            standby.kill()
            await standby.wait()
        await asyncio.gather(*(line.stop() for line in self._lines))
        self._lines.clear()
        self._folder.cleanup()

    def _keep(self, keeper: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(keeper)
        self._keepers.add(task)
        task.add_done_callback(self._keepers.discard)

    async def _stand_by(self) -> None:
        """A process for whoever dies next. The fake model has nothing that could be imported beforehand."""
        if not self._restarts or self._specs[0].model.name == "fake" or self._standing_by:
            return
        self._standing_by = True
        try:
            self._standby = await launch("engine.model.standby", self._specs[0].threads)
        except OSError as error:
            log.warning("no standby process: %s", error)
        finally:
            self._standing_by = False

    async def _watch(self) -> None:
        """Kill those that have work and say nothing."""
        while True:
            await asyncio.sleep(self.hang_s / LOOKS)
            for number, line in self._there.items():
                if line.look() >= LOOKS:
                    self.kill(number, f"has work and has said nothing for {self.hang_s:g} s")

    async def _spawn(self, number: int, spec: WorkerSpec) -> Ready:
        line = ReplicaProcess(self._hear, lambda: self._died(number, line), self.socket_path(number))
        self._lines.add(line)
        standby, self._standby = self._standby, None
        if standby is not None and standby.returncode is not None:
            standby = None
        try:
            ready = await line.start(spec, standby)
        except (UserError, OSError):
            await line.stop(0.0)
            self._lines.discard(line)
            raise
        if line.connected:
            self._there[number] = line
        return ready

    def _died(self, number: int, line: ReplicaProcess) -> None:
        """Its connection broke. The rest of the story is told by a task."""
        self._there.pop(number, None)
        now_s = time.monotonic()
        deaths = self._deaths[number]
        deaths.append(now_s)
        while deaths[0] < now_s - WITHIN_S:
            deaths.popleft()
        given_up = len(deaths) > self._restarts
        log.error(
            "replica %d has died: answers that had begun end now; %s", number,
            f"it is given up after {len(deaths)} deaths in a minute" if given_up else "it is started anew",
        )
        self._lost(number, given_up)
        if given_up:
            self._given_up.add(number)
            if len(self._given_up) == len(self._specs):
                self._dead()
        elif not self._closing:
            self._keep(self._revive(number, line, now_s))

    async def _revive(self, number: int, line: ReplicaProcess, died_s: float) -> None:
        """A new process for one that was lost; its journal goes beside the old one's."""
        await line.stop(0.5)  # dead, or cut off in the middle of a step
        self._lines.discard(line)
        tries = len(self._deaths[number])
        while True:
            await asyncio.sleep(min(PAUSE_MAX_S, PAUSE_S * (2 ** min(tries - 1, 10) - 1)))
            spec = self._specs[number]
            try:
                await self._spawn(number, msgspec.structs.replace(spec, journal=next_life(spec.journal)))
                break
            except (UserError, OSError) as error:  # no memory for a process, no disk: that may pass
                log.error("replica %d could not be started anew: %s", number, error)
                tries += 1
        if number in self._there:
            self.restart_s.append(time.monotonic() - died_s)
            log.warning("replica %d is back after %.1f s", number, self.restart_s[-1])
            self._back(number)
        if self._standby is None:
            await self._stand_by()


def next_life(journal: str) -> str:
    """``replica-0.ndjson`` is a life's journal; the next life's is ``replica-0-life-2.ndjson``. "" stays ""."""
    path, life = Path(journal), 1
    while journal and path.exists():
        life += 1
        path = Path(journal).with_stem(f"{Path(journal).stem}-life-{life}")
    return str(path) if journal else ""

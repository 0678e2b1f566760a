"""A world for the live drivers without waiting: an asyncio loop whose clock jumps, and a replica in the same process.

Everything else is the real thing: GatewayDriver, ReplicaDriver, both machines, the fake model's words.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable

import numpy as np

from engine.events import StepFailed
from engine.model.fake import FakeRunner
from engine.model.stepping import StepResult
from engine.model.wire import Output, ToReplica
from engine.model.worker import ReplicaDriver
from engine.service.similar import Done
from engine.stepcost import StepCost
from engine.units import S_NS
from sim.twin.driver import Fails, never
from sim.twin.encoder import Call, EncoderCost, EncoderServer


class _NoWait(selectors.SelectSelector):
    """Never sleeps: when nothing is ready, the loop's clock goes to the next timer instead."""

    loop: VirtualLoop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready and timeout != 0:
            if timeout is None:
                raise RuntimeError("deadlock: nothing is ready and no timer is set")
            self.loop.jump()
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """``time()`` stands still while callbacks run and jumps to the next timer when none is ready."""

    def __init__(self) -> None:
        selector = _NoWait()
        super().__init__(selector)
        selector.loop = self
        self._now_s = 0.0
        self._clock_resolution = 1e-10  # less than half a nanosecond: timers that differ do not fire together

    def time(self) -> float:
        return self._now_s

    def jump(self) -> None:
        """To the next timer."""
        self._now_s = max(self._now_s, self._scheduled[0]._when)  # type: ignore[attr-defined]

    def now_ns(self) -> int:
        """Exact: a float second holds nanoseconds without loss for months."""
        return round(self._now_s * S_NS)


class VirtualEncoder:
    """The driver's Encoder on the virtual loop: the twin's own server with the twin's costs."""

    def __init__(self, loop: VirtualLoop, cost: EncoderCost, vectors: dict[bytes, np.ndarray]) -> None:
        self._loop = loop
        self._server = EncoderServer(loop.now_ns, self._later, cost, vectors)

    def encode(self, text_key: bytes, text: str, deadline_s: float, done: Done) -> Call | None:
        return self._server.encode(text_key, self._loop.now_ns() + round(deadline_s * S_NS), done)

    def cancel(self, call: Call) -> None:
        self._server.cancel(call)

    def _later(self, wait_ns: int, call: Callable[[], None]) -> None:
        self._loop.call_at((self._loop.now_ns() + wait_ns) / S_NS, call)


class Links:
    """The driver's ReplicaLink: all replicas, in this process."""

    def __init__(self) -> None:
        self.replicas: list[InProcessReplica] = []

    def send(self, replica: int, message: ToReplica) -> None:
        self.replicas[replica].put(message)


class InProcessReplica:
    """A replica driver as a task on the same loop; steps take exactly what they cost."""

    def __init__(
        self, loop: VirtualLoop, driver: ReplicaDriver, runner: FakeRunner, cost: StepCost,
        hear: Callable[[Output], None], fails: Fails = never,
    ) -> None:
        self._fails = fails
        self._loop, self._driver, self._runner, self._cost, self._hear = loop, driver, runner, cost, hear
        self._mailbox: list[ToReplica] = []
        self._news = asyncio.Event()

    def put(self, message: ToReplica) -> None:
        self._mailbox.append(message)
        self._news.set()

    async def run(self) -> None:
        """Until cancelled."""
        idle = True
        while True:
            if idle:
                await self._news.wait()
            self._news.clear()
            messages, self._mailbox = self._mailbox, []
            step, output = self._driver.begin(self._loop.now_ns(), messages)
            self._tell(output)
            idle = step is None
            if step is None:
                continue
            end_ns = began_ns = self._loop.now_ns()
            most = self._runner.counting.steps_until_end(step) if step.at_most > 1 else 1
            for ran in range(1, most + 1):
                end_ns += self._cost.ns(step.shape, ran - 1)
                await self._until(end_ns)
                if self._mailbox:
                    break
            broken = self._fails(self._driver.machine.config.index, began_ns)
            failed = StepResult(StepFailed("a fault of the scenario"), [])
            result = failed if broken else self._runner.advance(step, ran)
            self._tell(self._driver.finish(self._loop.now_ns(), result))

    def _tell(self, output: Output | None) -> None:
        if output is not None:
            self._loop.call_soon(self._hear, output)

    async def _until(self, when_ns: int) -> None:
        done = self._loop.create_future()
        self._loop.call_at(when_ns / S_NS, done.set_result, None)
        await done

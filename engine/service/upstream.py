"""One upstream: the lane before it, the requests that it has, and whether it is there.

Drives a ``Lane`` as ``driver.py`` drives the gateway: stamps the time, hands events in, carries actions out, re-arms a
timer. A request is a task; cancelling it hangs up. It is looked at every second. Whoever misses some looks in a row, or
refuses connections as often, is lost, unless something was heard from it meanwhile: a server that computes on all its
cores may be late with everything but tokens. What it had ends then, and the next good look brings it back.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path

from engine.config import LaneConfig
from engine.events import Ended, Wake
from engine.lane_events import Dispatch, Done, Heard, LaneAction, LaneEvent, Recall
from engine.ledger.journal import JournalWriter
from engine.model.wire import Output, ToReplica, Work
from engine.policy.lane import Lane, LaneStats
from engine.service.alarm import Alarm
from engine.service.pool import next_life
from engine.service.upstream_call import Called, call, client_of, first_model, look
from engine.service.upstream_words import Broken
from engine.upstream_config import UpstreamConfig

log = logging.getLogger(__name__)

Call = asyncio.Task[Called]


class Upstream:
    """Made on the asyncio loop that it lives on. ``lost`` and ``back`` are told once for each change."""

    def __init__(
        self, name: str, config: UpstreamConfig, lane: LaneConfig, clock_ns: Callable[[], int],
        hear: Callable[[Output], None], hear_text: Callable[[int, str], None],
        lost: Callable[[], None], back: Callable[[], None], journal: str = "",
    ) -> None:
        """``journal``: a file for what its lane is told and does; each life has one of its own. "" = none."""
        self.name, self.config, self.up = name, config, False
        self.why_not = "nobody has looked yet"
        self._lane, self._clock_ns, self._last_ns = Lane(lane), clock_ns, 0
        self._journal_path: str = journal
        self._journal: JournalWriter | None = None  # while it is up
        self._hear, self._hear_text, self._lost, self._back = hear, hear_text, lost, back
        self._client = client_of(config, name)
        self._model = config.model
        self._works: dict[int, Work] = {}  # of submissions that have not ended
        self._calls: dict[int, Call] = {}
        self._begun: set[int] = set()  # of these, those with a first token
        self._hung_up: set[Call] = set()  # of a life before this one: nobody listens to them
        self._heard_since_look = False
        self._misses = 0
        self._inbox: deque[LaneEvent] = deque()
        self._busy = False
        self._alarm = Alarm(clock_ns, self._ring)

    # ------------------------------------------------------------ what the pool calls

    def send(self, message: ToReplica) -> None:
        """See ``driver.ReplicaLink``; only while it is up."""
        if isinstance(message, Work):
            self._works[message.submit.sid] = message
            self._deliver(message.submit)
        else:
            self._deliver(message)

    def stats(self) -> LaneStats:
        """The lane's."""
        return self._lane.stats()

    @property
    def model(self) -> str:
        """What it calls its model."""
        return self._model

    async def look(self) -> None:
        """Is it there? Tells of a change."""
        heard, self._heard_since_look = self._heard_since_look, False
        why = await look(self._client, self.config)
        if why is None and not self._model:
            try:
                self._model = await first_model(self._client, self.config)
            except Broken as broken:
                why = str(broken)
        if why is None:
            self._misses = 0
            if not self.up:
                self.up, self.why_not = True, ""
                if path := next_life(self._journal_path):
                    self._journal = JournalWriter(Path(path), "lane", self._lane.config, b"")
                log.warning("upstream %s is there (%s)", self.name, self._model)
                self._back()
        elif not heard and not self._heard_since_look:
            self._miss(why)

    async def watch(self) -> None:
        """Look again and again."""
        while True:
            await asyncio.sleep(self.config.health_ms / 1000)
            await self.look()

    async def close(self) -> None:
        """Hang up on everything. No more words."""
        self._hang_up()
        if self._hung_up:
            await asyncio.wait(self._hung_up)
        await self._client.aclose()

    def flush(self) -> None:
        """What its lane did is with the kernel."""
        if self._journal is not None:
            self._journal.flush()

    # ------------------------------------------------------------ there or not

    def _miss(self, why: str) -> None:
        self._misses += 1
        self.why_not = why
        if self.up and self._misses >= self.config.health_misses:
            log.error("upstream %s is lost: %s", self.name, why)
            self.up = False
            self._hang_up()
            self._lost()

    def _hang_up(self) -> None:
        """Its queue goes with it; whoever is to hear of that is told by the pool's owner."""
        for task in self._calls.values():
            self._hung_up.add(task)
            task.cancel()
        self._calls, self._works, self._begun = {}, {}, set()
        self._lane = Lane(self._lane.config)
        if self._journal is not None:
            self._journal.close()
            self._journal = None
        self._inbox.clear()
        self._alarm.set(self._lane.next_wake_ns())

    # ------------------------------------------------------------ the lane's driver

    def _deliver(self, event: LaneEvent) -> None:
        self._inbox.append(event)
        if self._busy:
            return
        self._busy = True
        try:
            while self._inbox:
                self._last_ns = max(self._last_ns, self._clock_ns())
                event = self._inbox.popleft()
                actions = self._lane.handle(self._last_ns, event)
                if self._journal is not None:
                    self._journal.write(self._last_ns, event, actions)
                self._carry_out(actions)
        finally:
            self._busy = False
        self._alarm.set(self._lane.next_wake_ns())

    def _carry_out(self, actions: list[LaneAction]) -> None:
        told = Output([])
        for action in actions:
            match action:
                case Dispatch(sid=sid):
                    work = self._works[sid]
                    task = asyncio.create_task(call(self._client, work, self._model, partial(self._text, sid)))
                    self._calls[sid] = task
                    task.add_done_callback(partial(self._over, sid))
                case Recall(sid=sid):
                    self._calls[sid].cancel()
                case _:
                    told.events.append(action)
                    if isinstance(action, Ended):
                        del self._works[action.sid]
        if told.events:
            self._hear(told)

    def _text(self, sid: int, text: str) -> None:
        self._heard_since_look = True
        self._hear_text(sid, text)
        if sid not in self._begun:
            self._begun.add(sid)
            self._deliver(Heard(sid))

    def _over(self, sid: int, task: Call) -> None:
        self._hung_up.discard(task)
        if self._calls.get(sid) is not task:
            return  # of a life before this one
        del self._calls[sid]
        self._begun.discard(sid)
        if task.cancelled():
            called = Called(Done(sid, "aborted"))
        elif (error := task.exception()) is not None:
            log.error("upstream %s, submission %d", self.name, sid, exc_info=error)
            called = Called(Done(sid, "failed"), "our own fault")
        else:
            called = task.result()
        if called.why:
            level = logging.DEBUG if called.done.reason == "busy" else logging.WARNING  # the first come in hundreds
            log.log(level, "upstream %s, submission %d: %s (%s)", self.name, sid, called.done.reason, called.why)
        self._deliver(called.done)
        if not called.reached:
            self._miss(called.why)

    def _ring(self, wake_ns: int) -> None:
        self._last_ns = max(self._last_ns, wake_ns)
        self._deliver(Wake())

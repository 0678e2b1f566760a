"""The one client of Redis in a process: collects the commands of half a millisecond and sends them in one write.

A caller that is cancelled drops its own waiter and nothing else: the command keeps its place in the line, and its reply
finds nobody. Every call ends within ``budget_ms``, with a reply or with ``RedisAway``; then the connection is given up
too. A breaker keeps a Redis that is away from costing every request its budget; it decides when to try again, and the
next call that it lets through connects anew. Nothing is tried twice here: a write whose reply was lost may have been
done, and only its sender knows how to ask.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from engine.config import BreakerConfig
from engine.policy.breaker import Breaker, BreakerStats
from engine.redis_config import SharedConfig
from engine.service.redis_connection import Connection, RedisAway, RedisRefused, Word, address, connect, the_hiredis
from engine.units import S_NS
from engine.values import Struct

REDIS_BREAKER = BreakerConfig(  # doing without is cheap and a wait is not: trips early, tries again soon
    window="count", window_size=20, minimum_calls=5, slow_share=1.0, slow_ms=0, open_ms=250, open_max_ms=2000,
    half_open_permits=2, half_open_max_ms=500,
)
AWAY_CODES = ("LOADING", "BUSY", "READONLY", "MASTERDOWN", "CLUSTERDOWN", "OOM", "MISCONF", "TRYAGAIN", "NOREPLICAS")
"""Error replies that say: not now, whoever asks."""


class Script(NamedTuple):
    """Lua, and the name under which the server may have kept it."""

    body: bytes
    digest: str


def script(name: str) -> Script:
    """One of the files beside this module."""
    body = Path(__file__).with_name(name).read_bytes()
    return Script(body, hashlib.sha1(body).hexdigest())


class ActorStats(Struct):
    """Since the start. ``calls`` = replies + refused + errors + away, once none is waiting."""

    calls: int
    replies: int
    errors: int  # replies that are a mistake of ours
    away: int  # given up: overdue, lost, or "not now"
    refused: int  # not sent: the breaker was open, or too many wait
    batches: int
    connections: int
    evals: int  # scripts sent whole, because the server did not know them
    waiting: int
    breaker: BreakerStats


class _Call:
    """A command, whoever waits for its reply, and the breaker's permit."""

    __slots__ = ("actor", "deadline_ns", "future", "permit", "script", "words")

    def __init__(
        self, actor: RedisActor, words: tuple[Word, ...], whole: Script | None, permit: int, deadline_ns: int
    ) -> None:
        self.actor, self.words, self.script, self.permit, self.deadline_ns = actor, words, whole, permit, deadline_ns
        self.future: asyncio.Future[Any] = actor.loop.create_future()

    def replied(self, reply: Any) -> None:
        self.actor.replied(self, reply)

    def lost(self, error: RedisAway) -> None:
        self.actor.lost(self, error)


class RedisActor:
    """Owned by one event loop. Make it within a running loop; ``close`` it there."""

    def __init__(
        self, config: SharedConfig, breaker: Breaker | None = None, clock_ns: Callable[[], int] = time.monotonic_ns
    ) -> None:
        """``clock_ns``: never goes back. Raises UserError for a url that is none, and without hiredis."""
        the_hiredis()  # at the start, not in the first connection's task
        self._config, self._where = config, address(config.url)
        self._breaker = breaker or Breaker(REDIS_BREAKER)
        self._clock_ns = clock_ns
        self.loop = asyncio.get_running_loop()
        self._outbox: list[_Call] = []
        self._open: deque[_Call] = deque()  # sent or not, oldest first; those that have ended leave when they are first
        self._ended: set[_Call] = set()
        self._connection: Connection | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._tick: asyncio.TimerHandle | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._calls = self._replies = self._errors = self._away = self._refused = 0
        self._batches = self._connections = self._evals = 0

    async def call(self, *words: Word) -> Any:
        """One command's reply. Raises RedisAway, within the budget; RedisRefused for a command that is wrong."""
        return await self._ask(words, None)

    async def run(self, lua: Script, keys: Sequence[Word], args: Sequence[Word]) -> Any:
        """A script's reply: by its digest, and whole if the server does not know it. Raises as ``call`` does."""
        return await self._ask(("EVALSHA", lua.digest, len(keys), *keys, *args), lua)

    def _ask(self, words: tuple[Word, ...], whole: Script | None) -> asyncio.Future[Any]:
        self._calls += 1
        now_ns = self._clock_ns()
        if self.waiting >= self._config.max_waiting:
            self._refused += 1
            raise RedisAway("too many calls wait already")
        permit = self._breaker.acquire(now_ns)
        if permit is None:
            self._refused += 1
            raise RedisAway("the breaker is open")
        asked = _Call(self, words, whole, permit, now_ns + self._config.budget_ns)
        self._outbox.append(asked)
        self._open.append(asked)
        if self._tick is None:
            self._tick = self.loop.call_later(self._config.tick_us / 1e6, self._flush)
        if self._timer is None:
            self._set_timer(asked, now_ns)
        return asked.future

    @property
    def waiting(self) -> int:
        """Calls that have not ended."""
        return len(self._open) - len(self._ended)

    # ------------------------------------------------------------ out

    def _flush(self) -> None:
        self._tick = None
        if not self._outbox:
            return
        if self._connection is None:
            if self._connecting is None:
                self._connecting = self.loop.create_task(self._connect(), name="redis: connect")
            return
        batch, self._outbox = self._outbox, []
        self._batches += 1
        self._connection.send((asked.words, asked) for asked in batch)

    async def _connect(self) -> None:
        try:
            async with asyncio.timeout(self._config.budget_ns / S_NS):
                connection = await connect(self._where, self._gone)
        except (OSError, TimeoutError, ValueError) as error:
            self._connecting = None
            self._lose_unsent(RedisAway(f"no connection: {error}"))
            return
        self._connecting, self._connection = None, connection
        self._connections += 1
        connection.send((words, _Greeting(connection)) for words in self._where.greeting())
        if not connection.is_open:  # hung up on before a word was said
            self._connection = None
            self._lose_unsent(RedisAway("the connection was lost"))
        self._flush()

    def _gone(self) -> None:
        self._connection = None

    # ------------------------------------------------------------ back

    def replied(self, asked: _Call, reply: Any) -> None:
        """The connection has it."""
        if not isinstance(reply, Exception):
            self._replies += 1
            self._end(asked, "ok")
            if not asked.future.done():
                asked.future.set_result(reply)
            return
        code = str(reply).partition(" ")[0]
        if code == "NOSCRIPT" and asked.script is not None and self._connection is not None:
            self._evals += 1
            asked.words, asked.script = ("EVAL", asked.script.body, *asked.words[2:]), None
            self._connection.send([(asked.words, asked)])
        elif code in AWAY_CODES:
            self.lost(asked, RedisAway(str(reply)))
        else:
            self._errors += 1
            self._end(asked, "ok")
            if not asked.future.done():
                asked.future.set_exception(RedisRefused(str(reply)))

    def lost(self, asked: _Call, error: RedisAway) -> None:
        """Nothing will come."""
        self._away += 1
        self._end(asked, "fail")
        if not asked.future.done():
            asked.future.set_exception(error)

    def _end(self, asked: _Call, verdict: Any) -> None:
        now_ns = self._clock_ns()
        self._breaker.release(now_ns, asked.permit, verdict)
        self._ended.add(asked)
        while self._open and self._open[0] in self._ended:
            self._ended.discard(self._open.popleft())

    # ------------------------------------------------------------ overdue

    def _set_timer(self, first: _Call, now_ns: int) -> None:
        self._timer = self.loop.call_later(max(0, first.deadline_ns - now_ns) / S_NS, self._look)

    def _look(self) -> None:
        """One timer for all, set for the oldest: budgets are equal, so it is due first."""
        self._timer = None
        now_ns = self._clock_ns()
        if self._open and self._open[0].deadline_ns <= now_ns:
            self._drop("no reply within the budget")
        if self._open:
            self._set_timer(self._open[0], now_ns)

    def _drop(self, why: str) -> None:
        if self._connection is not None:
            self._connection.give_up(why)
        self._lose_unsent(RedisAway(why))

    def _lose_unsent(self, error: RedisAway) -> None:
        batch, self._outbox = self._outbox, []
        for asked in batch:
            self.lost(asked, error)

    async def close(self) -> None:
        """Hang up. Whoever waits hears RedisAway."""
        if self._connecting is not None:  # never cancelled: a socket could be left that nobody closes
            await asyncio.wait([self._connecting])
        self._drop("closed")
        for timer in (self._tick, self._timer):
            if timer is not None:
                timer.cancel()

    def stats(self) -> ActorStats:
        """Counters since the start."""
        return ActorStats(
            self._calls, self._replies, self._errors, self._away, self._refused, self._batches, self._connections,
            self._evals, self.waiting, self._breaker.stats(),
        )


class _Greeting:
    """A reply to AUTH or SELECT: wrong words end the connection, so that nothing is written to a wrong database."""

    __slots__ = ("connection",)

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def replied(self, reply: Any) -> None:
        if isinstance(reply, Exception):
            self.connection.give_up(f"refused at the door: {reply}")

    def lost(self, error: RedisAway) -> None:
        """The connection's calls hear of it."""

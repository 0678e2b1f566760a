"""Conversations that go on at whichever gateway the next turn comes to; and go on when Redis is away.

``begin`` takes the session's turn, ``finish`` adds it, ``abandon`` gives it back. With Redis all three are
compare-and-set on one version (``engine/policy/sessions.py`` makes the next one), so a session's history is
linearizable as long as Redis answers and keeps what it took. While it does not answer, a gateway goes on with its own
copy: what it does then is ``degraded``, excludes nobody at other gateways, and is merged when Redis is back. Without
Redis the copy is all there is.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Callable

from engine.policy.sessions import NEW, Begun, Conflict, Repeat, Session, SessionRules, Turn
from engine.redis_config import SessionsConfig
from engine.service.redis_actor import RedisActor
from engine.service.redis_connection import RedisAway
from engine.service.session_memory import Copy, MemoryStats, SessionMemory
from engine.service.session_redis import RedisSessions
from engine.values import Struct

TRIES = 8  # of a compare-and-set: who loses so often in a row meets a conflict


class Held(Struct):
    """The turn is this request's. ``session.turns``: what was said before."""

    key: str
    token: str
    session: Session
    idempotency_key: str = ""
    degraded: bool = False  # Redis was away: this gateway's copy, which may lack what others have


class Finished(Struct):
    """``kept`` False: the turn was taken by another request, as this one stayed away too long; it is not recorded."""

    kept: bool
    degraded: bool = False


class SessionStats(Struct):
    """Since the start."""

    begun: int
    conflicts: int
    repeats: int
    finished: int
    refused: int  # turns that came back too late
    degraded: int  # steps made without Redis, where there should be one
    merged: int  # sessions that were apart and are one again
    memory: MemoryStats


def session_key(tenant: str, session_id: str) -> str:
    """Of a tenant's own session: another tenant's of the same name is another."""
    return hashlib.blake2b(f"{tenant}\0{session_id}".encode(), digest_size=16).hexdigest()


class Sessions:
    """Owned by one event loop. ``actor`` None = in memory only."""

    def __init__(
        self, config: SessionsConfig, actor: RedisActor | None = None, prefix: str = "doorbuster",
        clock_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        """``clock_ns``: for what no server's clock tells."""
        self._rules, self._memory, self._clock_ns = SessionRules(config), SessionMemory(config), clock_ns
        self._store = RedisSessions(actor, prefix, config.ttl_ns) if actor is not None else None
        self._ahead_ns = 0  # the server's clock less ours
        self._begun = self._conflicts = self._repeats = self._finished = self._refused = 0
        self._degraded = self._merged = 0

    @property
    def degraded(self) -> int:
        """Sessions with turns that the shared store does not have; ``merge_all`` brings them there."""
        return len(self._memory.apart()) if self._store is not None else 0

    async def begin(self, key: str, idempotency_key: str = "") -> Held | Conflict | Repeat:
        """Take the turn. ``key``: of ``session_key``."""
        token = secrets.token_hex(8)
        expected, session, degraded = await self._read(key)
        for attempt in range(TRIES):
            now_ns = self._clock_ns() + self._ahead_ns
            decided = self._rules.begin(session, now_ns, token, idempotency_key)
            if isinstance(decided, Conflict):
                self._conflicts += 1
                return decided
            if isinstance(decided, Repeat):
                self._repeats += 1
                return decided
            written = await self._write(key, expected, decided.session, degraded, f"{token}{attempt:x}")
            if isinstance(written, Begun):
                self._begun += 1
                return Held(key, token, written.session, idempotency_key, degraded or self._apart(key))
            if written is None:
                degraded = True
                session = self._copy(key).session
            else:
                expected, session = written.version, self._with_ours(key, written)
        self._conflicts += 1
        return Conflict(0)

    async def finish(self, held: Held, asked: bytes, answer: bytes) -> Finished:
        """Add the turn. Once for each Held."""
        turn = Turn(held.token, asked, answer, held.idempotency_key)
        new, expected = self._rules.finish(held.session, held.token, turn), held.session.version
        for attempt in range(TRIES):
            if new is None:
                break
            if held.degraded:
                return self._finish_alone(held, turn)
            written = await self._write(held.key, expected, new, False, f"{held.token}f{attempt:x}")
            if written is None:
                return self._finish_alone(held, turn)
            if isinstance(written, Begun) or any(each.turn_id == turn.turn_id for each in written.turns):
                self._finished += 1
                return Finished(kept=True)
            expected, acknowledged = written.version, held.session.version
            if self._rules.behind(written, held.session, acknowledged) and self._store is not None:
                new = self._rules.merge(written, _grown(held.session, turn), acknowledged, frozenset(), held.token)
            else:
                new = self._rules.finish(written, held.token, turn)
        self._refused += 1
        return Finished(kept=False)

    def _finish_alone(self, held: Held, turn: Turn) -> Finished:
        copy = self._copy(held.key)
        base = copy.session if copy.session.turns or copy.session.version else held.session
        new = self._rules.finish(base, held.token, turn)
        if new is None:
            self._refused += 1
            return Finished(kept=False, degraded=self._store is not None)
        shared = self._store is not None
        if shared:
            copy.unacknowledged.add(turn.turn_id)
            copy.over = held.token
        self._keep(held.key, new, copy, away=shared)
        self._finished += 1
        return Finished(kept=True, degraded=shared)

    async def abandon(self, held: Held) -> None:
        """The request ended without an answer. If that cannot be told to Redis, the turn is free after ``turn_ms``."""
        new = self._rules.abandon(held.session, held.token)
        if new is None:
            return
        if self._store is not None and not held.degraded:
            written = await self._write(held.key, held.session.version, new, False, f"{held.token}a")
            if written is not None:
                return
        copy = self._copy(held.key)
        copy.over = held.token
        if (free := self._rules.abandon(copy.session, held.token)) is not None:
            self._keep(held.key, free, copy, away=self._store is not None)

    async def merge_all(self) -> int:
        """Bring what was done without Redis to it; how many sessions are one again. To be called while ``degraded``."""
        merged = 0
        for key in self._memory.apart():
            for attempt in range(TRIES):
                expected, session, away = await self._read(key)
                if away:
                    return merged
                if not self._apart(key):
                    break
                written = await self._write(key, expected, session, False, f"{secrets.token_hex(8)}{attempt:x}")
                if isinstance(written, Begun):
                    merged += 1
                    break
        return merged

    # ------------------------------------------------------------ one read, one write

    async def _read(self, key: str) -> tuple[int, Session, bool]:
        """The version to replace, the session with all that this gateway knows of it, and whether Redis was away."""
        if self._store is None:
            session = self._copy(key).session
            return session.version, session, False
        try:
            kept = await self._store.load(key)
        except RedisAway:
            session = self._copy(key).session
            return session.version, session, True
        self._ahead_ns = kept.now_ns - self._clock_ns()
        return kept.session.version, self._with_ours(key, kept.session), False

    async def _write(
        self, key: str, expected: int, session: Session, degraded: bool, write_id: str
    ) -> Begun | Session | None:
        """Begun: it is written. A session: that was there first. None: Redis is away, nothing was written here."""
        copy = self._copy(key)
        if self._store is None or degraded:
            if copy.session.version != expected and not degraded:
                return copy.session
            self._keep(key, session, copy, away=degraded)
            return Begun(session)
        try:
            kept = await self._store.save(key, expected, session, write_id)
        except RedisAway:
            return None
        self._ahead_ns = kept.now_ns - self._clock_ns()
        if not kept.saved:
            return kept.session
        copy = self._copy(key)
        self._merged += bool(copy.unacknowledged)
        there = {turn.turn_id for turn in session.turns}
        left = {each for each in copy.unacknowledged if each not in there}
        late = {turn.turn_id for turn in copy.session.turns} & left  # came while this write was on its way
        if late or session.version < copy.acknowledged:
            copy.acknowledged = max(copy.acknowledged, session.version)
            return Begun(session)
        self._memory.put(self._clock_ns(), key, Copy(session, session.version))
        return Begun(session)

    def _with_ours(self, key: str, shared: Session) -> Session:
        copy = self._copy(key)
        ours = copy.session, copy.acknowledged, frozenset(copy.unacknowledged)
        session = self._rules.merge(shared, *ours, secrets.token_hex(8))
        if copy.over and session.holder == copy.over:
            session = self._rules.abandon(session, copy.over) or session
        if session is shared and copy.unacknowledged:  # a write that we took for lost had arrived
            self._merged += 1
            self._memory.put(self._clock_ns(), key, Copy(shared, shared.version))
        return session

    def _copy(self, key: str) -> Copy:
        return self._memory.get(self._clock_ns(), key) or Copy(NEW)

    def _apart(self, key: str) -> bool:
        return bool(self._copy(key).unacknowledged)

    def _keep(self, key: str, session: Session, copy: Copy, away: bool) -> None:
        self._degraded += away
        copy.session = session
        self._memory.put(self._clock_ns(), key, copy)

    def stats(self) -> SessionStats:
        """Counters since the start."""
        return SessionStats(
            self._begun, self._conflicts, self._repeats, self._finished, self._refused, self._degraded, self._merged,
            self._memory.stats(),
        )


def _grown(session: Session, turn: Turn) -> Session:
    """What this gateway would have, had the store kept it."""
    return Session(session.version, session.origin, (*session.turns, turn), session.let_go)

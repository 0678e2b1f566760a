"""Exact answers of all gateways behind each one's own cache, and one computation for all (single-flight with leases).

A look-up says: here it is; or compute it, you have the lease; or somebody does, wait. A lease ends by itself, and its
token fences: what a holder brings after another has got the lease is refused. The token is also the moment when the
computation began, so a word that called something off since refuses the answer or hides it, whoever stored it. The same
rule as ``engine/policy/invalidation.py``. Whoever waits looks again every ``poll_ms``; when Redis is away everybody
computes for himself.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Sequence
from typing import Any, Literal

from engine.events import Invalidate
from engine.redis_config import SharedConfig
from engine.service.redis_actor import RedisActor, script
from engine.service.redis_connection import RedisAway, Word
from engine.values import Struct

ANSWERS = script("answers.lua")
PLAIN, COMPRESSED = b"\0", b"\1"

Stored = Literal["stored", "stale", "called_off", "away"]


class SharedHit(Struct):
    """An answer that some gateway computed."""

    answer_id: str
    value: bytes


class Lease(Struct):
    """Compute it; then ``store`` or ``release``. Until the lease ends nobody else does."""

    key: bytes
    token: str


class Wait(Struct):
    """Another gateway computes it, for so long at most."""

    left_ns: int


class Alone(Struct):
    """Redis is away: nobody knows what others do."""


class AnswerStats(Struct):
    """Since the start."""

    hits: int
    leases: int
    waits: int  # look-ups that met another's lease
    alone: int
    stored: int
    stale: int  # refused: the lease was over
    called_off: int  # refused: what it depends on changed meanwhile


class SharedAnswers:
    """Owned by one event loop. Keys are the exact cache's digests: the tenant's scope is in them."""

    def __init__(self, actor: RedisActor, config: SharedConfig) -> None:
        self._actor, self._config = actor, config
        self._ttl_ms = str(round(config.answer_ttl_s * 1000))
        self._hits = self._leases = self._waits = self._alone = self._stored = self._stale = self._called_off = 0

    async def lookup(self, key: bytes) -> SharedHit | Lease | Wait | Alone:
        """Once."""
        try:
            what, *more = await self._run("lookup", self._entry(key), str(self._config.lease_ms))
        except RedisAway:
            self._alone += 1
            return Alone()
        if what == b"hit":
            self._hits += 1
            return SharedHit(more[1].decode(), _unpacked(more[0]))
        if what == b"lease":
            self._leases += 1
            return Lease(key, more[0].decode())
        self._waits += 1
        return Wait(int(more[0]) * 1000)

    async def answer_or_lease(self, key: bytes, wait_ms: int) -> SharedHit | Lease | Alone:
        """The same, waiting for another's answer for so long; then, too, everybody for himself."""
        loop = asyncio.get_running_loop()
        until_s = loop.time() + wait_ms / 1000
        while isinstance(found := await self.lookup(key), Wait):
            if loop.time() >= until_s:
                return Alone()
            await asyncio.sleep(min(self._config.poll_ms / 1000, found.left_ns / 1e9))
        return found

    async def store(
        self, lease: Lease, answer_id: str, value: bytes, tenant: str = "", tags: Sequence[str] = ()
    ) -> Stored:
        """For all. Refused if the lease is over, or what it depends on was called off since it began."""
        packed = _packed(value, self._config.compress_bytes)
        try:
            reply = await self._run("store", self._entry(lease.key), lease.token, packed, answer_id, tenant, *tags)
        except RedisAway:
            return "away"
        if reply[0] == b"stale":
            self._stale += 1
            return "stale"
        if reply[0] == b"called_off":
            self._called_off += 1
            return "called_off"
        self._stored += 1
        return "stored"

    async def release(self, lease: Lease) -> None:
        """There will be no answer: the next who asks may compute it. If Redis is away the lease ends by itself."""
        try:
            await self._run("release", self._entry(lease.key), lease.token)
        except RedisAway:
            return

    async def invalidate(self, what: Invalidate) -> bool:
        """For all gateways' look-ups from now on. False: this version was known. Raises RedisAway: say it again."""
        reply = await self._run(
            "invalidate", self._name("versions"), what.tenant, what.tag, what.answer_id, str(what.version)
        )
        return bool(reply[0] == b"done")

    async def _run(self, what: str, third: bytes, *args: Word) -> Any:
        keys = [self._name("ticks"), self._name("words"), third]
        return await self._actor.run(ANSWERS, keys, [what, self._ttl_ms, *args])

    def _entry(self, key: bytes) -> bytes:
        return self._name("entry:") + key

    def _name(self, part: str) -> bytes:
        return f"{self._config.prefix}:{{answers}}:{part}".encode()

    def stats(self) -> AnswerStats:
        """Counters since the start."""
        return AnswerStats(
            self._hits, self._leases, self._waits, self._alone, self._stored, self._stale, self._called_off
        )


def _packed(value: bytes, least: int) -> bytes:
    if len(value) >= least and len(small := zlib.compress(value, 1)) < len(value):
        return COMPRESSED + small
    return PLAIN + value


def _unpacked(packed: bytes) -> bytes:
    return zlib.decompress(packed[1:]) if packed[:1] == COMPRESSED else packed[1:]

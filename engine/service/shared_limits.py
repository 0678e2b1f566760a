"""Limits that several gateways share: the limiter's own arithmetic on Redis, in one script a request.

While Redis is away each gateway lets through its part (``shares.py``): that limiter is charged along all the time, so
it is not full when it is needed. Redis's clock counts, nobody else's. What a gateway let through alone is not charged
when Redis is back: its buckets have filled up meanwhile, which is one burst at most.
"""

from __future__ import annotations

from collections.abc import Mapping

from engine.config import ClassConfig, LimiterConfig, TenantConfig
from engine.policy.gcra import UNIT
from engine.policy.levels import Bucket, Levels, units_of, verdict_of
from engine.policy.limiter import Limiter, Verdict
from engine.service.redis_actor import RedisActor, script
from engine.service.redis_connection import RedisAway, Word
from engine.values import Struct

LIMITS = script("limits.lua")


class Taken(Struct):
    """A verdict, and who gave it. ``shared``: all gateways together; ``local``: this gateway's part was charged."""

    verdict: Verdict
    shared: bool
    local: bool


class SharedLimitStats(Struct):
    """Since the start."""

    shared: int  # decided by all together
    alone: int  # decided by this gateway's part, as Redis was away
    unsettled: int  # reservations that could not be settled there: they stay charged in full


class SharedLimiter:
    """Owned by one event loop."""

    def __init__(
        self, actor: RedisActor, prefix: str, config: LimiterConfig, tenants: Mapping[str, TenantConfig],
        classes: Mapping[str, ClassConfig], part: Limiter,
    ) -> None:
        """``config``, ``tenants``, ``classes``: undivided; ``part``: a limiter with this gateway's part of them."""
        self._actor, self._prefix, self._part = actor, prefix, part
        self._enabled, self._levels = config.enabled, Levels(config, tenants, classes)
        self._shared = self._alone = self._unsettled = 0

    async def take(
        self, now_ns: int, tenant: str, tokens: int, user: bytes = b"", traffic_class: str = "", at: int | None = None
    ) -> Taken:
        """As ``Limiter.take``. ``now_ns``: this gateway's clock; ``at``: in place of the server's, for tests."""
        if not self._enabled:
            return Taken(Verdict(ok=True), shared=False, local=False)
        buckets = self._levels.buckets(tenant, user, traffic_class)
        try:
            ok, behind, never, *shorts = await self._run("take", at, [(b, units_of(b, tokens)) for b in buckets])
        except RedisAway:
            self._alone += 1
            verdict = self._part.take(now_ns, tenant, tokens, user, traffic_class)
            return Taken(verdict, shared=False, local=verdict.ok)
        self._shared += 1
        watched = self._levels.watched(user, traffic_class)
        verdict = verdict_of(buckets, [int(short) for short in shorts], int(never), int(behind), watched)
        assert verdict.ok == bool(ok), "the script and the policy say the same"
        local = verdict.ok and self._part.take(now_ns, tenant, tokens, user, traffic_class).ok
        return Taken(verdict, shared=True, local=local)

    async def settle(
        self, now_ns: int, taken: Taken, tenant: str, reserved_tokens: int, used_tokens: int, user: bytes = b"",
        traffic_class: str = "", at: int | None = None,
    ) -> None:
        """As ``Limiter.settle``, of what ``take`` let through. Once for each."""
        user = user if taken.verdict.watched else b""
        if taken.local:
            self._part.settle(now_ns, tenant, reserved_tokens, used_tokens, user, traffic_class)
        units = (used_tokens - reserved_tokens) * UNIT
        buckets = [b for b in self._levels.buckets(tenant, user, traffic_class) if b.counts == "tokens"]
        if not taken.shared or not units or not buckets:
            return
        try:
            await self._run("settle", at, [(b, units) for b in buckets])
        except RedisAway:
            self._unsettled += 1

    async def _run(self, what: str, at: int | None, charges: list[tuple[Bucket, int]]) -> list[bytes]:
        keys: list[Word] = [self._name("now")]
        args: list[Word] = [what, "" if at is None else str(at)]
        for bucket, units in charges:
            keys.append(self._name(bucket.scope, bucket.counts, *bucket.key))
            rate, burst = bucket.grant
            args += [str(rate), str(burst), str(abs(units)), "1" if units >= 0 else "-1"]
        reply: list[bytes] = await self._actor.run(LIMITS, keys, args)
        return reply

    def _name(self, *parts: str | bytes) -> bytes:
        """One hash slot for all: everybody's bucket is charged with each."""
        words = [part if isinstance(part, bytes) else part.encode() for part in parts]
        return f"{self._prefix}:{{limits}}:".encode() + b":".join(b"%d,%s" % (len(word), word) for word in words)

    def stats(self) -> SharedLimitStats:
        """Counters since the start."""
        return SharedLimitStats(self._shared, self._alone, self._unsettled)

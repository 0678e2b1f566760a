"""Token buckets per authenticated tenant: requests and, where a rate is set, model tokens.

Tokens are reserved on admission, when the length of the answer is not known, and settled when it ended: a refund, or a
debt that may take the bucket below zero. Knows no keys and no classes: who the tenant is was decided at the ingress.
A token bucket over integers (ATM Forum's GCRA in its leaky-bucket form); reserve and settle as in ``token-throttle``.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

from engine.config import LimiterConfig, TenantConfig
from engine.units import S_NS, ceil_div, s_to_ns
from engine.values import Struct

NANO = 1_000_000_000
UNIT = NANO * S_NS  # levels count 10**-18 requests (or tokens): elapsed_ns times a rate in nano-units a second, exactly
ENDLESS = 1e15  # a rate of `inf` in a file means "no limit", and this is one
SWEPT_PER_CALL = 4  # a call adds one bucket at most, so looking at more than one keeps the table near its live size


class Verdict(Struct):
    """May it pass? If not, when: exactly then, if nobody else comes between. ``None``: it costs more than the burst."""

    ok: bool
    retry_after_ns: int | None = None


class LimiterStats(Struct):
    """What happened so far, and for how many tenants a bucket that is not full is remembered."""

    allowed: int
    limited: int
    tenants: int


class _Grant(NamedTuple):
    """Rates in nano-units a second, capacities in units of 10**-18. A token rate of 0 means unlimited."""

    request_rate: int
    request_cap: int
    token_rate: int
    token_cap: int


class _Bucket:
    """Levels at ``at_ns``. From ``full_ns`` on it equals a new bucket and may be forgotten."""

    __slots__ = ("at_ns", "full_ns", "grant", "requests", "tokens")

    def __init__(self, now_ns: int, grant: _Grant) -> None:
        self.at_ns = self.full_ns = now_ns
        self.grant = grant
        self.requests = grant.request_cap
        self.tokens = grant.token_cap

    def refill(self, now_ns: int) -> None:
        elapsed_ns, grant = now_ns - self.at_ns, self.grant
        self.at_ns = now_ns
        self.requests = min(grant.request_cap, self.requests + elapsed_ns * grant.request_rate)
        self.tokens = min(grant.token_cap, self.tokens + elapsed_ns * grant.token_rate)

    def wait_ns(self, requests: int, tokens: int) -> int:
        """Time from ``at_ns`` until both levels are there."""
        wait_ns = max(0, ceil_div(requests - self.requests, self.grant.request_rate))
        if self.grant.token_rate:
            wait_ns = max(wait_ns, ceil_div(tokens - self.tokens, self.grant.token_rate))
        return wait_ns

    def charge(self, requests: int, tokens: int) -> None:
        grant = self.grant
        self.requests -= requests
        if grant.token_rate:
            self.tokens = max(-grant.token_cap, min(grant.token_cap, self.tokens - tokens))
        self.full_ns = self.at_ns + self.wait_ns(grant.request_cap, grant.token_cap)


class Limiter:
    """One bucket per tenant that has spent something lately."""

    def __init__(self, config: LimiterConfig, tenants: dict[str, TenantConfig]) -> None:
        self._enabled = config.enabled
        self._default = _grant(config, TenantConfig())
        self._grants = {name: _grant(config, tenant) for name, tenant in tenants.items()}
        self._buckets: OrderedDict[str, _Bucket] = OrderedDict()
        self._now_ns = 0
        self._allowed = self._limited = 0

    def take(self, now_ns: int, tenant: str, tokens: int) -> Verdict:
        """One request and ``tokens`` model tokens: both or nothing."""
        assert tokens >= 0, f"tokens must not be negative: {tokens}"
        if not self._enabled:
            self._allowed += 1
            return Verdict(ok=True)
        self._advance(now_ns)
        bucket, cost = self._bucket(tenant), tokens * UNIT
        grant = bucket.grant
        if grant.request_cap < UNIT or (grant.token_rate and cost > grant.token_cap):
            self._limited += 1
            return Verdict(ok=False)
        if wait_ns := bucket.wait_ns(UNIT, cost):
            self._limited += 1
            return Verdict(ok=False, retry_after_ns=self._now_ns - now_ns + wait_ns)
        bucket.charge(UNIT, cost)
        self._buckets[tenant] = bucket
        self._allowed += 1
        return Verdict(ok=True)

    def settle(self, now_ns: int, tenant: str, reserved_tokens: int, used_tokens: int) -> None:
        """Exchange a reservation for what was used. Debt is bounded by one burst, so a tenant is never locked out."""
        assert min(reserved_tokens, used_tokens) >= 0, f"tokens must not be negative: {reserved_tokens}, {used_tokens}"
        if not self._enabled:
            return
        self._advance(now_ns)
        bucket = self._bucket(tenant)
        if bucket.grant.token_rate:
            bucket.charge(0, (used_tokens - reserved_tokens) * UNIT)
            self._buckets[tenant] = bucket

    def stats(self) -> LimiterStats:
        """Counters since the start."""
        return LimiterStats(allowed=self._allowed, limited=self._limited, tenants=len(self._buckets))

    def check(self) -> None:
        """Invariants."""
        for tenant, bucket in self._buckets.items():
            grant = bucket.grant
            assert 0 <= bucket.requests <= grant.request_cap, f"requests between nothing and the burst: {tenant}"
            assert -grant.token_cap <= bucket.tokens <= grant.token_cap, f"debt and tokens within one burst: {tenant}"
            assert bucket.at_ns <= self._now_ns, f"no bucket is ahead of the clock: {tenant}"
            due_ns = bucket.at_ns + bucket.wait_ns(grant.request_cap, grant.token_cap)
            assert max(bucket.full_ns, bucket.at_ns) == due_ns, f"a bucket is forgotten when it is full: {tenant}"
        assert self._enabled or not self._buckets, "a limiter that is off remembers nobody"

    def _advance(self, now_ns: int) -> None:
        # One high-water mark for all: a clock that steps back refills nothing twice, not even for a forgotten bucket.
        self._now_ns = max(self._now_ns, now_ns)
        buckets = self._buckets
        for _ in range(min(SWEPT_PER_CALL, len(buckets))):
            tenant = next(iter(buckets))
            if buckets[tenant].full_ns <= self._now_ns:
                del buckets[tenant]
            else:
                buckets.move_to_end(tenant)

    def _bucket(self, tenant: str) -> _Bucket:
        bucket = self._buckets.get(tenant)
        if bucket is None:
            return _Bucket(self._now_ns, self._grants.get(tenant, self._default))
        bucket.refill(self._now_ns)
        return bucket


def _grant(config: LimiterConfig, tenant: TenantConfig) -> _Grant:
    rate_rps = config.rate_rps if tenant.rate_rps is None else tenant.rate_rps
    burst = config.burst if tenant.burst is None else tenant.burst
    tokens_per_s = config.tokens_per_s if tenant.tokens_per_s is None else tenant.tokens_per_s
    token_rate = _nano(tokens_per_s) if tokens_per_s else 0
    return _Grant(
        request_rate=_nano(rate_rps), request_cap=_nano(burst) * S_NS,
        token_rate=token_rate, token_cap=token_rate * s_to_ns(min(config.token_burst_s, ENDLESS)),
    )


def _nano(amount: float) -> int:
    # At least 1: a rate so small that it rounds to nothing must not turn into "unlimited" or a division by zero.
    return max(1, round(min(amount, ENDLESS) * NANO))

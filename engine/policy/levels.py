"""Which buckets a request belongs to, as data: for a limiter whose buckets are kept elsewhere.

The levels, their order, their rates and bursts are those of ``limiter.py``; a property test holds both together.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from engine.config import ClassConfig, LimiterConfig, TenantConfig
from engine.policy.gcra import UNIT, UNLIMITED, Grant
from engine.policy.limiter import Scope, Verdict, at_least_one, class_cap, tenant_grant, user_grant


class Bucket(NamedTuple):
    """One key of one level. ``counts``: requests, or model tokens."""

    scope: Scope
    key: tuple[str | bytes, ...]
    counts: str
    grant: Grant


class Levels:
    """From the one that is cheapest to be refused by."""

    def __init__(
        self, config: LimiterConfig, tenants: Mapping[str, TenantConfig],
        classes: Mapping[str, ClassConfig] | None = None,
    ) -> None:
        self._config = config
        self._default = tenant_grant(config, TenantConfig())
        self._own = {name: tenant_grant(config, own) for name, own in tenants.items()}
        self._total = at_least_one(config.total_rps, config.total_burst_s) if config.total_rps else UNLIMITED
        rates = config.user_rps, config.user_tokens_per_s
        self._user = user_grant(*rates, config.user_burst_s, config.token_burst_s)
        capped = {name: cls for name, cls in (classes or {}).items() if cls.cap_rps}
        self._caps = {name: class_cap(cls) for name, cls in capped.items()}
        self._alone = {name for name, cls in capped.items() if cls.priority == 0}

    def buckets(self, tenant: str, user: bytes, traffic_class: str) -> list[Bucket]:
        """Those with a limit."""
        found: list[tuple[Scope, tuple[str | bytes, ...], tuple[Grant, Grant]]] = []
        cap = self._caps.get(traffic_class)
        if cap is not None and traffic_class in self._alone:
            found.append(("class", (traffic_class, tenant), (cap, UNLIMITED)))
        else:
            if cap is not None:
                found.append(("class", (traffic_class,), (cap, UNLIMITED)))
            found.append(("total", (), (self._total, UNLIMITED)))
            found.append(("tenant", (tenant,), self._own.get(tenant, self._default)))
            if user:
                found.append(("user", (tenant, user), self._user))
        return [
            Bucket(scope, key, counts, grant)
            for scope, key, grants in found
            for counts, grant in zip(("requests", "tokens"), grants, strict=True)
            if grant.rate
        ]

    def watched(self, user: bytes, traffic_class: str) -> bool:
        """Whether its user has a bucket."""
        return bool(user) and traffic_class not in self._alone and any(grant.rate for grant in self._user)


def units_of(bucket: Bucket, tokens: int) -> int:
    """What a request of so many model tokens takes from it, in 10**-18."""
    return UNIT if bucket.counts == "requests" else tokens * UNIT


def verdict_of(buckets: list[Bucket], shorts: list[int], never: int, behind_ns: int, watched: bool) -> Verdict:
    """As the limiter words it. ``never``: number (from 1) of the first bucket that cannot hold as much, 0 = none."""
    if never:
        return Verdict(ok=False, retry_after_ns=None, scope=buckets[never - 1].scope)
    longest_ns, scope = 0, buckets[0].scope if buckets else "tenant"
    for bucket, short in zip(buckets, shorts, strict=True):
        wait_ns = -(-short // bucket.grant.rate)
        if wait_ns > longest_ns:
            longest_ns, scope = wait_ns, bucket.scope
    if longest_ns:
        return Verdict(ok=False, retry_after_ns=behind_ns + longest_ns, scope=scope)
    return Verdict(ok=True, watched=watched)

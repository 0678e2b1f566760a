"""Who may ask how much: everybody together, each tenant, each of a tenant's users, and each class that has a cap.

Requests and, where a rate is set, model tokens. All levels are looked at before any is charged, so that who is refused
by one has cost the others nothing. Tokens are reserved on admission, when the length of the answer is not known, and
settled when it ended: a refund, or a debt that may take a bucket below zero. A critical class with a cap answers to
that alone, and each tenant has one of its own: no flood of anything else can use up what it needs, and it cannot be a
flood itself. Knows no keys: who the tenant is was decided at the ingress, who the user is by the tenant. Arithmetic in
``gcra.py``; reserve and settle as in ``token-throttle``.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, Literal

from engine.config import ClassConfig, LimiterConfig, TenantConfig
from engine.policy.gcra import UNIT, UNLIMITED, Gcra, Grant, grant, grant_for
from engine.values import Struct

Scope = Literal["total", "tenant", "user", "class"]
EVERYBODY = ""
OF_SCOPE = {"total": "overloaded"}  # a code of its own: not this client's doing


class Verdict(Struct):
    """May it pass? If not, when: exactly then, if nobody else comes between. ``None``: it costs more than the burst."""

    ok: bool
    retry_after_ns: int | None = None
    scope: Scope = "tenant"  # whose limit it was
    watched: bool = False  # its user has a bucket, and that was charged too: only then is it settled there


class LimiterStats(Struct):
    """What happened so far, and of how many tenants and users a bucket that is not full is remembered."""

    allowed: int
    limited: int
    tenants: int
    users: int = 0
    by_scope: tuple[tuple[Scope, int], ...] = ()  # limited, by whose limit


OK, OK_WATCHED = Verdict(ok=True), Verdict(ok=True, watched=True)


class _Level:
    """Requests and model tokens of one kind of key."""

    __slots__ = ("limited", "requests", "scope", "tokens")

    def __init__(self, scope: Scope, requests: Gcra[Any], tokens: Gcra[Any] | None) -> None:
        self.scope, self.requests, self.tokens = scope, requests, tokens
        self.limited = 0

    def wait_ns(self, now_ns: int, key: Hashable, cost: int) -> int | None:
        wait_ns = self.requests.wait_ns(now_ns, key, UNIT)
        if self.tokens is None or wait_ns is None:
            return wait_ns
        more_ns = self.tokens.wait_ns(now_ns, key, cost)
        return None if more_ns is None else max(wait_ns, more_ns)

    def charge(self, now_ns: int, key: Hashable, cost: int) -> None:
        self.requests.charge(now_ns, key, UNIT)
        if self.tokens is not None:
            self.tokens.charge(now_ns, key, cost)

    def sweep(self, now_ns: int) -> None:
        self.requests.sweep(now_ns)
        if self.tokens is not None:
            self.tokens.sweep(now_ns)

    def knows(self, key: Hashable) -> bool:
        return self.requests.knows(key) or (self.tokens is not None and self.tokens.knows(key))

    def size(self) -> int:
        """Entries of the larger table."""
        return max(len(self.requests), 0 if self.tokens is None else len(self.tokens))

    def remembered(self) -> int:
        """Keys whose requests or tokens are not paid back."""
        if self.tokens is None or not len(self.tokens):
            return len(self.requests)
        return len(dict.fromkeys((*self.requests.keys(), *self.tokens.keys())))

    def check(self, now_ns: int) -> None:
        self.requests.check(now_ns)
        if self.tokens is not None:
            self.tokens.check(now_ns)


class Limiter:
    """One bucket for each level and key that has spent something lately."""

    def __init__(
        self, config: LimiterConfig, tenants: Mapping[str, TenantConfig],
        classes: Mapping[str, ClassConfig] | None = None,
    ) -> None:
        """``classes``: for their caps; none by default."""
        self._enabled, self._users_most = config.enabled, config.users_most
        self._tenants = _level(
            "tenant", tenant_grant(config, TenantConfig()),
            {name: tenant_grant(config, own) for name, own in tenants.items()},
        )
        self._total = self._users = None
        if config.total_rps:
            self._total = _level("total", (at_least_one(config.total_rps, config.total_burst_s), UNLIMITED), {})
        if config.user_rps or config.user_tokens_per_s:
            rates = config.user_rps, config.user_tokens_per_s
            self._users = _level("user", user_grant(*rates, config.user_burst_s, config.token_burst_s), {})
        capped = {name: cls for name, cls in (classes or {}).items() if cls.cap_rps}
        self._caps = {name: _level("class", (class_cap(cls), UNLIMITED), {}) for name, cls in capped.items()}
        self._alone = {name for name, cls in capped.items() if cls.priority == 0}  # obey their cap and nothing else
        self._single = not (self._total or self._users or self._caps)
        self._now_ns = 0
        self._allowed = self._limited = 0

    def take(
        self, now_ns: int, tenant: str, tokens: int, user: bytes = b"", traffic_class: str = ""
    ) -> Verdict:
        """One request and ``tokens`` model tokens, from every level that it belongs to: from all or from none.

        ``user``: b"" = the tenant names none, or all.
        """
        assert tokens >= 0, f"tokens must not be negative: {tokens}"
        if not self._enabled:
            self._allowed += 1
            return OK
        # One high-water mark for all: a clock that steps back refills nothing twice, not even for a forgotten bucket.
        behind_ns = 0
        if now_ns < self._now_ns:
            behind_ns, now_ns = self._now_ns - now_ns, self._now_ns
        self._now_ns = now_ns
        cost = tokens * UNIT
        if self._single:
            wait_ns = self._tenants.wait_ns(now_ns, tenant, cost)
            if wait_ns != 0:
                return self._refuse(now_ns, self._tenants, wait_ns, behind_ns)
            self._tenants.charge(now_ns, tenant, cost)
            self._allowed += 1
            return OK
        levels = self._levels(now_ns, tenant, user, traffic_class)
        longest_ns, worst = 0, self._tenants
        for level, key in levels:
            wait_ns = level.wait_ns(now_ns, key, cost)
            if wait_ns is None:
                return self._refuse(now_ns, level, None, behind_ns)
            if wait_ns > longest_ns:
                longest_ns, worst = wait_ns, level
        if longest_ns:
            return self._refuse(now_ns, worst, longest_ns, behind_ns)
        for level, key in levels:
            level.charge(now_ns, key, cost)
        self._allowed += 1
        return OK_WATCHED if levels[-1][0] is self._users else OK

    def _refuse(self, now_ns: int, level: _Level, wait_ns: int | None, behind_ns: int) -> Verdict:
        self._limited += 1
        level.limited += 1
        level.sweep(now_ns)
        return Verdict(ok=False, retry_after_ns=None if wait_ns is None else behind_ns + wait_ns, scope=level.scope)

    def _levels(self, now_ns: int, tenant: str, user: bytes, traffic_class: str) -> list[tuple[_Level, Hashable]]:
        """From the one that is cheapest to be refused by."""
        levels: list[tuple[_Level, Hashable]] = []
        if (cap := self._caps.get(traffic_class)) is not None:
            if traffic_class in self._alone:  # each tenant's own: none can use up another's
                return [(cap, tenant)]
            levels.append((cap, EVERYBODY))
        if self._total is not None:
            levels.append((self._total, EVERYBODY))
        levels.append((self._tenants, tenant))
        if self._users is not None and user and self._may_watch(now_ns, tenant, user):
            levels.append((self._users, (tenant, user)))
        return levels

    def _may_watch(self, now_ns: int, tenant: str, user: bytes) -> bool:
        """A table that is full of debtors takes in nobody new, and forgets nobody: the tenant's limit still holds."""
        assert self._users is not None
        if self._users.size() < self._users_most or self._users.knows((tenant, user)):
            return True
        self._users.sweep(now_ns)  # nobody else would: those who have paid back must make room
        return False

    def settle(
        self, now_ns: int, tenant: str, reserved_tokens: int, used_tokens: int, user: bytes = b"",
        traffic_class: str = "",
    ) -> None:
        """Exchange a reservation for what was used. Debt is bounded by one burst, so nobody is locked out for good.

        ``user``: only one whose verdict was ``watched``. Else what was never charged would pay for other requests.
        """
        assert min(reserved_tokens, used_tokens) >= 0, f"tokens must not be negative: {reserved_tokens}, {used_tokens}"
        if not self._enabled:
            return
        self._now_ns = now_ns = max(self._now_ns, now_ns)
        if not (units := (used_tokens - reserved_tokens) * UNIT):
            return
        for level, key in self._levels(now_ns, tenant, user, traffic_class):
            if level.tokens is not None:
                level.tokens.charge(now_ns, key, units)

    def stats(self) -> LimiterStats:
        """Counters since the start."""
        limited = dict.fromkeys((level.scope for level in self._every()), 0)
        for level in self._every():
            limited[level.scope] += level.limited
        return LimiterStats(
            self._allowed, self._limited, self._tenants.remembered(), self._users.size() if self._users else 0,
            tuple((scope, count) for scope, count in limited.items() if count),
        )

    def _every(self) -> list[_Level]:
        return [level for level in (self._total, self._tenants, self._users, *self._caps.values()) if level is not None]

    def check(self) -> None:
        """Invariants."""
        for level in self._every():
            level.check(self._now_ns)
            assert self._enabled or not level.remembered(), "a limiter that is off remembers nobody"
        assert self._users is None or self._users.size() <= self._users_most, "users: no more than allowed"


def _level(scope: Scope, default: tuple[Grant, Grant], own: dict[str, tuple[Grant, Grant]]) -> _Level:
    grants = {key: requests for key, (requests, _) in own.items()}
    tokens = {key: tokens for key, (_, tokens) in own.items()}
    limited = any(each.rate for each in (default[1], *tokens.values()))
    return _Level(scope, Gcra(default[0], grants), Gcra(default[1], tokens) if limited else None)


def tenant_grant(config: LimiterConfig, tenant: TenantConfig) -> tuple[Grant, Grant]:
    """Requests and model tokens of a tenant; what its key does not name is the scenario's."""
    rate_rps = config.rate_rps if tenant.rate_rps is None else tenant.rate_rps
    burst = config.burst if tenant.burst is None else tenant.burst
    tokens_per_s = config.tokens_per_s if tenant.tokens_per_s is None else tenant.tokens_per_s
    return grant(rate_rps, burst), grant_for(tokens_per_s, config.token_burst_s)


def user_grant(rps: float, tokens_per_s: float, burst_s: float, token_burst_s: float) -> tuple[Grant, Grant]:
    """Requests and model tokens of each user; 0 = unlimited."""
    return (at_least_one(rps, burst_s) if rps else UNLIMITED), grant_for(tokens_per_s, token_burst_s)


def class_cap(cls: ClassConfig) -> Grant:
    """Requests of a class that has a cap: a second's worth at once."""
    return at_least_one(cls.cap_rps, 1.0)


def at_least_one(rps: float, burst_s: float) -> Grant:
    """A bucket that holds less than one request would let nobody pass."""
    return grant(rps, max(1.0, rps * burst_s))

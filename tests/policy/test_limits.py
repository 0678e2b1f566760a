"""The limiter's levels together: everybody, a tenant, its users, a class with a cap; against one exact bucket each.

invariant: mutation that it caught
- all or nothing: charged level by level
- who is limited by whom: users of two tenants share; nameless users limited; a critical class with a cap charged to its
  tenant, or to all tenants; a standard class charged to its cap only; the longest wait of several not told
- never less than one request: a total below one
- liveness: a total's burst, or a user's, one request short; clock: the wait not counted from the caller's own
- memory: a new one taken in though the table is full; a known one not; a full table that nobody sweeps
"""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from engine.config import ClassConfig, LimiterConfig, TenantConfig
from engine.policy.limiter import Limiter, Verdict
from engine.units import MS_NS, S_NS
from tests.policy.test_limiter import STEPS_NS, TOKENS, NaiveBucket

CLASSES = {
    "fraud": ClassConfig(criticality="critical", cap_rps=2.0),
    "vip": ClassConfig(criticality="critical"),
    "chat": ClassConfig(criticality="standard"),
    "batch": ClassConfig(criticality="sheddable", cap_rps=0.5),
}
TENANTS = {"a": TenantConfig(rate_rps=3.0, burst=3.0), "b": TenantConfig(tokens_per_s=5.0)}
USERS = st.sampled_from([b"", b"ann", b"bob"])
WHO = st.tuples(st.sampled_from(["a", "b", "c"]), USERS, st.sampled_from(list(CLASSES)))


def naive(rate: float, burst: float, tokens: float, token_burst_s: float) -> NaiveBucket:
    return NaiveBucket(
        LimiterConfig(rate_rps=rate, burst=burst, tokens_per_s=tokens, token_burst_s=token_burst_s), TenantConfig()
    )


class LevelsMachine(RuleBasedStateMachine):
    """Random takes and settlements of all levels."""

    @initialize(
        total=st.sampled_from([0.0, 0.3, 2.0, 7.0]), user=st.sampled_from([0.0, 0.7]),
        tokens=st.sampled_from([0.0, 40.0]),
    )
    def start(self, total: float, user: float, tokens: float) -> None:
        self.config = LimiterConfig(
            rate_rps=4.0, burst=5.0, total_rps=total, total_burst_s=2.0, user_rps=user, user_burst_s=3.0,
            user_tokens_per_s=tokens,
        )
        self.limiter = Limiter(self.config, TENANTS, CLASSES)
        self.buckets: dict[tuple[str, object], NaiveBucket] = {}
        self.now_ns = self.highest_ns = 0

    def levels(self, tenant: str, user: bytes, name: str) -> list[tuple[str, NaiveBucket]]:
        """By the definition: who has a say in this request."""
        config, cls = self.config, CLASSES[name]
        self.highest_ns = max(self.highest_ns, self.now_ns)
        found: list[tuple[str, object, NaiveBucket]] = []
        if cls.cap_rps:
            whose = (name, tenant) if cls.criticality == "critical" else name
            found.append(("class", whose, naive(cls.cap_rps, max(1.0, cls.cap_rps), 0.0, 1.0)))
        if not (cls.cap_rps and cls.criticality == "critical"):
            if config.total_rps:
                found.append(("total", "", naive(config.total_rps, max(1.0, config.total_rps * 2), 0.0, 1.0)))
            found.append(("tenant", tenant, NaiveBucket(config, TENANTS.get(tenant, TenantConfig()))))
            if user and (config.user_rps or config.user_tokens_per_s):
                rate = config.user_rps or 1e9
                burst = max(1.0, config.user_rps * 3) if config.user_rps else 1e9
                found.append(("user", (tenant, user), naive(rate, burst, config.user_tokens_per_s, 10.0)))
        out = []
        for scope, key, fresh in found:
            fresh.at_ns = self.highest_ns
            out.append((scope, self.buckets.setdefault((scope, key), fresh)))
        return out

    @rule(step_ns=STEPS_NS)
    def forward(self, step_ns: int) -> None:
        self.now_ns += step_ns

    @rule(step_ns=STEPS_NS)
    def backward(self, step_ns: int) -> None:
        self.now_ns -= step_ns

    @rule(who=WHO, tokens=TOKENS)
    def take(self, who: tuple[str, bytes, str], tokens: int) -> None:
        self.both(who, tokens)

    @rule(who=WHO, tokens=TOKENS)
    def wait_as_told(self, who: tuple[str, bytes, str], tokens: int) -> None:
        """All levels have room then, and not a nanosecond before."""
        verdict = self.both(who, tokens)
        if verdict.retry_after_ns is not None:
            self.forward(verdict.retry_after_ns - 1)
            assert self.both(who, tokens).retry_after_ns == 1
            self.forward(1)
            assert self.both(who, tokens).ok

    def both(self, who: tuple[str, bytes, str], tokens: int) -> Verdict:
        tenant, user, name = who
        levels = self.levels(tenant, user, name)
        before = [(list(bucket.levels), bucket.at_ns) for _, bucket in levels]
        verdicts = [bucket.take(self.highest_ns, tokens) for _, bucket in levels]
        good = all(verdict.ok for verdict in verdicts)
        if not good:  # nobody is charged
            for (_, bucket), (old, at_ns) in zip(levels, before, strict=True):
                bucket.levels, bucket.at_ns = list(old), at_ns
        got = self.limiter.take(self.now_ns, tenant, tokens, user, name)
        assert got.ok == good
        if not good:
            refused = {scope: v for (scope, _), v in zip(levels, verdicts, strict=True) if not v.ok}
            assert got.scope in refused
            waits = [verdict.retry_after_ns for verdict in refused.values()]
            longest_ns = None if None in waits else max(w for w in waits if w is not None)
            behind_ns = self.highest_ns - self.now_ns
            assert got.retry_after_ns == (None if longest_ns is None else longest_ns + behind_ns)
        return got

    @rule(who=WHO, reserved=TOKENS, used=TOKENS)
    def settle(self, who: tuple[str, bytes, str], reserved: int, used: int) -> None:
        tenant, user, name = who
        for _, bucket in self.levels(tenant, user, name):
            bucket.settle(self.highest_ns, reserved, used)
        self.limiter.settle(self.now_ns, tenant, reserved, used, user, name)

    @invariant()
    def holds(self) -> None:
        self.limiter.check()


LevelsMachine.TestCase.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
TestLevels = LevelsMachine.TestCase


@settings(max_examples=100, deadline=None)
@given(moves=st.lists(st.tuples(st.integers(-S_NS, 2 * S_NS), WHO), min_size=1, max_size=60))
def test_no_window_of_any_level_ever_gets_more_than_its_rate_and_one_burst(
    moves: list[tuple[int, tuple[str, bytes, str]]],
) -> None:
    limiter = Limiter(
        LimiterConfig(rate_rps=2.0, burst=3.0, total_rps=3.0, total_burst_s=1.5, user_rps=1.0, user_burst_s=2.0),
        {}, CLASSES,
    )
    now_ns = highest_ns = 0
    admitted: dict[tuple[str, ...], list[int]] = {}
    for step_ns, (tenant, user, name) in moves:
        now_ns += step_ns
        highest_ns = max(highest_ns, now_ns)
        if limiter.take(now_ns, tenant, 0, user, name).ok:
            scopes: list[tuple[str, ...]] = [("fraud", tenant)]
            if name != "fraud":
                scopes = [("total",), ("tenant", tenant), *([("user", tenant, str(user))] if user else [])]
                scopes += [("batch",)] * (name == "batch")
            for scope in scopes:
                admitted.setdefault(scope, []).append(highest_ns)
    rates = {"total": (3.0, 4.5), "tenant": (2.0, 3.0), "user": (1.0, 2.0), "fraud": (2.0, 2.0), "batch": (0.5, 1.0)}
    for scope, moments in admitted.items():
        rate, burst = rates[scope[0]]
        for first, from_ns in enumerate(moments):
            for count, to_ns in enumerate(moments[first:], 1):
                assert count <= rate * (to_ns - from_ns) / S_NS + burst, scope


def test_who_is_refused_by_one_level_has_cost_the_others_nothing() -> None:
    limiter = Limiter(LimiterConfig(total_rps=10.0, user_rps=1.0, user_burst_s=1.0), {})
    assert limiter.take(0, "t", 0, b"ann").ok
    for _ in range(50):
        assert limiter.take(0, "t", 0, b"ann") == Verdict(ok=False, retry_after_ns=S_NS, scope="user")
    others = [limiter.take(0, "t", 0, b"user %d" % n).ok for n in range(12)]
    assert others == [True] * 9 + [False] * 3, "ten a second of all together: ann took one"
    assert limiter.take(0, "t", 0, b"zoe").scope == "total"
    assert limiter.stats().by_scope == (("total", 4), ("user", 50))


def test_a_critical_class_with_a_cap_is_neither_crowded_out_nor_a_flood() -> None:
    limiter = Limiter(LimiterConfig(rate_rps=5.0, burst=5.0, total_rps=5.0), {}, CLASSES)
    while limiter.take(0, "t", 0, b"", "chat").ok:
        pass
    assert [limiter.take(0, "t", 0, b"", "fraud").ok for _ in range(3)] == [True, True, False]
    refused = limiter.take(0, "t", 0, b"", "fraud")
    assert (refused.scope, refused.retry_after_ns) == ("class", 500 * MS_NS)
    assert limiter.take(0, "other", 0, b"", "fraud").ok, "each tenant has a cap of its own"
    assert not limiter.take(0, "t", 0, b"", "vip").ok, "a critical class without a cap is limited like any other"


def test_a_full_table_of_debtors_forgets_nobody_and_takes_in_nobody() -> None:
    limiter = Limiter(LimiterConfig(user_rps=1.0, user_burst_s=1.0, users_most=100, burst=1e6, rate_rps=1e6), {})
    for n in range(100):
        assert limiter.take(0, "t", 0, b"user %d" % n).ok
    assert all(limiter.take(0, "t", 0, b"late").ok for _ in range(5)), "not watched: its tenant's limit is all there is"
    assert not any(limiter.take(0, "t", 0, b"user %d" % n).ok for n in range(100)), "a debt stays a debt"
    assert limiter.stats().users == 100
    for n in range(200):  # nobody of those who owed comes again
        limiter.take(2 * S_NS, "t", 0, b"new %d" % n)
    assert limiter.stats().users <= 100
    again = [limiter.take(2 * S_NS, "t", 0, b"new %d" % n).ok for n in range(200)]
    assert again.count(False) >= 90, "those who had paid back made room for others"
    for _ in range(400):
        limiter.take(9 * S_NS, "t", 0, b"user 0")
    assert limiter.stats().users <= 1, "paid back: forgotten"
    assert [limiter.take(9 * S_NS, "t", 0, b"late").ok for _ in range(2)] == [True, False]


ASKED = st.tuples(
    st.sampled_from([b"ann", b"bob", b"eve"]), st.integers(0, 60), st.sampled_from([0, MS_NS, S_NS, 20 * S_NS]),
    st.one_of(st.none(), st.integers(0, 50)),  # which open request ends after it
)


@given(st.lists(ASKED, max_size=80), st.integers(1, 2))
@settings(max_examples=300, deadline=None)
def test_only_who_was_charged_is_refunded(asked: list[tuple[bytes, int, int, int | None]], most: int) -> None:
    """Each user's bucket is as if only what was charged to it had ever been asked, however full the table was."""
    config = LimiterConfig(
        rate_rps=1e6, burst=1e6, user_tokens_per_s=3.0, user_rps=1e6, token_burst_s=30.0, users_most=most
    )
    limiter, buckets, now_ns = Limiter(config, {}), {}, 0
    opened: list[tuple[bytes, int, bool]] = []
    for user, tokens, step_ns, ends in asked:
        now_ns += step_ns
        bucket = buckets.setdefault(user, naive(1e6, 1e7, 3.0, 30.0))
        bucket.at_ns = max(bucket.at_ns, now_ns) if bucket.full else bucket.at_ns
        full = limiter.stats().users >= most
        got = limiter.take(now_ns, "t", tokens, user)
        if got.watched or not got.ok:
            assert (got.ok, got.retry_after_ns) == ((want := bucket.take(now_ns, tokens)).ok, want.retry_after_ns)
        else:
            assert full, "a user is watched where there is room"
        if got.ok:
            opened.append((user, tokens, got.watched))
        if ends is not None and opened:
            who, reserved, watched = opened.pop(ends % len(opened))
            limiter.settle(now_ns, "t", reserved, reserved // 3, who if watched else b"")
            if watched:
                buckets[who].settle(now_ns, reserved, reserved // 3)
        limiter.check()


def test_a_million_users_take_bounded_memory() -> None:
    limiter = Limiter(LimiterConfig(user_rps=10.0, user_burst_s=0.1, rate_rps=1e9, burst=1e9), {})
    highest = 0
    for n in range(1_000_000):  # one a microsecond, each owes for 100 ms
        limiter.take(n * 1000, "t", 0, n.to_bytes(4, "big"))
        if not n % 10_000:
            highest = max(highest, limiter.stats().users)
    assert 100_000 <= highest <= 140_000

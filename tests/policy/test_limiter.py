"""The limiter against an exact bucket in fractions that never forgets anybody.

invariant: mutation that it caught
- all or nothing: the request charged before the tokens were looked at; a request taken by `settle`
- both are limited: tokens left out of the wait; tenant's own rates ignored; a tenant's 0 tokens read as "default"
- never more than rate and one burst: either refill not clamped; refill through a float; refill rounded to nano-units
- exact Retry-After: division rounded down (requests, tokens); one nanosecond too many; counted from the limiter's clock
- can never succeed: cost over burst, or a burst below one request, answered with a time; a bucket kept for it
- settle: does nothing, the wrong way round, no refund, refund above the burst, debt without bound, no debt at all,
  debt of a tenant without a bucket not stored
- clock: follows a step back (grants twice; or refills below zero)
- memory: no sweep; one bucket looked at per call; sweep that does not rotate
- nothing is forgotten: swept when merely idle; one nanosecond early; when only requests are full; oldest out at a cap
- off means off: `take`, `settle`; edges: `inf` not capped, 1e-12 rounded to 0; negative amounts let in; miscounts
"""

from __future__ import annotations

from fractions import Fraction
from math import ceil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from engine.config import LimiterConfig, TenantConfig
from engine.policy.gcra import SWEEP_EVERY
from engine.policy.limiter import Limiter, Verdict
from engine.units import MS_NS, S_NS, US_NS

TENANTS = {
    "slow": TenantConfig(rate_rps=0.3, burst=2.0, tokens_per_s=1.7),
    "free": TenantConfig(rate_rps=1e9 / 3, burst=4.0, tokens_per_s=0.0),
    "crumb": TenantConfig(burst=0.5),  # less than one request: never
}
NAMES = st.sampled_from(["slow", "free", "crumb", "stranger", "other stranger"])
TOKENS = st.one_of(st.integers(0, 12), st.integers(0, 2000))
STEPS_NS = st.one_of(st.sampled_from([0, 1, 2]), st.integers(0, 5 * MS_NS), st.integers(0, 30 * S_NS))


class NaiveBucket:
    """Requests and tokens as fractions; one level each, refilled by the definition."""

    def __init__(self, config: LimiterConfig, tenant: TenantConfig) -> None:
        def pick(name: str) -> Fraction:
            own = getattr(tenant, name)
            return Fraction(round((getattr(config, name) if own is None else own) * 10**9), 10**9)

        self.rates = pick("rate_rps"), pick("tokens_per_s")
        self.caps = pick("burst"), self.rates[1] * Fraction(config.token_burst_s)
        self.levels = list(self.caps)
        self.at_ns = 0

    def _refill(self, now_ns: int) -> None:
        for i in (0, 1):
            grown = self.levels[i] + self.rates[i] * (now_ns - self.at_ns) / S_NS
            self.levels[i] = min(grown, self.caps[i])
        self.at_ns = now_ns

    def take(self, now_ns: int, tokens: int) -> Verdict:
        self._refill(now_ns)
        needs = [(Fraction(1), 0)] + ([(Fraction(tokens), 1)] if self.rates[1] else [])
        if any(need > self.caps[i] for need, i in needs):
            return Verdict(ok=False)
        if all(need <= self.levels[i] for need, i in needs):
            for need, i in needs:
                self.levels[i] -= need
            return Verdict(ok=True)
        wait_ns = max(ceil((need - self.levels[i]) / self.rates[i] * S_NS) for need, i in needs)
        return Verdict(ok=False, retry_after_ns=wait_ns)

    def settle(self, now_ns: int, reserved: int, used: int) -> None:
        self._refill(now_ns)
        if self.rates[1]:
            self.levels[1] = max(-self.caps[1], min(self.caps[1], self.levels[1] + reserved - used))

    @property
    def full(self) -> bool:
        return self.levels == list(self.caps)


class LimiterMachine(RuleBasedStateMachine):
    """Random takes, settlements and clock steps, both ways."""

    @initialize(
        rate=st.sampled_from([0.7, 1.0, 1000 / 3]), burst=st.sampled_from([1.0, 2.5, 6.0]),
        tokens=st.sampled_from([0.0, 3.3, 100.0]), token_burst=st.sampled_from([0.5, 10.0]),
    )
    def start(self, rate: float, burst: float, tokens: float, token_burst: float) -> None:
        self.config = LimiterConfig(rate_rps=rate, burst=burst, tokens_per_s=tokens, token_burst_s=token_burst)
        self.limiter = Limiter(self.config, TENANTS)
        self.naive: dict[str, NaiveBucket] = {}
        self.now_ns = self.highest_ns = 0
        self.allowed = self.limited = 0

    def bucket(self, name: str) -> NaiveBucket:
        self.highest_ns = max(self.highest_ns, self.now_ns)
        if name not in self.naive:
            self.naive[name] = NaiveBucket(self.config, TENANTS.get(name, TenantConfig()))
            self.naive[name].at_ns = self.highest_ns
        return self.naive[name]

    def both(self, name: str, tokens: int) -> Verdict:
        expected = self.bucket(name).take(self.highest_ns, tokens)
        if expected.retry_after_ns is not None:  # the caller counts on its own clock, which may be behind
            expected = Verdict(ok=False, retry_after_ns=expected.retry_after_ns + self.highest_ns - self.now_ns)
        verdict = self.limiter.take(self.now_ns, name, tokens)
        assert verdict == expected
        self.allowed += verdict.ok
        self.limited += not verdict.ok
        return verdict

    @rule(step_ns=STEPS_NS)
    def forward(self, step_ns: int) -> None:
        self.now_ns += step_ns

    @rule(step_ns=STEPS_NS)
    def backward(self, step_ns: int) -> None:
        self.now_ns -= step_ns

    @rule(name=NAMES, tokens=TOKENS)
    def take(self, name: str, tokens: int) -> None:
        self.both(name, tokens)

    @rule(name=NAMES, tokens=TOKENS)
    def wait_as_told(self, name: str, tokens: int) -> None:
        verdict = self.both(name, tokens)
        if verdict.retry_after_ns is not None:
            self.now_ns += verdict.retry_after_ns - 1
            assert self.both(name, tokens) == Verdict(ok=False, retry_after_ns=1)
            self.now_ns += 1
            assert self.both(name, tokens).ok

    @rule(name=NAMES, reserved=TOKENS, used=TOKENS)
    def settle(self, name: str, reserved: int, used: int) -> None:
        self.bucket(name).settle(self.highest_ns, reserved, used)
        self.limiter.settle(self.now_ns, name, reserved, used)

    @invariant()
    def holds(self) -> None:
        self.limiter.check()
        stats = self.limiter.stats()
        assert (stats.allowed, stats.limited) == (self.allowed, self.limited)
        spent = 0
        for bucket in self.naive.values():
            bucket._refill(self.highest_ns)
            spent += not bucket.full
        assert spent <= stats.tenants <= len(self.naive), "whoever spent something is remembered"


LimiterMachine.TestCase.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
TestLimiterMachine = LimiterMachine.TestCase


@settings(max_examples=200, deadline=None)
@given(
    moves=st.lists(st.tuples(st.integers(-S_NS, 2 * S_NS), st.integers(0, 40)), min_size=1, max_size=60),
    rate=st.sampled_from([0.9, 3.0, 1e6 / 7]), tokens_per_s=st.sampled_from([7.7, 31.0]),
)
def test_no_window_ever_gets_more_than_its_rate_and_one_burst(
    moves: list[tuple[int, int]], rate: float, tokens_per_s: float,
) -> None:
    limiter = Limiter(LimiterConfig(rate_rps=rate, burst=3.0, tokens_per_s=tokens_per_s, token_burst_s=2.0), {})
    now_ns = highest_ns = 0
    admitted: list[tuple[int, int]] = []
    for step_ns, tokens in moves:
        now_ns += step_ns
        highest_ns = max(highest_ns, now_ns)
        if limiter.take(now_ns, "t", tokens).ok:
            admitted.append((highest_ns, tokens))
    exact_rate, exact_tokens = Fraction(round(rate * 10**9), 10**9), Fraction(round(tokens_per_s * 10**9), 10**9)
    for first, (from_ns, _) in enumerate(admitted):
        requests = tokens = 0
        for to_ns, cost in admitted[first:]:
            requests, tokens = requests + 1, tokens + cost
            assert requests <= exact_rate * (to_ns - from_ns) / S_NS + 3
            assert tokens <= exact_tokens * (to_ns - from_ns) / S_NS + exact_tokens * 2


@settings(max_examples=200, deadline=None)
@given(
    moves=st.lists(
        st.tuples(st.integers(-S_NS, 2 * S_NS), st.integers(0, 40), st.floats(0, 1), st.integers(0, 5)),
        min_size=1, max_size=60,
    ),
)
def test_refunds_buy_no_more_than_what_was_given_back(moves: list[tuple[int, int, float, int]]) -> None:
    """In any window: taken less given back is at most the rate and one burst, however late the answers end."""
    limiter = Limiter(LimiterConfig(rate_rps=1e9, burst=1e9, tokens_per_s=7.7, token_burst_s=5.0), {})
    now_ns = highest_ns = 0
    spent: list[tuple[int, int]] = []  # when, tokens; negative ones are refunds
    out: list[tuple[int, int]] = []  # reserved, used
    for step_ns, tokens, used_share, ends in moves:
        now_ns += step_ns
        highest_ns = max(highest_ns, now_ns)
        for reserved, used in out[:ends]:
            limiter.settle(now_ns, "t", reserved, used)
            spent.append((highest_ns, used - reserved))
        out = out[ends:]
        if limiter.take(now_ns, "t", tokens).ok:
            spent.append((highest_ns, tokens))
            out.append((tokens, int(tokens * used_share)))
    rate = Fraction(77, 10)
    for first, (from_ns, _) in enumerate(spent):
        net = 0
        for to_ns, tokens in spent[first:]:
            net += tokens
            assert net <= rate * (to_ns - from_ns) / S_NS + rate * 5


def test_a_refused_request_costs_nothing() -> None:
    limiter = Limiter(LimiterConfig(rate_rps=1.0, burst=2.0, tokens_per_s=10.0, token_burst_s=1.0), {})
    assert limiter.take(0, "t", 10).ok
    for _ in range(5):  # requests are left, tokens are not
        assert limiter.take(0, "t", 1) == Verdict(ok=False, retry_after_ns=100 * MS_NS)
    assert limiter.take(0, "t", 0).ok
    assert limiter.take(0, "t", 0) == Verdict(ok=False, retry_after_ns=S_NS)  # tokens would be there, requests are not
    assert limiter.take(S_NS, "t", 10).ok


def test_settling_refunds_up_to_one_burst_and_charges_down_to_one_burst_of_debt() -> None:
    limiter = Limiter(LimiterConfig(tokens_per_s=10.0, token_burst_s=10.0), {})
    assert limiter.take(0, "t", 100).ok
    limiter.settle(0, "t", 100, 40)
    assert limiter.take(0, "t", 61).retry_after_ns == 100 * MS_NS
    limiter.settle(0, "t", 10_000, 0)
    assert limiter.take(0, "t", 101) == Verdict(ok=False)
    assert limiter.take(0, "t", 100).ok
    limiter.settle(0, "t", 0, 1_000_000)
    assert limiter.take(0, "t", 0).retry_after_ns == 10 * S_NS
    assert limiter.take(0, "t", 100).retry_after_ns == 20 * S_NS
    limiter.check()


def test_a_debt_is_remembered_for_a_tenant_that_had_no_bucket() -> None:
    limiter = Limiter(LimiterConfig(tokens_per_s=10.0, token_burst_s=1.0), {})
    limiter.settle(0, "t", 0, 15)
    assert limiter.take(0, "t", 0).retry_after_ns == 500 * MS_NS


def test_a_clock_that_steps_back_grants_nothing_and_locks_out_no_longer_than_the_step() -> None:
    limiter = Limiter(LimiterConfig(rate_rps=10.0, burst=1.0), {})
    assert limiter.take(10 * S_NS, "t", 0).ok
    assert limiter.take(4 * S_NS, "t", 0) == Verdict(ok=False, retry_after_ns=6 * S_NS + 100 * MS_NS)
    assert limiter.take(10 * S_NS, "t", 0).retry_after_ns == 100 * MS_NS
    for i in range(50):  # long full again and swept: still the same clock for all
        limiter.take(20 * S_NS, f"other {i % 5}", 0)
    assert limiter.take(12 * S_NS, "t", 0).ok
    assert limiter.take(20 * S_NS, "t", 0).retry_after_ns == 100 * MS_NS


def test_a_day_of_silence_is_worth_one_burst() -> None:
    limiter = Limiter(LimiterConfig(rate_rps=100.0, burst=5.0), {})
    for day in range(3):
        answers = [limiter.take(day * 86_400 * S_NS, "t", 0).ok for _ in range(8)]
        assert answers == [True] * 5 + [False] * 3


def test_a_hundred_thousand_looks_do_not_move_the_moment_by_a_nanosecond() -> None:
    limiter = Limiter(LimiterConfig(rate_rps=3.0, burst=1.0), {})
    assert limiter.take(0, "t", 0).ok
    for i in range(100_000):
        at_ns = i * 3333
        assert limiter.take(at_ns, "t", 0).retry_after_ns == 333_333_334 - at_ns
    assert limiter.take(333_333_333, "t", 0).retry_after_ns == 1
    assert limiter.take(333_333_334, "t", 0).ok


def test_keys_come_and_go_in_bounded_memory_and_debt_stays() -> None:
    limiter = Limiter(
        LimiterConfig(rate_rps=1000.0, burst=10.0), {"debtor": TenantConfig(tokens_per_s=1.0)},
    )
    limiter.settle(0, "debtor", 0, 1_000)
    highest = 0
    for i in range(200_000):  # one key a microsecond, each full again after a millisecond: 1000 are not full
        assert limiter.take(i * US_NS, f"key {i}", 0).ok
        if i % 1000 == 0:
            highest = max(highest, limiter.stats().tenants)
    assert 1000 <= highest <= 1500
    for _ in range(1000):
        limiter.take(S_NS, "the last one", 0)
    assert limiter.stats().tenants == 2
    assert limiter.take(S_NS, "debtor", 0).retry_after_ns == 9 * S_NS  # ten seconds' burst of debt, one second ago
    limiter.check()


def test_a_burst_of_keys_at_one_moment_is_let_go_later() -> None:
    limiter = Limiter(LimiterConfig(rate_rps=1000.0, burst=10.0), {})
    for i in range(50_000):
        limiter.take(0, f"key {i}", 0)
    assert limiter.stats().tenants == 50_000
    for _ in range(50_000 // 4 + SWEEP_EVERY):
        limiter.take(S_NS, "the last one", 0)
    assert limiter.stats().tenants <= 1
    limiter.check()


def test_what_can_never_pass_is_told_so_and_leaves_no_trace() -> None:
    limiter = Limiter(LimiterConfig(tokens_per_s=10.0, token_burst_s=1.0), {"crumb": TenantConfig(burst=0.9)})
    assert limiter.take(0, "t", 11) == Verdict(ok=False, retry_after_ns=None)
    assert limiter.take(0, "crumb", 0) == Verdict(ok=False, retry_after_ns=None)
    assert limiter.stats().tenants == 0


def test_a_limiter_that_is_off_lets_everybody_pass() -> None:
    limiter = Limiter(LimiterConfig(enabled=False, rate_rps=1.0, burst=1.0, tokens_per_s=1.0), {})
    limiter.settle(0, "t", 0, 1000)
    assert all(limiter.take(0, "t", 10**9).ok for _ in range(100))
    assert limiter.stats().tenants == 0
    limiter.check()


def test_rates_at_the_edge_of_what_a_file_may_say() -> None:
    infinite = float("inf")
    limiter = Limiter(
        LimiterConfig(rate_rps=infinite, burst=infinite, tokens_per_s=infinite, token_burst_s=infinite),
        {"tiny": TenantConfig(rate_rps=1e-12, burst=1.0, tokens_per_s=1e-12)},
    )
    assert all(limiter.take(0, "t", 10**9).ok for _ in range(100))
    assert limiter.take(0, "tiny", 0).ok
    assert limiter.take(0, "tiny", 0).retry_after_ns == 10**9 * S_NS
    limiter.check()


def test_a_negative_amount_is_a_programming_error() -> None:
    limiter = Limiter(LimiterConfig(), {})
    with pytest.raises(AssertionError):
        limiter.take(0, "t", -1)
    with pytest.raises(AssertionError):
        limiter.settle(0, "t", 0, -1)
    with pytest.raises(AssertionError):
        limiter.settle(0, "t", -1, 0)

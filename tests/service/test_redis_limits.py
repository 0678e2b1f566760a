"""The limiter in Lua against the policy: the same verdicts for random traces; and two gateways whose Redis is killed.

invariant: mutation that it caught
- same verdict: a borrow forgotten; the debt not bounded; the clock's step back not held
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from engine.config import ClassConfig, LimiterConfig, Scenario, TenantConfig
from engine.policy.limiter import Limiter
from engine.service.redis_actor import RedisActor
from engine.service.shared_limits import SharedLimiter, Taken
from engine.service.shares import part_of_scenario, part_of_tenants
from engine.units import MS_NS, S_NS
from tests.service.redis_server import RedisServer, actor, reached, redis_server

CLASSES = {
    "fraud": ClassConfig(criticality="critical", cap_rps=2.0), "chat": ClassConfig(criticality="standard"),
    "batch": ClassConfig(criticality="sheddable", cap_rps=0.5),
}
TENANTS = {"a": TenantConfig(rate_rps=3.0, burst=3.0), "b": TenantConfig(tokens_per_s=5.0)}
CONFIGS = st.builds(
    LimiterConfig, rate_rps=st.sampled_from([4.0, 0.37, 1e9]), burst=st.sampled_from([1.0, 5.0]),
    tokens_per_s=st.sampled_from([0.0, 7.3, float(10**14)]), total_rps=st.sampled_from([0.0, 0.3, 7.0]),
    total_burst_s=st.just(2.0), user_rps=st.sampled_from([0.0, 0.7]), user_tokens_per_s=st.sampled_from([0.0, 40.0]),
)
STEPS_NS = st.one_of(
    st.integers(-3 * S_NS, 3 * S_NS), st.sampled_from([0, 1, -1, MS_NS, S_NS, 86_400 * S_NS, -86_400 * S_NS])
)
STEPS = st.lists(
    st.tuples(
        STEPS_NS, st.sampled_from("abc"), st.sampled_from([b"", b"ann", b"bob"]), st.sampled_from(sorted(CLASSES)),
        st.one_of(st.integers(0, 80), st.just(10**12)), st.none() | st.integers(0, 160),
    ),
    max_size=40,
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory):
    with redis_server(tmp_path_factory.mktemp("redis")) as started:
        yield started


def over(made: RedisActor, prefix: str, config: LimiterConfig, parts: int = 1) -> SharedLimiter:
    scenario = part_of_scenario(Scenario("s", limiter=config, classes=CLASSES), parts)
    part = Limiter(scenario.limiter, part_of_tenants(TENANTS, parts), scenario.classes)
    return SharedLimiter(made, prefix, config, TENANTS, CLASSES, part)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@example(  # a debt of more than one burst is cut
    config=LimiterConfig(tokens_per_s=7.3), start_ns=0,
    steps=[(0, "b", b"", "chat", 1, 1000), (0, "b", b"", "chat", 1, None)],
)
@given(config=CONFIGS, steps=STEPS, start_ns=st.sampled_from([0, 1_764_000_000 * S_NS]))
def test_lua_says_what_the_policy_says(server: RedisServer, config: LimiterConfig, steps: list, start_ns: int) -> None:
    """To the nanosecond, with clocks that step back, debts, refunds, and tokens that can never pass."""

    async def main() -> None:
        policy = Limiter(config, TENANTS, CLASSES)
        at = start_ns
        server.flush()
        async with actor(server.port, budget_ms=10_000) as made:
            shared = over(made, "p", config)
            for step_ns, tenant, user, name, tokens, used in steps:
                at = max(0, at + step_ns)
                expected = policy.take(at, tenant, tokens, user, name)
                taken = await shared.take(0, tenant, tokens, user, name, at=at)
                assert taken.verdict == expected and taken.shared
                if expected.ok and used is not None:
                    who = user if expected.watched else b""
                    policy.settle(at, tenant, tokens, used, who, name)
                    await shared.settle(0, taken, tenant, tokens, used, user, name, at=at)

    asyncio.run(main())


def test_keys_of_debts_that_are_paid_back_leave(server: RedisServer) -> None:
    async def main() -> None:
        server.flush()
        async with actor(server.port, budget_ms=10_000) as made:
            shared = over(made, "p", LimiterConfig(rate_rps=10.0, burst=10.0))
            assert (await shared.take(0, "c", 0)).verdict.ok
            with server.client() as client:
                [key] = [key for key in client.scan_iter() if b"tenant" in key]
                assert 1000 < client.pttl(key) <= 1101, "a tenth of a second to pay back, and one more"

    asyncio.run(main())


@pytest.mark.parametrize("turns", [(0, 1), (0, 0, 0, 1)])
def test_two_gateways_and_a_redis_that_dies_and_returns(tmp_path: Path, turns: tuple[int, ...]) -> None:
    """Virtual time, real Redis: 30 s at twice the limit, dead from second 10 to 20. Over-admission <= 10 % + burst."""

    async def main() -> None:
        config = LimiterConfig(rate_rps=20.0, burst=10.0)
        with redis_server(tmp_path) as server:
            async with actor(server.port, budget_ms=2000) as left, actor(server.port, budget_ms=2000) as right:
                gateways = [over(left, "p", config, 2), over(right, "p", config, 2)]
                passed: list[tuple[int, Taken]] = []
                for n in range(30 * 40):
                    at = n * S_NS // 40
                    if at == 10 * S_NS:
                        server.kill()
                    if at == 20 * S_NS:
                        server.start()
                        await asyncio.gather(reached(left), reached(right))
                    taken = await gateways[turns[n % len(turns)]].take(at, "c", 1, at=at)
                    if taken.verdict.ok:
                        passed.append((at, taken))
        allowed = 20 * 30 + 10
        assert len(passed) <= allowed * 1.1 + 10, len(passed)
        alone = [at for at, taken in passed if not taken.shared]
        assert alone and min(alone) >= 10 * S_NS and max(alone) < 20 * S_NS
        assert len(alone) <= 20 * 10 * 1.1 + 10, "away: no more than the limit of all together"
        assert turns != (0, 1) or len(passed) >= 20 * 30, "and nothing that is allowed is lost, evenly spread"

    asyncio.run(main())

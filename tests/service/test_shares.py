"""What each of several ingress processes may let through adds up to what the scenario says, and lets somebody through.

Run: python -m pytest tests/service/test_shares.py -q
Mutations it caught: rates undivided, of the scenario or of a tenant; a burst below one request.
"""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.config import (
    ClassConfig,
    IngressConfig,
    LimiterConfig,
    OverloadConfig,
    Scenario,
    TenantConfig,
    gateway_config,
)
from engine.policy.limiter import Limiter
from engine.service.replicas import share_cores
from engine.service.shares import part_of_scenario, part_of_tenants
from engine.units import MS_NS
from engine.upstream_config import UpstreamConfig

rates = st.floats(0.5, 60.0)
bursts = st.floats(1.0, 60.0)


def scenario(**changes: object) -> Scenario:
    base = Scenario(name="s", classes={"chat": ClassConfig("standard"), "fraud": ClassConfig("critical", cap_rps=60.0)})
    return msgspec.structs.replace(base, **changes)


@given(workers=st.integers(1, 8), rate=rates, burst=bursts, own=st.none() | rates, data=st.data())
def test_all_together_let_through_what_one_would(
    workers: int, rate: float, burst: float, own: float | None, data: st.DataObject
) -> None:
    """But for a burst that is too small to be divided: then one request each."""
    whole = scenario(limiter=LimiterConfig(rate_rps=rate, burst=burst, total_rps=2 * rate))
    tenants = {"shop": TenantConfig(rate_rps=own)}
    part, parts = part_of_scenario(whole, workers), part_of_tenants(tenants, workers)
    config = gateway_config(part, parts)
    limiters = [Limiter(config.limiter, config.tenants, config.classes) for _ in range(workers)]
    seconds = data.draw(st.integers(1, 3))
    passed = 0
    for now_ns in range(0, seconds * 1000 * MS_NS + 1, 50 * MS_NS):
        for limiter in limiters:
            while limiter.take(now_ns, "shop", 5, traffic_class="chat").ok:
                passed += 1
                assert passed < 100_000
    of_tenant = max(burst, workers) + (own or rate) * seconds
    of_all = max(2 * rate, workers) + 2 * rate * seconds
    assert workers <= passed <= min(of_tenant, of_all) + workers


def test_what_is_counted_and_capped_is_divided() -> None:
    whole = scenario(
        ingress=IngressConfig(max_in_flight=10, max_connections=9),
        overload=OverloadConfig(fallback_rps=300.0),
        limiter=LimiterConfig(user_rps=4.0, user_tokens_per_s=90.0, users_most=1),
    )
    part = part_of_scenario(whole, 3)
    assert (part.ingress.max_in_flight, part.ingress.max_connections) == (3, 3)
    assert part.ingress.max_connections_per_address == whole.ingress.max_connections_per_address
    assert (part.classes["fraud"].cap_rps, part.classes["chat"].cap_rps) == (20.0, 0.0)
    assert part.overload.fallback_rps == 100.0
    assert part.limiter.user_rps == pytest.approx(4 / 3)
    assert (part.limiter.user_tokens_per_s, part.limiter.users_most) == (30.0, 1)


def test_an_unlimited_tenant_stays_so_and_nothing_else_of_it_changes() -> None:
    tenants = {"shop": TenantConfig(classes=("chat",), tokens_per_s=0.0, weight=3.0), "cafe": TenantConfig(burst=1.5)}
    parts = part_of_tenants(tenants, 2)
    assert parts["shop"] == tenants["shop"]
    assert parts["cafe"] == TenantConfig(burst=1.0)


@pytest.mark.parametrize(
    ("window", "reserved", "workers", "want"),
    [(8, 1, 2, (4, 1)), (8, 0, 3, (2, 0)), (2, 1, 4, (2, 1)), (1, 0, 2, (1, 0))],
)
def test_an_upstream_has_a_place_for_everybody(
    window: int, reserved: int, workers: int, want: tuple[int, int]
) -> None:
    up = UpstreamConfig(url="http://x", window=window, reserved=reserved)
    part = part_of_scenario(scenario(upstreams={"x": up}), workers).upstreams["x"]
    assert (part.window, part.reserved) == want


def test_cores_are_shared_out_among_gateways_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(6)))
    assert share_cores(0, 2, 2) == ((0, 1), (2, 3, 4, 5), 2)
    assert share_cores(1, 2, 3) == ((0, 1, 2, 3), (4, 5), 1)
    assert share_cores(3, 2, 1) == ((), (), 3), "not enough: nobody is pinned"
    assert share_cores(2, 2, 3) == ((), (), 2)

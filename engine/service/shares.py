"""What one of several ingress processes may let through: the scenario's limits, divided by how many there are.

Each process counts for itself, so that together they let through no more than the scenario says. Divided are rates,
bursts, caps, requests in flight, connections, the flood of last resorts and an upstream's places; a burst of less than
one request would let nobody in, so one is the least. A bucket of model tokens is divided as it is: a request must fit
into its part. Not divided is what is a share of something, or true of one client at a time. Breakers, response caches
and single flight are each process's own.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from engine.config import ClassConfig, LimiterConfig, Scenario, TenantConfig
from engine.upstream_config import UpstreamConfig

replace = msgspec.structs.replace


def part_of_scenario(scenario: Scenario, workers: int) -> Scenario:
    """The scenario of each of ``workers`` ingress processes."""
    limiter, ingress = scenario.limiter, scenario.ingress
    return replace(
        scenario,
        classes={name: _part_of_class(cls, workers) for name, cls in scenario.classes.items()},
        limiter=replace(
            limiter, rate_rps=limiter.rate_rps / workers, burst=_burst(limiter.burst, workers),
            tokens_per_s=limiter.tokens_per_s / workers, total_rps=limiter.total_rps / workers,
            total_burst_s=_total_burst_s(limiter, workers),
            user_rps=limiter.user_rps / workers, user_tokens_per_s=limiter.user_tokens_per_s / workers,
            users_most=_count(limiter.users_most, workers),
        ),
        overload=replace(scenario.overload, fallback_rps=scenario.overload.fallback_rps / workers),
        ingress=replace(
            ingress, max_in_flight=_count(ingress.max_in_flight, workers),
            max_connections=_count(ingress.max_connections, workers),
        ),
        upstreams={name: _part_of_upstream(up, workers) for name, up in scenario.upstreams.items()},
    )


def part_of_tenants(tenants: Mapping[str, TenantConfig], workers: int) -> dict[str, TenantConfig]:
    """What each tenant's key grants at each of ``workers`` ingress processes."""
    return {
        name: replace(
            own, rate_rps=own.rate_rps and own.rate_rps / workers, burst=own.burst and _burst(own.burst, workers),
            tokens_per_s=own.tokens_per_s and own.tokens_per_s / workers,
        )
        for name, own in tenants.items()
    }


def _part_of_class(cls: ClassConfig, workers: int) -> ClassConfig:
    return replace(cls, cap_rps=cls.cap_rps / workers)


def _part_of_upstream(up: UpstreamConfig, workers: int) -> UpstreamConfig:
    """At least a place that is open to all, and a reserved one beside it where there was one."""
    reserved = -(-up.reserved // workers)
    return replace(up, window=max(up.window // workers, reserved + 1), reserved=reserved)


def _burst(requests: float, workers: int) -> float:
    return max(requests / workers, min(requests, 1.0))


def _total_burst_s(limiter: LimiterConfig, workers: int) -> float:
    if not limiter.total_rps:
        return limiter.total_burst_s
    burst = _burst(limiter.total_rps * limiter.total_burst_s, workers) * (1 + 1e-6)  # never rounded to less than one
    return burst / (limiter.total_rps / workers)


def _count(most: int, workers: int) -> int:
    return max(1, most // workers)

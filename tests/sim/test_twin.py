"""The twin against what theory says must hold: conservation, utilisation, queueing formulae, determinism.

Run: python -m pytest tests/sim/test_twin.py -q
Mutations it caught: a step's cost charged twice; busy time without the last step; a request answered twice; the run's
end taken from the last idle timer; a slot that two sequences share.
"""

from __future__ import annotations

import numpy as np
import pytest

from engine.config import (
    BatcherConfig,
    BreakerConfig,
    ClassConfig,
    OverloadConfig,
    PrefixConfig,
    Scenario,
    TenantConfig,
)
from engine.events import Arrive
from engine.model.blockhash import Hasher
from engine.stepcost import StepCost
from engine.units import S_NS
from sim.twin.driver import Lags
from sim.twin.system import TwinArrival, TwinRun, TwinSystem

HASHER = Hasher(b"theory", 16)
STEP = StepCost(fixed_ns=10e6, prefill_token_ns=0, prefill_row_ns=0, decode_row_ns=0, decode_kv_ns=0, area_ns=0)


def queue(slots: int, timeout_ms: int = 10_000_000) -> Scenario:
    """A plain queue before ``slots`` servers: no caches, no overload control, nobody gives up."""
    cls = ClassConfig(
        "standard", slo_ttft_ms=10**9, slo_e2e_ms=10**9, timeout_ms=timeout_ms, max_tokens=400, caches="none"
    )
    return Scenario(
        name="queue", classes={"c": cls}, overload=OverloadConfig(enabled=False),
        breaker=BreakerConfig(enabled=False),
        batcher=BatcherConfig(step_tokens=4096, slots=slots, reserved_slots=0, reserved_blocks=0),
        prefix=PrefixConfig(enabled=False, blocks=4096, pinned_blocks=0),
    )


def arrivals(rate_rps: float, count: int, lengths: np.ndarray, seed: int) -> list[TwinArrival]:
    times = np.cumsum(np.random.default_rng(seed).exponential(1 / rate_rps, count))
    return [
        TwinArrival(Arrive(i, f"r{i}", "t", "c", round(t * S_NS), 8, 400), int(n), f"a{i}", 4)
        for i, (t, n) in enumerate(zip(times, lengths, strict=True))
    ]


def run(scenario: Scenario, asks: list[TwinArrival], check: bool = False) -> TwinRun:
    return TwinSystem(scenario, {"t": TenantConfig()}, STEP, Lags(), asks, HASHER, check=check).run()


def test_conservation_and_order() -> None:
    asks = arrivals(6.0, 300, np.full(300, 12), seed=1)
    found = run(queue(4), asks, check=True)
    assert sorted(r.request_id for r in found.requests) == sorted(a.ask.request_id for a in asks)
    assert len(found.answers) == len(asks)
    assert all(r.outcome == "served" and r.output_tokens == 12 for r in found.requests)
    assert all(r.queue_ns <= r.ttft_ns <= r.e2e_ns for r in found.requests if r.ttft_ns is not None)


def test_one_server_with_constant_service_follows_pollaczek_khinchine() -> None:
    """M/D/1: a batch of one, 20 steps of 10 ms an answer (the end token included): W = rho * S / (2 (1 - rho))."""
    count, service_s = 12_000, 0.2
    waits = []
    for seed in range(3):
        found = run(queue(1), arrivals(3.5, count, np.full(count, 19), seed))
        waits.append(np.mean([r.queue_ns for r in found.requests]) / S_NS)
    rho = 3.5 * service_s
    assert np.mean(waits) == pytest.approx(rho * service_s / (2 * (1 - rho)), rel=0.08)


def test_utilisation_is_throughput_times_service() -> None:
    count = 4000
    found = run(queue(1), arrivals(3.0, count, np.full(count, 19), seed=9))
    assert found.busy_ns == count * 20 * 10_000_000, "each answer costs exactly its twenty steps"
    assert found.busy_ns / found.end_ns == pytest.approx(3.0 * 0.2, rel=0.05)


def test_beyond_capacity_the_queue_grows_linearly() -> None:
    count = 2000
    found = run(queue(1), arrivals(10.0, count, np.full(count, 19), seed=2))  # capacity is 5 per second
    waits = np.array([r.queue_ns for r in sorted(found.requests, key=lambda r: r.arrived_ns)]) / S_NS
    assert waits[-1] == pytest.approx(count / 5.0 - count / 10.0, rel=0.1)


def test_little_holds_exactly() -> None:
    """Over an empty-to-empty window the time integral of the number in the system is the sum of the sojourns."""
    found = run(queue(3), arrivals(10.0, 500, np.random.default_rng(3).integers(1, 40, 500), seed=4))
    came = [(r.arrived_ns, 1) for r in found.requests]
    events = sorted(came + [(r.arrived_ns + r.e2e_ns, -1) for r in found.requests])
    integral, inside, before = 0, 0, 0
    for at_ns, change in events:
        integral += inside * (at_ns - before)
        inside, before = inside + change, at_ns
    assert inside == 0
    assert integral == sum(r.e2e_ns for r in found.requests)


def test_same_arrivals_same_run() -> None:
    lengths = np.random.default_rng(5).integers(1, 60, 400)
    first, again = (run(queue(2), arrivals(9.0, 400, lengths, seed=6)) for _ in range(2))
    assert first == again

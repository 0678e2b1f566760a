"""Simulated requests per CPU-second with every policy on, against SimPy's own ceiling in the same run.

Baseline: a bare SimPy M/M/4 queue, one process a customer (a published reading on another machine: 57,000 customers
per CPU-second). The twin does 20 to 30 planned steps for each request, with limiter, caches, overload and KV blocks.
"""

from __future__ import annotations

import random
import time

import simpy

from engine.model.blockhash import Hasher
from sim.twin.driver import Lags
from sim.twin.system import TwinSystem
from tests.equivalence.test_virtual_time import COST, TENANTS, scenario, workload

ROUNDS = 5
CUSTOMERS = 20_000


def bench() -> tuple[float, str, str, float]:
    """(twin, unit, baseline, SimPy)."""
    hasher = Hasher(b"key", 16)
    arrivals = [arrival for *_, arrival in workload(hasher, 1)]
    best = 0.0
    for _ in range(ROUNDS):
        system = TwinSystem(scenario(), TENANTS, COST, Lags(), arrivals, hasher)
        began = time.process_time()
        system.run()
        best = max(best, len(arrivals) / (time.process_time() - began))
    return best, "requests per CPU-second", "SimPy M/M/4 customers per CPU-second", max(_queue() for _ in range(3))


def _queue() -> float:
    rng = random.Random(1)
    env = simpy.Environment()
    servers = simpy.Resource(env, 4)

    def customer():  # type: ignore[no-untyped-def]
        with servers.request() as turn:
            yield turn
            yield env.timeout(rng.expovariate(1.0))

    def source():  # type: ignore[no-untyped-def]
        for _ in range(CUSTOMERS):
            yield env.timeout(rng.expovariate(3.2))
            env.process(customer())

    env.process(source())
    began = time.process_time()
    env.run()
    return CUSTOMERS / (time.process_time() - began)

"""Decisions a second of other people's rate limiters, in memory, always allowed; run in an environment of its own.

Prints one JSON object: name to decisions per second of CPU time. The keys are a thousand, but for ``aiolimiter``, which
has one limiter and no keys.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable

KEYS = [f"tenant-{n}" for n in range(1000)]
DECISIONS, ROUNDS = 60_000, 3


def rate(decide: Callable[[str], object]) -> float:
    """The best of some rounds."""
    best = 0.0
    for _ in range(ROUNDS):
        began = time.process_time()
        for n in range(DECISIONS):
            decide(KEYS[n % 1000])
        best = max(best, DECISIONS / (time.process_time() - began))
    return best


def limits() -> dict[str, float]:
    """https://pypi.org/project/limits"""
    from limits import RateLimitItemPerSecond
    from limits.storage import MemoryStorage
    from limits.strategies import FixedWindowRateLimiter, MovingWindowRateLimiter

    item, found = RateLimitItemPerSecond(10**9), {}
    for name, kind in (("fixed window", FixedWindowRateLimiter), ("moving window", MovingWindowRateLimiter)):
        limiter = kind(MemoryStorage())
        found[f"limits, {name}"] = rate(lambda key, limiter=limiter: limiter.hit(item, key))
    return found


def throttled() -> dict[str, float]:
    """https://pypi.org/project/throttled-py"""
    from throttled import RateLimiterType, Throttled, rate_limiter, store

    memory = store.MemoryStore(options={"MAX_SIZE": 2048})
    found = {}
    for kind in (RateLimiterType.GCRA, RateLimiterType.TOKEN_BUCKET):
        limiter = Throttled(using=kind.value, quota=rate_limiter.per_sec(10**6, burst=10**6), store=memory)
        found[f"throttled-py, {kind.value}"] = rate(limiter.limit)
    return found


async def aiolimiter() -> dict[str, float]:
    """https://pypi.org/project/aiolimiter"""
    from aiolimiter import AsyncLimiter

    limiter, best = AsyncLimiter(10**9, 1), 0.0
    for _ in range(ROUNDS):
        began = time.process_time()
        for _ in range(DECISIONS):
            await limiter.acquire()
        best = max(best, DECISIONS / (time.process_time() - began))
    return {"aiolimiter, one key": best}


if __name__ == "__main__":
    print(json.dumps(limits() | throttled() | asyncio.run(aiolimiter())))

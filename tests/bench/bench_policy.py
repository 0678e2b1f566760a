"""What the policy core decides a second, on one core: the limiter alone, and a whole request that a cache answers.

Targets: 1,000,000 limiter decisions and 60,000 exact hits a second. The limiter's baseline is each of three well-kept
libraries (``sh .ci/peers``), in the same run; they are asked for requests only, as ours is in the figures beside them.
"""

from __future__ import annotations

import json
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from engine.config import ClassConfig, GatewayConfig, LimiterConfig, TenantConfig
from engine.events import Arrive, Ended, FirstToken, Submit
from engine.model.folder import cache_dir
from engine.policy.gateway import Gateway
from engine.policy.limiter import Limiter
from tests.bench.figure import Figure

DECISIONS, ROUNDS, TENANTS = 200_000, 5, [f"tenant-{n}" for n in range(1000)]
HITS = 40_000
AMPLE = LimiterConfig(rate_rps=1e9, burst=1e9)
LEVELS = LimiterConfig(
    rate_rps=1e9, burst=1e9, tokens_per_s=1e12, total_rps=1e9, user_rps=1e9, user_tokens_per_s=1e12,
)
TARGET_LIMITER, TARGET_HIT = 1_000_000, 60_000


def bench() -> list[Figure]:
    """Decisions per second of CPU time, the best of some rounds."""
    plain = _limiter(AMPLE, lambda limiter, now_ns, n: limiter.take(now_ns, TENANTS[n % 1000], 100))
    levels = _limiter(
        LEVELS, lambda limiter, now_ns, n: limiter.take(now_ns, TENANTS[n % 1000], 100, b"%d" % (n % 5000), "chat")
    )
    figures = [Figure(plain, "limiter decisions/s, requests of 1,000 tenants", "target", TARGET_LIMITER)]
    figures += [
        Figure(plain, "limiter decisions/s, requests of 1,000 tenants", name, theirs)
        for name, theirs in _peers().items()
    ]
    what = "limiter decisions/s, requests and tokens of total, tenant and user"
    figures.append(Figure(levels, what, "target", TARGET_LIMITER))
    figures.append(Figure(_exact_hits(), "exact hits/s through Gateway.handle", "target", TARGET_HIT))
    return figures


def _limiter(config: LimiterConfig, decide: Callable[[Limiter, int, int], object]) -> float:
    best = 0.0
    for _ in range(ROUNDS):
        limiter = Limiter(config, {})
        began = time.process_time()
        for n in range(DECISIONS):
            decide(limiter, n * 1000, n)
        best = max(best, DECISIONS / (time.process_time() - began))
    return best


def _peers() -> dict[str, float]:
    """In their own environment; none when it was not made."""
    python = cache_dir() / "peers" / "limiters" / "bin" / "python"
    if not python.is_file():
        print("policy: no other limiters here; sh .ci/peers python3 makes their environment", file=sys.stderr)
        return {}
    script = Path(__file__).parent / "peers" / "limiters.py"
    found: dict[str, float] = json.loads(subprocess.run([python, script], capture_output=True, check=True).stdout)
    return found


def _exact_hits() -> float:
    best = 0.0
    for _ in range(ROUNDS):
        ample = TenantConfig(rate_rps=1e9, burst=1e9)
        gateway = Gateway(GatewayConfig(classes={"chat": ClassConfig("standard")}, tenants={"t": ample}))
        sid = next(action.sid for action in gateway.handle(0, _ask(0)) if isinstance(action, Submit))
        gateway.handle(1, FirstToken(sid))
        gateway.handle(2, Ended(sid, "stop", 20, 0, 5, answer_id="answer", answer_bytes=20))
        asks = [_ask(rid) for rid in range(1, HITS + 1)]
        began = time.process_time()
        for n, ask in enumerate(asks):
            gateway.handle(3 + n * 1000, ask)
        best = max(best, HITS / (time.process_time() - began))
        assert gateway.stats().exact.hits == HITS
    return best


def _ask(rid: int) -> Arrive:
    return Arrive(
        rid, f"r{rid}", "t", "chat", rid, 20, 10, exact_key=b"k" * 16, hard_key=b"h" * 16, text_key=b"q" * 16,
        blocks=(b"b" * 16,),
    )

"""An engine that thousands may ask at once, in a process of its own.

    python -m tests.drill.crowded STEP_S SLOTS WORDS

The fake model; a step takes ``STEP_S`` whatever is in it, so that every stream has one token so often (0: at once).
Slots and KV blocks for all of them, prompts of all of them in one step, no limits but the ingress's own; nothing is
written to disk. Prints where it is, a key and its process id; serves until its stdin ends.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile

import uvloop

from engine.cache_config import ExactConfig
from engine.config import (
    BatcherConfig,
    ClassConfig,
    LimiterConfig,
    ModelConfig,
    OverloadConfig,
    PrefixConfig,
    RouterConfig,
    Scenario,
)
from engine.ingress_config import IngressConfig
from engine.service.auth import KeyRing
from engine.service.connections import allow_many_files
from engine.service.server import ServeOptions, running
from engine.stepcost import StepCost
from tests.drill.crowd import answer, question

BLOCKS_A_STREAM = 16  # prompt and answer of 250 tokens
REPLICAS = 8  # each takes in some hundred a step: what fits into a unix socket. So all have begun within a dozen steps


def scenario_for(slots: int, answers: str) -> Scenario:
    """As wide as it must be and no wider. ``answers``: the fake model's table."""
    each = slots // REPLICAS * 3 // 2 + 100  # the router need not share out evenly
    return Scenario(
        name="crowded",
        classes={
            "crowd": ClassConfig(criticality="standard", slo_ttft_ms=600_000, timeout_ms=900_000, max_tokens=200),
            "fraud": ClassConfig(criticality="critical", slo_ttft_ms=600_000, timeout_ms=900_000, max_tokens=4),
        },
        model=ModelConfig(name="fake", context_tokens=512, fake_answers=answers),
        ingress=IngressConfig(max_in_flight=slots + 100, keep_alive_ms=600_000),
        limiter=LimiterConfig(enabled=False), overload=OverloadConfig(enabled=False), exact=ExactConfig(enabled=False),
        batcher=BatcherConfig(
            step_tokens=200 * slots, slots=each, reserved_slots=2, reserve="none", max_step_ms=60_000,
            max_multi_steps=1,
        ),
        prefix=PrefixConfig(blocks=BLOCKS_A_STREAM * each),
        router=RouterConfig(affinity=False, kv_events=False), replicas=REPLICAS,
        replica_hang_s=120.0,
    )  # fmt: skip


async def main(step_s: float, slots: int, words: int) -> None:
    """Until nobody needs it any more."""
    ring, key = KeyRing.single()
    nothing = {"prefill_token_ns": 0, "prefill_row_ns": 0, "decode_row_ns": 0, "decode_kv_ns": 0, "area_ns": 0}
    cost = StepCost(fixed_ns=step_s * 1e9, **nothing) if step_s else None
    with tempfile.NamedTemporaryFile("w", suffix=".csv") as table:
        table.write("prompt,answer_id,answer\n")
        table.writelines(f"{question(n)},{n},{answer(n, words)}\n" for n in range(slots if words else 0))
        table.flush()
        await serve(scenario_for(slots, table.name), ring, ServeOptions(pin_cores=False, fake_cost=cost), key)


async def serve(scenario: Scenario, ring: KeyRing, options: ServeOptions, key: str) -> None:
    """Says where."""
    async with running(scenario, ring, options) as engine:
        print(json.dumps({"url": engine.url, "key": key, "pid": os.getpid()}), flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    allow_many_files()
    uvloop.run(main(float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))

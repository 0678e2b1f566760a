"""A critical request while 32 standard sequences decode and long prompts prefill: SmolLM2, the real machine, real time.

First the steps' costs are measured here, as ``doorbuster calibrate`` does it; from them the batcher keeps each step
within ``MAX_STEP_MS``. Then the same critical prompts twice, one by one: through an empty replica, and through the full
one, at moments that have nothing to do with its steps. Times to the first token count from that moment, so the rest of
the step in flight is in them. Tokens must be the same both times.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import random
import sys
import time
from statistics import median

import numpy as np

from engine.config import BatcherConfig, PrefixConfig, ReplicaConfig
from engine.events import StepShape
from engine.model.blockhash import Hasher
from engine.model.loader import LoadedModel, load, prepare
from engine.model.runner import TorchRunner
from engine.stepcost import StepCost
from engine.units import MS_NS, ceil_div, s_to_ns
from sim.twin.cost import fit
from sim.twin.measure import Bench
from tests.bench.blocks import block_tokens
from tests.bench.figure import Figure
from tests.bench.live_replica import Answered, Ask, LiveReplica, StepTime

THREADS, POOL_TOKENS = 2, 20_480
MAX_STEP_MS = 250
SLOTS, RESERVED_SLOTS, RESERVED_BLOCKS, MOST_TOKENS = 44, 2, 32, 512
DECODING, SHORTS, SHORT_TOKENS, ANSWER_TOKENS = 32, 36, 32, 300  # some wait behind a long prompt at any time
LONG, LONG_TOKENS, LONG_ANSWER_TOKENS = 2, 768, 4
CRITICAL, CRITICAL_TOKENS, CRITICAL_ANSWER_TOKENS = 100, 64, 8
CALIBRATE_S, DESIGN_CONTEXT, DESIGN_CHUNK_BLOCKS = 20.0, 360, 200  # what the design takes at most
PAUSE_S = 0.4  # at most, between two critical requests


def bench(device: str = "cpu") -> list[Figure]:
    """Waiting beyond the unloaded time, and the longest steps, over the bound."""
    model = load(prepare("smollm2", lambda line: None), device=device, threads=THREADS)
    hasher = Hasher(b"bench", block_tokens(device))
    config = _config(_calibrated(model, hasher), hasher.block_tokens)
    prompts = _prompts(model, CRITICAL, CRITICAL_TOKENS, seed=1)
    alone = _unloaded(LiveReplica(model, config, hasher), prompts)
    crowd = Crowd(LiveReplica(model, config, hasher), model)
    loaded = crowd.with_critical(prompts)
    same = sum(a.tokens == b.tokens for a, b in zip(alone, loaded, strict=True))
    steps_ms = [step.ns / MS_NS for step in crowd.steps]
    rows = [step.shape.decode_rows for step in crowd.steps]
    extra = [b.ttft_ms - a.ttft_ms for a, b in zip(alone, loaded, strict=True)]
    _spread("time to first token, alone, ms", [a.ttft_ms for a in alone])
    _spread("time to first token, in the crowd, ms", [b.ttft_ms for b in loaded])
    _spread("  of it, the rest of the step in flight", [b.flight_ms for b in loaded])
    _spread("  of it, its own steps", [b.ttft_ms - b.flight_ms for b in loaded])
    _spread("the difference, prompt by prompt, ms", extra)
    _spread("steps in the crowd, ms", steps_ms)
    cpu_ms = [step.cpu_ns / MS_NS / THREADS for step in crowd.steps]
    _spread(f"  their CPU time over {THREADS} threads, what they take at least, ms", cpu_ms)
    errors = [abs(config.cost.ns(step.shape) / step.ns - 1) for step in crowd.steps] if config.cost else []
    _spread("error of the predicted step time there, %", [100 * error for error in errors])
    over = sum(ms > MAX_STEP_MS for ms in steps_ms)
    _say(f"{over} of {len(steps_ms)} steps took longer than {MAX_STEP_MS} ms; decode rows: median {median(rows):.0f}, "
         f"from {min(rows)} to {max(rows)}")
    _say(f"tokens equal to the unloaded run: {same} of {len(prompts)} answers of {CRITICAL_ANSWER_TOKENS} tokens")
    bound = median(a.ttft_ms for a in alone) + MAX_STEP_MS
    return [
        Figure(_quantile([b.ttft_ms for b in loaded], 0.99), "ms to the first token, p99, critical in the crowd",
               f"unloaded median + {MAX_STEP_MS} ms", bound),
        Figure(_quantile(steps_ms, 0.999), "ms a step, p99.9", f"batcher.max_step_ms = {MAX_STEP_MS}", MAX_STEP_MS),
        Figure(same, "critical answers with the tokens of the unloaded run", "critical answers", len(prompts)),
    ]


# ---------------------------------------------------------------- what a step costs


def _calibrated(model: LoadedModel, hasher: Hasher) -> StepCost:
    """As ``sim/twin/measure.py``: designed steps in random order, fitted."""
    blocks = SLOTS * ceil_div(DESIGN_CONTEXT, hasher.block_tokens) + DESIGN_CHUNK_BLOCKS
    runner = TorchRunner(model, blocks, hasher.block_tokens, hasher)
    design = Bench(runner, blocks, hasher.block_tokens, model.vocab_size, seed=1)
    for _ in design.design(SLOTS, MOST_TOKENS):
        pass  # warm-up
    until = time.monotonic() + CALIBRATE_S
    samples = []
    while time.monotonic() < until:
        samples += design.design(SLOTS, MOST_TOKENS)
    cost, quality, _ = fit(samples)
    _say(f"calibrated on {quality.steps} steps ({quality.stalls} stalls left out), error {quality.design_mape:.1%}, "
         f"noise floor {quality.noise_floor:.1%}")
    return cost


def _config(cost: StepCost, size: int) -> ReplicaConfig:
    """Tokens would allow more: what bounds a step is its time."""
    batcher = BatcherConfig(
        step_tokens=MOST_TOKENS, max_step_ms=MAX_STEP_MS, slots=SLOTS, reserved_slots=RESERVED_SLOTS,
        reserved_blocks=RESERVED_BLOCKS,
    )
    prefix = PrefixConfig(block_tokens=size, blocks=POOL_TOKENS // size, pinned_blocks=0)
    rows = StepShape(decode_rows=DECODING, decode_kv_tokens=DECODING * (SHORT_TOKENS + ANSWER_TOKENS))
    _say(f"{DECODING} rows at their longest take {cost.ns(rows) / MS_NS:.0f} ms, a prompt of {CRITICAL_TOKENS} tokens "
         f"{cost.ns(StepShape(CRITICAL_TOKENS, 1, 0, 0, CRITICAL_TOKENS**2)) / MS_NS:.0f} ms")
    return ReplicaConfig(batcher=batcher, prefix=prefix, cost=cost)


# ---------------------------------------------------------------- the load


def _prompts(model: LoadedModel, count: int, tokens: int, seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, model.vocab_size) for _ in range(tokens)] for _ in range(count)]


def _critical(prompt: list[int]) -> Ask:
    return Ask(prompt, CRITICAL_ANSWER_TOKENS, priority=0)


def _unloaded(replica: LiveReplica, prompts: list[list[int]]) -> list[Answered]:
    replica.answer(_critical(prompts[0]))  # warm-up
    return [answer for prompt in prompts for answer in replica.answer(_critical(prompt))]


class Crowd:
    """Standard requests without end: who has its answer is replaced at once."""

    def __init__(self, replica: LiveReplica, model: LoadedModel) -> None:
        self._replica = replica
        self._rng, self._vocab = random.Random(2), model.vocab_size
        self._short: set[int] = set()
        self._long: set[int] = set()
        self._first_step = 0

    @property
    def steps(self) -> list[StepTime]:
        """Those since all were there."""
        return self._replica.steps[self._first_step :]

    def with_critical(self, prompts: list[list[int]]) -> list[Answered]:
        """One critical request after the other, each some time after the last one's end."""
        replica = self._replica
        while replica.driver.machine.batcher.decode_rows < DECODING:
            self._turn()
        self._first_step = len(replica.steps)
        answers: list[Answered] = []
        for prompt in prompts:
            due_ns = time.monotonic_ns() + round(self._rng.uniform(0, s_to_ns(PAUSE_S)))
            sid = replica.ask(_critical(prompt), due_ns)
            while sid in replica.open:
                self._turn()
            answers.append(replica.answers[sid])
        return answers

    def _turn(self) -> None:
        self._short &= self._replica.open
        self._long &= self._replica.open
        for there, wanted, tokens, new in (
            (self._short, SHORTS, SHORT_TOKENS, ANSWER_TOKENS), (self._long, LONG, LONG_TOKENS, LONG_ANSWER_TOKENS),
        ):
            while len(there) < wanted:
                prompt = [self._rng.randrange(3, self._vocab) for _ in range(tokens)]
                # not all of one age, or all would end in one step
                there.add(self._replica.ask(Ask(prompt, self._rng.randrange(new // 2, new + 1))))
        self._replica.turn()


def _quantile(values: list[float], q: float) -> float:
    return float(np.quantile(values, q))


def _spread(name: str, values: list[float]) -> None:
    marks = ", ".join(f"p{100 * q:g} {_quantile(values, q):.0f}" for q in (0.5, 0.99, 0.999))
    _say(f"{name}: {marks}, greatest {max(values):.0f} ({len(values)})")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)

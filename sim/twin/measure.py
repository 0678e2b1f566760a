"""Times steps on the real hardware, as a process of its own: ``python -m sim.twin.measure``, spec on stdin.

Designed steps span what the batcher can plan (decode rows, contexts, chunks with and without a past), in random order.
Then whole traces run through the real replica machine, so that the fit is judged on steps as they come. Same threads,
same cores, same runner as a live replica. One JSON document on stdout; progress on stderr.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch

import sys
import time
from collections.abc import Iterator

import msgspec
import numpy as np

from engine.config import Scenario, replica_config
from engine.events import Chunk, RunStep, SeqStart, StepShape, Submit
from engine.model.blockhash import Hasher
from engine.model.loader import load, prepare
from engine.model.runner import TorchRunner
from engine.model.stepping import SamplingParams
from engine.model.wire import ToReplica, Work
from engine.model.worker import ReplicaDriver
from engine.policy.replica import Replica
from engine.units import S_NS, ceil_div
from sim.twin.cost import StepSample

TELL_EVERY_S = 3.0
PARAMS = SamplingParams(ignore_eos=True)


class TracePart(msgspec.Struct, frozen=True):
    """One request of a held-out trace, with its tokens."""

    at_ns: int
    submit: Submit
    prompt: list[int]


class MeasureSpec(msgspec.Struct, frozen=True):
    """What to measure, and for how long."""

    scenario: Scenario
    threads: int
    cores: tuple[int, ...]
    hash_key: bytes
    traces: dict[str, list[TracePart]]
    design_s: float = 24.0
    seed: int = 1


class Measured(msgspec.Struct, frozen=True):
    """What was seen."""

    samples: list[StepSample]
    turn_ns: int  # median time between two steps of a trace: planning and bookkeeping
    model_digest: str
    torch: str
    device: str
    dtype: str


class Bench:
    """Puts a runner into the state before a step of a wanted shape, and times that step."""

    def __init__(self, runner: TorchRunner, blocks: int, block_tokens: int, vocab: int, seed: int) -> None:
        self._runner, self._blocks, self._size, self._vocab = runner, blocks, block_tokens, vocab
        self._rng = np.random.default_rng(seed)
        self._sid = self._step = 0

    def design(self, slots: int, budget: int) -> Iterator[StepSample]:
        """One batch of decode rows, and a handful of steps beside it."""
        rng = self._rng
        rows = int(rng.integers(0, slots + 1))
        contexts = [int(rng.integers(160, 340)) for _ in range(rows)]
        free = iter(range(self._blocks))
        decoding = self._start([(n - 1, 1) for n in contexts], free, room=16)
        known = [n + 1 for n in contexts]
        for variant in range(7):
            tokens = 0 if rows and variant < 2 else int(rng.integers(4, budget - rows + 1))
            parts = _split(rng, tokens)
            pasts = [int(rng.choice([0, 0, 96, 160, 208, 224])) for _ in parts]
            marks = iter(range(self._blocks - 200, self._blocks))
            pairs = list(zip(pasts, parts, strict=True))
            shape = StepShape(tokens, len(parts), rows, sum(known), sum(c * (2 * past + c) for past, c in pairs))
            sids, start = self._submit(pairs, marks, room=0)
            chunks = tuple(Chunk(sid, c) for sid, c in zip(sids, parts, strict=True))
            if rows or parts:
                yield StepSample(shape, self._run(RunStep(self._step, shape, start=start, chunks=chunks)))
            known = [n + 1 for n in known]
            for sid in sids:
                self._runner.forget(sid)
        for sid in decoding:
            self._runner.forget(sid)

    def _start(self, parts: list[tuple[int, int]], blocks: Iterator[int], room: int) -> list[int]:
        sids, start = self._submit(parts, blocks, room)
        if sids:
            self._run(RunStep(self._step, StepShape(), start=start, chunks=tuple(Chunk(sid, 1) for sid in sids)))
        return sids

    def _submit(
        self, parts: list[tuple[int, int]], blocks: Iterator[int], room: int
    ) -> tuple[list[int], tuple[SeqStart, ...]]:
        sids: list[int] = []
        start: list[SeqStart] = []
        for past, tokens in parts:
            prompt = self._rng.integers(3, self._vocab, past + tokens).tolist()
            self._runner.submit(self._sid, prompt, 1000, (), PARAMS)
            table = tuple(next(blocks) for _ in range(ceil_div(past + tokens + room, self._size)))
            start.append(SeqStart(self._sid, past, table))
            sids.append(self._sid)
            self._sid += 1
        return sids, tuple(start)

    def _run(self, step: RunStep) -> int:
        began = time.monotonic_ns()
        self._runner.run(step, lambda: False)
        self._step += 1
        return time.monotonic_ns() - began


def _split(rng: np.random.Generator, tokens: int) -> list[int]:
    """A step's prompt tokens over one to five sequences."""
    if not tokens:
        return []
    count = min(tokens, int(rng.integers(1, 6)))
    cuts = sorted(rng.choice(np.arange(1, tokens), count - 1, replace=False).tolist()) if count > 1 else []
    return [b - a for a, b in zip([0, *cuts], [*cuts, tokens], strict=True)]


def run_trace(
    name: str, parts: list[TracePart], runner: TorchRunner, scenario: Scenario
) -> tuple[list[StepSample], list[int]]:
    """A trace in real time through the real machine: its steps, and the time between them."""
    driver = ReplicaDriver(Replica(replica_config(scenario)), runner)
    samples: list[StepSample] = []
    gaps: list[int] = []
    start_ns = time.monotonic_ns()
    waiting = list(parts)
    ended_ns: int | None = None
    while True:
        now_ns = time.monotonic_ns() - start_ns
        due: list[ToReplica] = []
        while waiting and waiting[0].at_ns <= now_ns:
            part = waiting.pop(0)
            due.append(Work(part.submit, part.prompt, SamplingParams()))
        step, _ = driver.begin(now_ns, due)
        if step is None:
            if not waiting:
                return samples, gaps
            ended_ns = None
            time.sleep(max(0, waiting[0].at_ns - (time.monotonic_ns() - start_ns)) / S_NS)
            continue
        began_ns = time.monotonic_ns()
        if ended_ns is not None:
            gaps.append(began_ns - ended_ns)
        result = runner.run(step, lambda: True)
        ended_ns = time.monotonic_ns()
        samples.append(StepSample(step.shape, ended_ns - began_ns, name))
        driver.finish(ended_ns - start_ns, result)


def measure(spec: MeasureSpec) -> Measured:
    """Load, warm up, time."""
    import torch

    scenario, prefix = spec.scenario, spec.scenario.prefix
    if spec.cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, spec.cores)
    folder = prepare(scenario.model.name, lambda line: print(line, file=sys.stderr, flush=True))
    asked = scenario.model
    model = load(folder, asked.device, asked.dtype, spec.threads, asked.native)
    hasher = Hasher(spec.hash_key, prefix.block_tokens)
    bench = Bench(
        TorchRunner(model, prefix.blocks, prefix.block_tokens, hasher), prefix.blocks, prefix.block_tokens,
        model.vocab_size, spec.seed,
    )
    for _ in bench.design(scenario.batcher.slots, scenario.batcher.step_tokens):
        pass  # warm-up: allocator, kernels, page faults
    samples: list[StepSample] = []
    began = told = time.monotonic()
    while (now := time.monotonic()) - began < spec.design_s:
        samples += bench.design(scenario.batcher.slots, scenario.batcher.step_tokens)
        if now - told >= TELL_EVERY_S:
            told = now
            spent = f"{now - began:.0f} of {spec.design_s:.0f} s"
            print(f"calibrate: {len(samples)} steps  {spent}", file=sys.stderr, flush=True)
    gaps: list[int] = []
    for name, parts in spec.traces.items():
        runner = TorchRunner(model, prefix.blocks, prefix.block_tokens, hasher)
        print(f"calibrate: held-out trace {name}, {len(parts)} requests", file=sys.stderr, flush=True)
        seen, between = run_trace(name, parts, runner, scenario)
        samples += seen
        gaps += between
    return Measured(
        samples, int(np.median(gaps)) if gaps else 0, model.digest, str(torch.__version__), str(model.device),
        str(model.linears).removeprefix("torch."),
    )


if __name__ == "__main__":
    found = measure(msgspec.msgpack.decode(sys.stdin.buffer.read(), type=MeasureSpec))
    sys.stdout.buffer.write(msgspec.json.encode(found))

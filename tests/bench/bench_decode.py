"""Decode tokens per second of SmolLM2 at batch 8: our runner on packed linears, against transformers' own cache loop.

Baseline: ``model(...)`` with a ``DynamicCache`` on plain ``F.linear``, the same batch and contexts, the same threads,
greedy. A published reading of that loop on another machine (2 threads, AVX2): 67 tokens/s.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import time

import torch

from engine.events import Chunk, RunStep, SeqStart, StepShape
from engine.model.blockhash import Hasher
from engine.model.loader import load, prepare
from engine.model.runner import TorchRunner
from engine.model.stepping import SamplingParams

BATCH, CONTEXT, STEPS, THREADS = 8, 240, 12, 1


def bench() -> tuple[float, str, str, float]:
    """(ours, unit, baseline, transformers)."""
    folder = prepare("smollm2", lambda line: None)
    prompts = torch.randint(3, 40_000, (BATCH, CONTEXT), generator=torch.Generator().manual_seed(1))
    ours, theirs = _ours(folder, prompts), _theirs(folder, prompts)
    return ours, f"tokens/s, {THREADS} thread(s)", "transformers DynamicCache", theirs


def _ours(folder, prompts) -> float:  # type: ignore[no-untyped-def]
    model = load(folder, threads=THREADS)
    runner = TorchRunner(model, 400, 16, Hasher(b"bench", 16))
    for sid, prompt in enumerate(prompts.tolist()):
        runner.submit(sid, prompt, 1000, (), SamplingParams(ignore_eos=True))
    start = tuple(SeqStart(sid, 0, tuple(range(sid * 20, sid * 20 + 20))) for sid in range(BATCH))
    shape = StepShape()
    runner.run(RunStep(0, shape, start=start, chunks=tuple(Chunk(s, CONTEXT) for s in range(BATCH))), lambda: False)
    return _rate(lambda step: runner.run(RunStep(step + 1, shape), lambda: False))


def _theirs(folder, prompts) -> float:  # type: ignore[no-untyped-def]
    from transformers import AutoModelForCausalLM, DynamicCache

    model = AutoModelForCausalLM.from_pretrained(folder.path, dtype=torch.float32).eval()
    cache = DynamicCache()
    with torch.inference_mode():
        token = model(prompts, past_key_values=cache, logits_to_keep=1).logits.argmax(-1)

        def step(_: int) -> None:
            nonlocal token
            token = model(token, past_key_values=cache).logits.argmax(-1)

        return _rate(step)


def _rate(step) -> float:  # type: ignore[no-untyped-def]
    best = float("inf")
    for number in range(STEPS):
        began = time.perf_counter()
        step(number)
        best = min(best, time.perf_counter() - began)
    return BATCH / best

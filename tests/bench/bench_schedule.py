"""What a step's decisions cost: ``Replica.handle`` of ``StepDone`` and ``Plan``, by how many rows decode.

Between block borders nothing changes, and the time must not depend on the rows; at a border a row takes a block and one
that it has filled gets its name. Churn: in every step one row ends and a new request is taken in. At last one step of
SmolLM2 at batch 32, on the model, beside the decisions of 32 rows with all that happens to them.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import time

from engine.config import BatcherConfig, PrefixConfig, ReplicaConfig
from engine.events import Chunk, Filled, Plan, RunStep, SeqEnd, SeqStart, StepDone, StepShape, Submit
from engine.model.blockhash import Hasher
from engine.policy.replica import Replica
from tests.bench.figure import Figure

ROWS, TENANTS, BLOCK, PROMPT = (16, 64, 256, 1024), 12, 16, 32
STEPS, ROUNDS = 320, 9  # a multiple of the block, so that every row crosses as many borders
MODEL_BATCH, MODEL_CONTEXT, MODEL_STEPS, MODEL_THREADS = 32, 160, 10, 2


def bench() -> list[Figure]:
    """Figures in microseconds of CPU time, the best of some rounds."""
    calm = {rows: _best(rows, borders=False) for rows in ROWS}
    busy = {rows: _best(rows, borders=True) for rows in ROWS}
    churn = {rows: min(_churn_us(rows) for _ in range(ROUNDS)) for rows in ROWS}
    figures = [
        Figure(calm[rows], f"us a step, {rows} rows, nothing changes", f"{ROWS[0]} rows", calm[ROWS[0]])
        for rows in ROWS[1:]
    ]
    figures += [
        Figure(
            busy[rows], f"us a step, {rows} rows, {rows // BLOCK} blocks taken and named in each", "nothing changes",
            calm[rows],
        )
        for rows in ROWS
    ]
    figures += [
        Figure(churn[rows], f"us a step, {rows} rows, one ends and one comes", f"{ROWS[0]} rows", churn[ROWS[0]])
        for rows in ROWS[1:]
    ]
    blocked = {rows: min(_decode_us(rows, False, waiting=200) for _ in range(ROUNDS)) for rows in ROWS}
    figures += [
        Figure(
            blocked[rows], f"us a step, {rows} rows, 200 wait for a slot, nothing changes", f"{ROWS[0]} rows",
            blocked[ROWS[0]],
        )
        for rows in ROWS[1:]
    ]
    step_us = _model_step_us()
    share = _best(MODEL_BATCH, borders=True)
    figures.append(Figure(share, f"us of decisions, {MODEL_BATCH} rows", "a step of SmolLM2 at this batch", step_us))
    return figures


def _prompt(sid: int, spread: bool) -> int:
    return PROMPT + (sid % BLOCK if spread else 0)


def _replica(rows: int, max_tokens: int, spread: bool = True) -> Replica:
    """All decode. ``spread``: their block borders are; else all fall into one step of sixteen."""
    replica = Replica(
        ReplicaConfig(
            batcher=BatcherConfig(
                step_tokens=1 << 20, slots=rows, reserved_slots=0, reserved_blocks=0, max_multi_steps=1,
            ),
            prefix=PrefixConfig(blocks=rows * (PROMPT + max_tokens) // BLOCK + 3 * rows, pinned_blocks=0),
            weights={f"tenant-{n}": 1.0 + n % 3 for n in range(TENANTS)},
        )
    )
    for sid in range(rows):
        replica.handle(0, _ask(sid, max_tokens, spread))
    replica.handle(0, Plan())
    replica.handle(0, StepDone(1, first=tuple(range(rows))))
    return replica


def _ask(sid: int, max_tokens: int, spread: bool = True) -> Submit:
    prompt = _prompt(sid, spread)
    digests = tuple(_digest(sid, index) for index in range(prompt // BLOCK))
    return Submit(sid, sid, f"tenant-{sid % TENANTS}", "help", 1, 0, 1 << 60, prompt, max_tokens, digests)


def _digest(sid: int, index: int) -> bytes:
    return sid.to_bytes(8, "big") + index.to_bytes(8, "big")


def _best(rows: int, borders: bool) -> float:
    return min(_decode_us(rows, borders) for _ in range(ROUNDS))


def _decode_us(rows: int, borders: bool, waiting: int = 0) -> float:
    """Mean over steps, with all borders spread; or over those in which nothing changes. ``waiting``: beside them."""
    replica = _replica(rows, STEPS + 2 * BLOCK, spread=borders)
    for sid in range(rows, rows + waiting):
        replica.handle(0, _ask(sid, STEPS))
    told = _told(rows, borders)
    plan, handle = Plan(), replica.handle
    spent = timed = 0
    for number, done in enumerate(told):
        began = time.thread_time_ns()
        actions = handle(number, plan)
        handle(number, done)
        took = time.thread_time_ns() - began
        step = actions[0]
        assert isinstance(step, RunStep)
        if borders or not (step.grow or done.filled):
            spent += took
            timed += 1
    return spent / max(1, timed) / 1e3


def _told(rows: int, spread: bool) -> list[StepDone]:
    """What the runner says after each step: whose block was filled, and its digest."""
    out = []
    for number in range(STEPS):
        filled = []
        for sid in range(rows):
            computed = _prompt(sid, spread) + number + 1
            if computed % BLOCK == 0:
                index = computed // BLOCK - 1
                filled.append(Filled(sid, index, _digest(sid, index)))
        out.append(StepDone(1, filled=tuple(filled)))
    return out


def _churn_us(rows: int) -> float:
    replica = _replica(rows, STEPS + 2 * BLOCK)
    plan, handle = Plan(), replica.handle
    running, began = list(range(rows)), time.thread_time_ns()
    for number in range(STEPS):
        sid = rows + number
        running.append(sid)
        handle(number, _ask(sid, STEPS))
        gone = running.pop(0)
        handle(number, plan)
        first = () if number == 0 else (sid - 1,)
        handle(number, StepDone(1, first=first, ended=(SeqEnd(gone, "length"),)))
    return (time.thread_time_ns() - began) / STEPS / 1e3


def _model_step_us() -> float:
    import torch

    from engine.model.loader import load, prepare
    from engine.model.runner import TorchRunner
    from engine.model.stepping import SamplingParams

    model = load(prepare("smollm2", lambda line: None), threads=MODEL_THREADS)
    prompts = torch.randint(3, 40_000, (MODEL_BATCH, MODEL_CONTEXT), generator=torch.Generator().manual_seed(1))
    blocks = (MODEL_CONTEXT + 2 * MODEL_STEPS) // BLOCK + 1
    runner = TorchRunner(model, MODEL_BATCH * blocks, BLOCK, Hasher(b"bench", BLOCK))
    for sid, prompt in enumerate(prompts.tolist()):
        runner.submit(sid, prompt, 1000, (), SamplingParams(ignore_eos=True))
    start = tuple(SeqStart(sid, 0, tuple(range(sid * blocks, (sid + 1) * blocks))) for sid in range(MODEL_BATCH))
    chunks = tuple(Chunk(sid, MODEL_CONTEXT) for sid in range(MODEL_BATCH))
    runner.run(RunStep(0, StepShape(), start=start, chunks=chunks), lambda: False)
    best = float("inf")
    for number in range(MODEL_STEPS):
        began = time.perf_counter_ns()
        runner.run(RunStep(number + 1, StepShape()), lambda: False)
        best = min(best, (time.perf_counter_ns() - began) / 1e3)
    return best

"""A decode step of SmolLM2 at batch 8 beside the encoder: alone, and while the encoder process works without a pause.

Both are real processes, placed as the engine places them: torch of the replica on the last cores, gateway and encoder
on the first, threads that sleep while they wait. Alone and busy phases take turns in one run, each from the same
contexts; the encoder is there in both. Value and baseline are the medians; target: a ratio of 1.15 at most. The whole
table goes to stderr, with an arm *without care* for comparison: the encoder wherever it likes, two threads that spin.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import asyncio
import contextlib
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

from engine.model.encoder_process import EncoderSpec
from engine.service.encoder import EncoderClient
from engine.service.replicas import share_cores

BATCH, CONTEXT, STEPS, PHASES = 8, 240, 40, 5
OPEN = 16  # texts asked for at any moment: two full batches
BLOCK_TOKENS, BLOCKS_EACH = 16, 20


def bench() -> tuple[float, str, str, float]:
    """(busy, unit, baseline, alone)."""
    own, replica, threads = share_cores(0)
    before = os.sched_getaffinity(0)
    try:
        with decoder(replica, threads) as line:
            if own:
                os.sched_setaffinity(0, own)  # as the gateway does; the encoder is born here
            care = asyncio.run(arm(line, EncoderSpec(cores=own)))
            os.sched_setaffinity(0, before)
            with spinning():
                careless = asyncio.run(arm(line, EncoderSpec(threads=2)))
    finally:
        os.sched_setaffinity(0, before)
    where = f"replica on cores {replica}, {threads} thread(s); gateway and encoder on {own}; () = anywhere"
    print(where, file=sys.stderr)
    table("as the engine places them", care)
    table("without care: encoder anywhere, 2 threads, OMP_WAIT_POLICY=ACTIVE", careless)
    alone, busy, _ = care
    return median(busy), f"ms a decode step at batch {BATCH}, encoder busy", "encoder idle", median(alone)


def table(name: str, times: tuple[list[float], list[float], float]) -> None:
    """Medians and p95 of alone and busy, and their ratios."""
    alone, busy, texts_per_s = times
    rows = [(word, median(ms), sorted(ms)[int(0.95 * len(ms))]) for word, ms in (("alone", alone), ("busy", busy))]
    print(f"{name}; {texts_per_s:.0f} texts/s encoded while busy", file=sys.stderr)
    for word, mid, high in (*rows, ("ratio", rows[1][1] / rows[0][1], rows[1][2] / rows[0][2])):
        print(f"  {word:>6}  median {mid:8.2f}  p95 {high:8.2f}", file=sys.stderr, flush=True)


async def arm(line: Connection, spec: EncoderSpec) -> tuple[list[float], list[float], float]:
    """Step times alone and busy in ms, phase by phase in turn; texts encoded a second while busy."""
    encoder = EncoderClient()
    await encoder.start(spec)
    alone: list[float] = []
    busy: list[float] = []
    texts, seconds = 0, 0.0
    try:
        await phase(line)  # the first is warmer for nobody
        for _ in range(PHASES):
            alone += await phase(line)
            began, before = time.monotonic(), encoder.stats().ok
            load = Load(encoder)
            busy += await phase(line)
            load.over = True
            texts, seconds = texts + encoder.stats().ok - before, seconds + time.monotonic() - began
            while encoder.stats().open:
                await asyncio.sleep(0.01)
    finally:
        await encoder.stop()
    return alone, busy, texts / seconds


async def phase(line: Connection) -> list[float]:
    """One round of steps in the other process."""
    line.send(STEPS)
    return await asyncio.get_running_loop().run_in_executor(None, line.recv)


class Load:
    """``OPEN`` texts are always under way; none is asked twice, so none comes from memory."""

    serial = count()

    def __init__(self, encoder: EncoderClient) -> None:
        self.encoder, self.over = encoder, False
        for _ in range(OPEN):
            self.next()

    def next(self, *_: object) -> None:
        """One more, from the loop's next round on."""
        if not self.over:
            asyncio.get_running_loop().call_soon(self.ask)

    def ask(self) -> None:
        """The done of one asks for the next."""
        text = f"Can I send back the shoes of order {next(self.serial)}, and when do I get my money?"
        self.encoder.encode(text.encode(), text, 60.0, self.next)


@contextlib.contextmanager
def spinning() -> Iterator[None]:
    """The client sees to it that its process waits passively; here a shell undoes that."""
    python = sys.executable
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "python"
        script.write_text(f'#!/bin/sh\nOMP_WAIT_POLICY=ACTIVE exec "{python}" "$@"\n')
        script.chmod(0o700)
        sys.executable = str(script)
        try:
            yield
        finally:
            sys.executable = python


# ---------------------------------------------------------------- the process that decodes


@contextlib.contextmanager
def decoder(cores: tuple[int, ...], threads: int) -> Iterator[Connection]:
    """Send a number of steps, receive their times in ms."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=decode, args=(theirs, cores, threads), daemon=True)
    process.start()
    theirs.close()
    try:
        yield ours
    finally:
        ours.close()
        process.join()


def decode(line: Connection, cores: tuple[int, ...], threads: int) -> None:
    """Rounds of decode steps, each from prompts of ``CONTEXT`` tokens, until the other side hangs up."""
    if cores:
        os.sched_setaffinity(0, cores)
    import torch

    from engine.events import Chunk, RunStep, SeqStart, StepShape
    from engine.model.blockhash import Hasher
    from engine.model.loader import load, prepare
    from engine.model.runner import TorchRunner
    from engine.model.stepping import SamplingParams

    model = load(prepare("smollm2", lambda words: None), threads=threads)
    runner = TorchRunner(model, BATCH * BLOCKS_EACH, BLOCK_TOKENS, Hasher(b"bench", BLOCK_TOKENS))
    prompts = torch.randint(3, 40_000, (BATCH, CONTEXT), generator=torch.Generator().manual_seed(1)).tolist()
    numbers, shape, before = count(), StepShape(), ()
    for number in count():
        try:
            steps = line.recv()
        except EOFError:
            return
        sids = tuple(range(number * BATCH, (number + 1) * BATCH))
        start = tuple(
            SeqStart(sid, 0, tuple(range(n * BLOCKS_EACH, (n + 1) * BLOCKS_EACH))) for n, sid in enumerate(sids)
        )
        for sid, prompt in zip(sids, prompts, strict=True):
            runner.submit(sid, prompt, 1000, (), SamplingParams(ignore_eos=True))
        chunks = tuple(Chunk(sid, CONTEXT) for sid in sids)
        runner.run(RunStep(next(numbers), shape, start=start, stop=before, chunks=chunks), lambda: False)
        for sid in before:
            runner.forget(sid)
        before, times = sids, []
        for _ in range(steps):
            began = time.perf_counter()
            runner.run(RunStep(next(numbers), shape), lambda: False)
            times.append((time.perf_counter() - began) * 1e3)
        line.send(times)

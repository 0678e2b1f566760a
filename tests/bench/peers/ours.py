"""Our runner, step by step as the batcher would plan it: one step with all prompts, then decode steps."""

from __future__ import annotations

from itertools import count
from time import perf_counter

from engine.events import Chunk, RunStep, SeqStart, StepShape
from engine.model.blockhash import Hasher
from engine.model.loader import load, prepare
from engine.model.runner import TorchRunner
from engine.model.stepping import SamplingParams
from engine.units import ceil_div
from tests.bench.blocks import block_tokens
from tests.bench.peers.line import Job, Run, Seen, serve

THREADS, MOST_ROWS, MOST_TOKENS = 2, 32, 256


def contender(device: str) -> Run:
    """The model once, one pool for all jobs."""
    size = block_tokens(device)
    model = load(prepare("smollm2", lambda line: None), device=device, threads=THREADS)
    each = ceil_div(MOST_TOKENS, size)
    runner = TorchRunner(model, MOST_ROWS * each, size, Hasher(b"bench", size))
    serial = count()
    shape = StepShape()

    def run(job: Job) -> Seen:
        sids = [next(serial) for _ in job.prompts]
        for sid, prompt in zip(sids, job.prompts, strict=True):
            runner.submit(sid, prompt, job.new_tokens, (), SamplingParams(ignore_eos=True))
        start = tuple(SeqStart(sid, 0, tuple(range(n * each, (n + 1) * each))) for n, sid in enumerate(sids))
        chunks = tuple(Chunk(sid, len(prompt)) for sid, prompt in zip(sids, job.prompts, strict=True))
        times: list[float] = []
        began = perf_counter()
        for number in range(job.new_tokens):
            step = RunStep(number, shape) if number else RunStep(0, shape, start=start, chunks=chunks)
            result = runner.run(step, lambda: False)
            assert len(result.tokens) == len(sids), f"a token for each sequence, not {result.done}"
            times.append(perf_counter())
        for sid in sids:
            runner.forget(sid)
        return Seen(began, [times] * len(sids))

    return run


if __name__ == "__main__":
    serve(contender)

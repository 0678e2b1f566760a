"""Our runner, step by step as the batcher would plan it: prompts up to a budget a step beside the rows that decode."""

from __future__ import annotations

from itertools import count
from time import perf_counter

from engine.events import Chunk, RunStep, SeqStart, StepDone, StepShape
from engine.model.blockhash import Hasher
from engine.model.loader import load, prepare
from engine.model.runner import TorchRunner
from engine.model.stepping import SamplingParams
from engine.units import ceil_div
from tests.bench.blocks import block_tokens
from tests.bench.peers.line import Job, Run, Seen, serve

THREADS, MOST_ROWS, MOST_TOKENS = 2, 32, 256
STEP_PROMPTS = 8  # of 128 tokens: with more in a step, what lies between its products falls out of the caches


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
        start = [SeqStart(sid, 0, tuple(range(n * each, (n + 1) * each))) for n, sid in enumerate(sids)]
        chunks = [Chunk(sid, len(prompt)) for sid, prompt in zip(sids, job.prompts, strict=True)]
        times: dict[int, list[float]] = {sid: [] for sid in sids}
        began, number = perf_counter(), 0
        while len(times[sids[-1]]) < job.new_tokens:
            new = slice(number * STEP_PROMPTS, (number + 1) * STEP_PROMPTS)
            result = runner.run(
                RunStep(number, shape, start=tuple(start[new]), chunks=tuple(chunks[new])), lambda: False
            )
            assert isinstance(result.done, StepDone), result.done
            now = perf_counter()
            for sid, _ in result.tokens:
                times[sid].append(now)
            number += 1
        for sid in sids:
            runner.forget(sid)
        return Seen(began, list(times.values()))

    return run


if __name__ == "__main__":
    serve(contender)

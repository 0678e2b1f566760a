"""A plain transformers loop: ``model(...)`` with a ``DynamicCache``, the whole batch at once, torch's own linears."""

from __future__ import annotations

import sys
from time import perf_counter

import torch
from transformers import AutoModelForCausalLM, DynamicCache

from engine.model.folder import prepare
from tests.bench.peers.line import Job, Run, Seen, serve

THREADS = 2


def contender(device: str) -> Run:
    """As a user of the library would write it."""
    torch.set_num_threads(THREADS)
    path = prepare("smollm2", lambda line: print(line, file=sys.stderr)).path
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True).eval().to(device)

    def run(job: Job) -> Seen:
        times: list[float] = []
        cache = DynamicCache()
        with torch.inference_mode():
            began = perf_counter()
            token = torch.tensor(job.prompts, device=device)
            for _ in range(job.new_tokens):
                token = model(token, past_key_values=cache, logits_to_keep=1).logits.argmax(-1)
                token.tolist()  # the text is wanted at each step, and CUDA has to have done it
                times.append(perf_counter())
        return Seen(began, [times] * len(job.prompts))

    return run


if __name__ == "__main__":
    serve(contender)

"""The bare matrix products of a step and nothing else: every packed linear of our model in its order, on random rows.

No norm, no activation, no attention, no embedding, no sampling: a step cannot be faster than this on the same kernels.
Query, key and value in one product, gate and up in one, as our layers have them; the head on one row of each sequence.
"""

from __future__ import annotations

from time import perf_counter

import torch
from torch import Tensor

from engine.model.loader import load, prepare
from engine.model.packing import PackedLinear
from tests.bench.peers.line import Job, Run, Seen, serve

THREADS = 2


def contender(device: str) -> Run:
    """The packed linears, without the model around them."""
    assert device == "cpu", "packing is for CPUs"
    model = load(prepare("smollm2", lambda line: None), threads=THREADS).model
    linears = [module for module in model.modules() if type(module) is PackedLinear]
    body, head = linears[:-1], linears[-1]
    assert len(body) == 4 * model.config.num_hidden_layers, "qkv, o, gate and up, down in each layer"
    assert head.out_features == model.config.vocab_size, "the output head comes last"
    hidden, inner = model.config.hidden_size, model.config.intermediate_size

    def step(rows: int, heads: int) -> None:
        inputs: dict[int, Tensor] = {width: torch.randn(rows, width) for width in (hidden, inner)}
        for linear in body:
            linear(inputs[linear.in_features])
        head(inputs[hidden][:heads])

    def run(job: Job) -> Seen:
        batch = len(job.prompts)
        times: list[float] = []
        with torch.inference_mode():
            began = perf_counter()
            for number in range(job.new_tokens):
                step(batch if number else sum(map(len, job.prompts)), batch)
                times.append(perf_counter())
        return Seen(began, [times] * batch)

    return run


if __name__ == "__main__":
    serve(contender)

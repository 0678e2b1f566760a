"""transformers' own continuous batching: ``generate_batch``, its scheduler and its paged cache, attention by SDPA.

Each token's time is taken by the library (``record_timestamps``), and counted from the moment it took the last request
in: setting up its cache, which it does anew for each call, is not counted.
"""

from __future__ import annotations

import sys

import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation import ContinuousBatchingConfig

from engine.model.folder import prepare
from tests.bench.peers.line import Job, Run, Seen, serve

THREADS = 2


def contender(device: str) -> Run:
    """Blocks for the largest job; no sharing, since no two prompts share anything."""
    torch.set_num_threads(THREADS)
    path = prepare("smollm2", lambda line: print(line, file=sys.stderr)).path
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="sdpa", local_files_only=True)
    model.eval().to(device)

    def run(job: Job) -> Seen:
        config = GenerationConfig(max_new_tokens=job.new_tokens, do_sample=False, eos_token_id=-1)
        batching = ContinuousBatchingConfig(
            num_blocks=2 * len(job.prompts), max_batch_tokens=512, allow_block_sharing=False
        )
        results = model.generate_batch(
            job.prompts, generation_config=config, continuous_batching_config=batching, record_timestamps=True,
        )
        found = list(results.values())
        assert [len(r.generated_tokens) for r in found] == [job.new_tokens] * len(job.prompts), "all tokens came"
        return Seen(min(r.lifespan[0] for r in found), [r.timestamps for r in found])

    return run


if __name__ == "__main__":
    serve(contender)

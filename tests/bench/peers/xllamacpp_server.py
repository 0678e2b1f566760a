"""llama.cpp (the package ``xllamacpp``): its HTTP server with a slot for each sequence, on the Q4_1 weights.

The file comes in ``GGUF``. Four-bit weights are a fifth of the memory traffic of fp32, which is what batch 1 is made
of. One server for each batch size, kept; token times are those at which its events arrive at the client.
"""

from __future__ import annotations

import json
import os
from http.client import HTTPConnection
from threading import Barrier, Thread
from time import perf_counter
from urllib.parse import urlsplit

import xllamacpp

from tests.bench.peers.line import Job, Run, Seen, serve

THREADS, SLOT_TOKENS, STEP_TOKENS = 2, 256, 4096


def contender(device: str) -> Run:
    """Servers are started as batch sizes turn up."""
    assert device == "cpu", "this build has no other backend"
    servers: dict[int, xllamacpp.Server] = {}

    def run(job: Job) -> Seen:
        batch = len(job.prompts)
        if batch not in servers:
            servers[batch] = _server(batch)
        address = urlsplit(servers[batch].listening_address)
        times: list[list[float]] = [[] for _ in job.prompts]
        barrier = Barrier(batch + 1)
        clients = [
            Thread(target=_ask, args=(f"{address.hostname}:{address.port}", prompt, job.new_tokens, barrier, seen))
            for prompt, seen in zip(job.prompts, times, strict=True)
        ]
        for client in clients:
            client.start()
        barrier.wait()
        began = perf_counter()
        for client in clients:
            client.join()
        assert all(len(seen) == job.new_tokens for seen in times), f"all tokens came, not {[len(s) for s in times]}"
        return Seen(began, times)

    return run


def _server(slots: int) -> xllamacpp.Server:
    params = xllamacpp.CommonParams()
    params.model.path = os.environ["GGUF"]
    params.n_parallel = slots
    params.n_ctx = slots * SLOT_TOKENS
    params.n_batch = params.n_ubatch = STEP_TOKENS
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = THREADS
    params.n_threads_http = slots + 2
    params.port = 0
    return xllamacpp.Server(params)


def _ask(host: str, prompt: list[int], new_tokens: int, barrier: Barrier, seen: list[float]) -> None:
    """One streaming client."""
    body = json.dumps({
        "prompt": prompt, "n_predict": new_tokens, "ignore_eos": True, "stream": True, "cache_prompt": False,
        "return_tokens": True, "samplers": ["top_k"], "top_k": 1,
    })
    connection = HTTPConnection(host)
    connection.connect()
    barrier.wait()
    connection.request("POST", "/completion", body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    assert answer.status == 200, answer.read()
    for raw in answer:
        if raw.startswith(b"data: ") and not raw.startswith(b"data: [DONE]"):
            now = perf_counter()
            event = json.loads(raw[6:])
            # a token that ends inside a character is told with the next one; the last event tells how many there were
            told = event["tokens_predicted"] if event.get("stop") else len(seen) + len(event["tokens"])
            seen += [now] * (told - len(seen))
    connection.close()


if __name__ == "__main__":
    serve(contender)

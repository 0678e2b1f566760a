"""llama.cpp's own HTTP server (the package ``xllamacpp``): prints its URL, ends with its stdin.

Run by that package's interpreter, in its own environment.

The arguments: a GGUF file, slots, threads. Slots have a thousand tokens each.
"""

from __future__ import annotations

import sys

import xllamacpp


def main() -> None:
    """Serve until nobody needs it any more."""
    gguf, slots, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    params = xllamacpp.CommonParams()
    params.model.path = gguf
    params.n_parallel = slots
    params.n_ctx = slots * 1024
    params.n_batch = params.n_ubatch = 512
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.n_threads_http = slots + 4
    params.port = 0
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()

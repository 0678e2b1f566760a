"""``doorbuster serve``: start, say where, wait for a signal or the death of all replicas, drain."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, Literal

import msgspec

from engine.config import Scenario
from engine.errors import CalibrationError, UserError
from engine.scenario import Resolved, load
from engine.service.auth import KeyRing
from engine.service.connections import allow_many_files
from engine.service.loop import run
from engine.service.replicas import share_cores
from engine.service.server import RunningEngine, ServeOptions, running
from engine.service.supervisor import Supervisor, supervising
from engine.stepcost import StepCost
from sim import runs
from sim.twin import cost

LOOPBACK = ("127.0.0.1", "::1", "localhost")
PARENT = "DOORBUSTER_PARENT"  # environment: drain and stop when the process with this id is no longer the parent
OURS = ("journal", "ledger")  # what the engine writes below a run folder

End = Literal["never ready", "stopped", "no replica", "no ingress process"]


class WorkerLine(msgspec.Struct, frozen=True):
    """An ingress process, and where it alone answers."""

    pid: int
    url: str


class ReadyLine(msgspec.Struct, frozen=True):
    """The first line on stdout with ``--json``. ``workers``: with more than one; ``pid`` is their supervisor's then."""

    url: str
    api_key: str | None
    pid: int
    epoch_ns: int
    folder: str
    event: str = "ready"
    workers: tuple[WorkerLine, ...] | msgspec.UnsetType = msgspec.UNSET


def serve_until_stopped(
    scenario: str, sets: tuple[str, ...], host: str, port: int, keys: Path | None, folder: Path | None,
    workers: int, json: bool, say: Callable[[str], None], emit: Callable[[Any], None],
) -> None:
    """Blocks until SIGINT or SIGTERM; a second one ends it at once. Raises when no replica is left."""
    resolved = load(scenario, sets)
    ring, key = _ring(keys, host, resolved)
    fake_cost = _fake_cost(resolved)
    given, folder = folder, _run_folder(resolved, folder)
    options = ServeOptions(
        host=host, port=port, folder=folder, fake_cost=fake_cost, step_cost=_step_cost(resolved.scenario, workers)
    )
    say(f"starting {resolved.scenario.model.name}; journal and ledger in {folder}")
    end: End | None = None
    allow_many_files()
    try:
        end = run(_serve(resolved, ring, key, options, workers, json, say))
    finally:
        if end in (None, "never ready"):
            _clear(folder, whole=given is None)
    if end == "never ready":
        sys.exit(130)
    if end in ("no replica", "no ingress process"):
        raise UserError(
            f"{end} is left",
            why=f"each died more than {resolved.scenario.replica_restarts} times within a minute; what they were "
            "working on was answered with an error, the rest is drained",
            fix="their last words are above; under a supervisor, restart on exit code 1",
        )


async def _serve(
    resolved: Resolved, ring: KeyRing, key: str | None, options: ServeOptions, workers: int, json: bool,
    say: Callable[[str], None],
) -> End:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    starting = asyncio.current_task()
    engine: RunningEngine | Supervisor | None = None

    def on_signal() -> None:
        if stop.is_set():
            try:
                say("second signal: leaving at once")
                sys.stdout.flush()
                if isinstance(engine, RunningEngine):
                    engine.flush()
            finally:
                os._exit(130)
        stop.set()
        if engine is None and starting is not None:
            starting.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)
    try:
        async with _started(resolved.scenario, ring, options, workers) as engine:
            folder = str(options.folder)
            ready = ReadyLine(engine.url, key, os.getpid(), engine.epoch_ns, folder, workers=_workers(engine))
            if json:
                sys.stdout.buffer.write(msgspec.json.encode(ready) + b"\n")
                sys.stdout.buffer.flush()
            else:
                say(_welcome(engine.url, key, resolved, workers))
            if path := resolved.scenario.snapshot.path:
                warm = engine.warm_answers
                count = f"{warm} answer{'s' * (warm != 1)}"
                say(f"started warm: {count} from {path}" if warm else f"started cold: no answers from {path}")
            await _first(stop.wait(), engine.lost.wait(), _left_alone())
            say("draining: no new work, finishing what runs")
            await engine.drain()
            if not engine.lost.is_set():
                return "stopped"
            return engine.left if isinstance(engine, Supervisor) else "no replica"
    except asyncio.CancelledError:
        if engine is not None:
            raise
        say("stopped before it was ready")
        return "never ready"


def _started(
    scenario: Scenario, ring: KeyRing, options: ServeOptions, workers: int
) -> AbstractAsyncContextManager[RunningEngine | Supervisor]:
    """One ingress process is this one."""
    return running(scenario, ring, options) if workers == 1 else supervising(scenario, ring, options, workers)


def _workers(engine: RunningEngine | Supervisor) -> tuple[WorkerLine, ...] | msgspec.UnsetType:
    if isinstance(engine, RunningEngine):
        return msgspec.UNSET
    return tuple(WorkerLine(worker.pid, worker.url) for worker in engine.workers)


async def _first(*waits: Coroutine[Any, Any, object]) -> None:
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()


async def _left_alone() -> None:
    """A program that started this for itself has died, and nobody would ever stop it."""
    parent = os.environ.get(PARENT)
    while not parent or os.getppid() == int(parent):
        await asyncio.sleep(1.0)


def _run_folder(resolved: Resolved, given: Path | None) -> Path:
    """A new folder, or the given one if no run has used it."""
    if given is None:
        return runs.create(resolved, "serve")
    used = [name for name in OURS if (given / name).exists()]
    if used:
        raise UserError(
            "this folder holds a run already", where=str(given), why=f"it has {' and '.join(used)}",
            fix="name a new --folder, or leave it out",
        )
    try:
        given.mkdir(parents=True, exist_ok=True)
        runs.fill(given, resolved)
    except OSError as error:
        raise UserError("cannot use this run folder", where=str(given), why=error.strerror or str(error)) from None
    return given


def _clear(folder: Path, whole: bool) -> None:
    """A start that failed leaves no run: neither a folder that it made nor its own part of a given one."""
    for path in [folder] if whole else [folder / name for name in OURS]:
        shutil.rmtree(path, ignore_errors=True)


def _welcome(url: str, key: str | None, resolved: Resolved, workers: int) -> str:
    shown = key or "$KEY"
    return "\n".join(
        [
            f"ready at {url}  (model {resolved.scenario.model.name}; classes {', '.join(resolved.scenario.classes)}"
            + (f"; {workers} ingress processes)" if workers > 1 else ")"),
            *([f"API key, shown this once: {key}"] if key else []),
            "try:",
            f"  curl -s {url}/v1/chat/completions -H 'authorization: Bearer {shown}' \\",
            f"    -H 'x-doorbuster-class: {_modest(resolved)}' \\",
            """    -d '{"model":"default","messages":[{"role":"user","content":"is my coupon still good?"}]}'""",
            "Ctrl-C drains and stops.",
        ]
    )


def _modest(resolved: Resolved) -> str:
    """A class for a first try: the first that is not critical."""
    classes = resolved.scenario.classes
    return next((name for name, cls in classes.items() if cls.criticality != "critical"), next(iter(classes)))


def _ring(keys: Path | None, host: str, resolved: Resolved) -> tuple[KeyRing, str | None]:
    if keys is not None:
        return KeyRing.load(keys, resolved.scenario.classes), None
    if host not in LOOPBACK:
        raise UserError(
            f"will not listen on {host} with a throw-away key",
            why="without --keys anybody who reads the log may enter",
            fix="doorbuster keys new NAME, then --keys FILE; or stay on 127.0.0.1",
        )
    return KeyRing.single()


def _step_cost(scenario: Scenario, workers: int) -> StepCost | None:
    """What a step costs here, as the twin finds it; without a calibration the token budget alone bounds a step."""
    _, _, threads = share_cores(scenario.model.threads, scenario.replicas, workers)  # fewer with more ingress processes
    model = msgspec.structs.replace(scenario.model, threads=threads)
    try:
        return cost.for_model(msgspec.structs.replace(scenario, model=model)).cost
    except CalibrationError:
        return None


def _fake_cost(resolved: Resolved) -> StepCost | None:
    """The fake model's tempo: this machine's SmolLM2 if it was measured, else the bundled reference."""
    if resolved.scenario.model.name != "fake":
        return None
    model = msgspec.structs.replace(resolved.scenario.model, fake_speed=1.0)  # the worker's own business
    return cost.for_model(msgspec.structs.replace(resolved.scenario, model=model)).cost

"""``doorbuster serve``: start, say where, wait for a signal, drain."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import uvloop

from engine.errors import CalibrationError, UserError
from engine.model.stepcost import StepCost
from engine.scenario import Resolved, data_path, load
from engine.service.auth import KeyRing
from engine.service.replicas import share_cores
from engine.service.server import ServeOptions, running
from sim import runs
from sim.twin import cost

LOOPBACK = ("127.0.0.1", "::1", "localhost")


class ReadyLine(msgspec.Struct, frozen=True):
    """The first line on stdout with ``--json``."""

    url: str
    api_key: str | None
    pid: int
    epoch_ns: int
    folder: str
    event: str = "ready"


def serve_until_stopped(
    scenario: str, sets: tuple[str, ...], host: str, port: int, keys: Path | None, folder: Path | None, json: bool,
    say: Callable[[str], None], emit: Callable[[Any], None],
) -> None:
    """Blocks until SIGINT or SIGTERM; a second one ends it at once."""
    resolved = load(scenario, sets)
    ring, key = _ring(keys, host, resolved)
    if folder is None:
        folder = runs.create(resolved, "serve")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        runs.fill(folder, resolved)
    options = ServeOptions(host=host, port=port, folder=folder, fake_cost=_fake_cost(resolved))
    say(f"starting {resolved.scenario.model.name}; journal and ledger in {folder}")
    uvloop.run(_serve(resolved, ring, key, options, json, say))


async def _serve(
    resolved: Resolved, ring: KeyRing, key: str | None, options: ServeOptions, json: bool, say: Callable[[str], None]
) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal() -> None:
        if stop.is_set():
            say("second signal: leaving at once")
            sys.stdout.flush()
            os._exit(130)
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)
    async with running(resolved.scenario, ring, options) as engine:
        ready = ReadyLine(engine.url, key, os.getpid(), engine.epoch_ns, str(options.folder))
        if json:
            sys.stdout.buffer.write(msgspec.json.encode(ready) + b"\n")
            sys.stdout.buffer.flush()
        else:
            say(_welcome(engine.url, key, resolved))
        await stop.wait()
        say("draining: no new work, finishing what runs")
        await engine.drain()


def _welcome(url: str, key: str | None, resolved: Resolved) -> str:
    shown = key or "$KEY"
    return "\n".join(
        [
            f"ready at {url}  (model {resolved.scenario.model.name}; classes {', '.join(resolved.scenario.classes)})",
            *([f"API key, shown this once: {key}"] if key else []),
            "try:",
            f"  curl -s {url}/v1/chat/completions -H 'authorization: Bearer {shown}' \\",
            """    -d '{"model":"default","messages":[{"role":"user","content":"is my coupon still good?"}]}'""",
            "Ctrl-C drains and stops.",
        ]
    )


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


def _fake_cost(resolved: Resolved) -> StepCost | None:
    """The fake model's tempo: this machine's SmolLM2 if it was measured, else the bundled reference."""
    if resolved.scenario.model.name != "fake":
        return None
    try:
        _, _, threads = share_cores(resolved.scenario.model.threads)
        return cost.load_for(cost.default_path("smollm2"), threads, "smollm2").cost
    except CalibrationError:
        return cost.load(data_path("calibrations", "smollm2-reference.json")).cost

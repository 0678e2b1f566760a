"""A live engine as ``doorbuster serve`` would place it: pinned where the cores suffice, its encoder and all."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
import uvloop

from engine.model.stepcost import StepCost
from engine.service.auth import KeyRing
from engine.service.server import ServeOptions, running
from tests.service.harness import SCENARIO, Engine, write_keys

START_S = 300.0  # weights that are converted first take half a minute


@contextlib.contextmanager
def served(folder: Path, cost: StepCost | None = None, **changes: Any) -> Iterator[Engine]:
    """``changes``: sections of the tests' scenario. ``workers`` are the replicas, whoever else was started."""
    scenario = msgspec.structs.replace(SCENARIO, **changes)
    keys = write_keys(folder / "keys.toml")
    ring = KeyRing.load(folder / "keys.toml", scenario.classes)
    loop = uvloop.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    ours = {child.pid for child in psutil.Process().children()}
    context = running(scenario, ring, ServeOptions(folder=folder, fake_cost=cost))
    inside = asyncio.run_coroutine_threadsafe(context.__aenter__(), loop).result(START_S)
    try:
        born = [child for child in psutil.Process().children() if child.pid not in ours]
        workers = [child for child in born if "engine.model.process" in child.cmdline()]
        assert len(workers) == scenario.replicas
        engine = Engine(inside, loop, keys, workers, folder)
        engine.idle_tasks = engine.call(lambda: len(asyncio.all_tasks()) - 1)
        yield engine
    finally:
        asyncio.run_coroutine_threadsafe(context.__aexit__(None, None, None), loop).result(60)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


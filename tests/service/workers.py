"""A supervisor with real ingress processes for tests, on a loop of its own in a thread."""

from __future__ import annotations

import asyncio
import contextlib
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import httpx
import msgspec
import psutil
import uvloop

from engine.service.auth import KeyRing
from engine.service.server import ServeOptions
from engine.service.supervisor import Supervisor, supervising
from engine.stepcost import StepCost
from tests.service.harness import DEADLINE_S, SCENARIO, write_keys
from tests.waiting import until

T = TypeVar("T")


@dataclass
class Workers:
    """Handles on one supervisor."""

    inside: Supervisor
    loop: asyncio.AbstractEventLoop
    keys: dict[str, str]
    folder: Path

    def call(self, do: Callable[[], T]) -> T:
        """On the supervisor's own thread."""

        async def there() -> T:
            return do()

        return asyncio.run_coroutine_threadsafe(there(), self.loop).result(DEADLINE_S)

    def urls(self) -> list[str]:
        """Where each ingress process alone answers."""
        return self.call(lambda: [worker.url for worker in self.inside.workers])

    def pids(self) -> list[int]:
        """Of the ingress processes that are there now."""
        return self.call(lambda: [worker.pid for worker in self.inside.workers])

    def replica(self) -> psutil.Process:
        """The replica's process that is there now."""
        line = self.call(lambda: self.inside._pool._there[0]._process)
        assert line is not None
        return psutil.Process(line.pid)

    def http(self, worker: int | None = None, tenant: str = "shop") -> httpx.Client:
        """A client of one ingress process, or of whoever the kernel chooses."""
        url = self.inside.url if worker is None else self.urls()[worker]
        headers = {"authorization": f"Bearer {self.keys[tenant]}"}
        return httpx.Client(base_url=url, headers=headers, timeout=DEADLINE_S, trust_env=False)

    def metric(self, worker: int, name: str) -> float:
        """The sum over all labels, as this one counts."""
        with self.http(worker) as client:
            page = client.get("/metrics").text
        return sum(float(value) for value in re.findall(rf"^doorbuster:{name}(?:{{.*}})? (\S+)$", page, re.MULTILINE))

    def wait_for(self, worker: int, name: str, value: float) -> None:
        """Until that metric has it."""
        until(lambda: self.metric(worker, name) == value, f"{name} == {value} at {worker}")

    def drain(self) -> None:
        """As a first signal does."""
        asyncio.run_coroutine_threadsafe(self.inside.drain(), self.loop).result(60)


@contextlib.contextmanager
def start_workers(
    folder: Path, workers: int = 2, cost: StepCost | None = None, drain_s: float = 30.0, **changes: object
) -> Iterator[Workers]:
    """Stopped at the end, with all its processes. ``changes``: sections of the scenario."""
    scenario = msgspec.structs.replace(SCENARIO, **changes)
    keys = write_keys(folder / "keys.toml")
    ring = KeyRing.load(folder / "keys.toml", scenario.classes)
    loop = uvloop.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    options = ServeOptions(folder=folder, pin_cores=False, fake_cost=cost, drain_s=drain_s)
    context = supervising(scenario, ring, options, workers)
    inside = asyncio.run_coroutine_threadsafe(context.__aenter__(), loop).result(60)
    try:
        yield Workers(inside, loop, keys, folder)
    finally:
        asyncio.run_coroutine_threadsafe(context.__aexit__(None, None, None), loop).result(60)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()

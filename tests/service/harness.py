"""A real engine for tests: uvicorn on a free port, a worker process with the fake model, journals on disk.

It runs on a loop of its own in a thread, so that tests can be written like clients. ``frozen`` stops the worker
process by signal: what is asked meanwhile waits for certain, without a clock in the test.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
import msgspec
import openai
import psutil
import uvloop

from engine.config import ClassConfig, IngressConfig, ModelConfig, OverloadConfig, Scenario
from engine.errors import TYPE_OF_STATUS
from engine.ledger.journal import GatewayEntry, open_journal
from engine.policy.trip import GatewayStats
from engine.service.auth import KeyRing, new_key
from engine.service.server import RunningEngine, ServeOptions, running
from engine.stepcost import StepCost

T = TypeVar("T")
CHAT = "/v1/chat/completions"
DEADLINE_S = 20.0
STEP_20_MS = StepCost(fixed_ns=20e6, prefill_token_ns=0, prefill_row_ns=0, decode_row_ns=0, decode_kv_ns=0, area_ns=0)

SCENARIO = Scenario(
    name="service-tests",
    classes={
        "chat": ClassConfig(criticality="standard", slo_ttft_ms=60_000, max_tokens=200),
        "fraud": ClassConfig(
            criticality="critical", slo_ttft_ms=60_000, max_tokens=8, caches="none", pinned=True,
            system_prompt="prompts/payment_fraud.txt",
        ),
        "hasty": ClassConfig(criticality="standard", slo_ttft_ms=60_000, timeout_ms=700, max_tokens=200),
    },
    model=ModelConfig(name="fake", context_tokens=512),
    ingress=IngressConfig(max_body_bytes=20_000, max_in_flight=60),
    overload=OverloadConfig(enabled=False),  # a frozen worker is no overload
)

TENANTS = {
    "shop": 'classes = ["chat", "hasty"]\n',
    "bank": 'classes = ["fraud", "chat"]\n',
    "trickle": 'classes = ["chat"]\nrate_rps = 0.01\nburst = 1\n',
    "office": 'classes = ["chat"]\nadmin = true\n',
}


@dataclass
class Engine:
    """Handles on one running engine."""

    inside: RunningEngine
    loop: asyncio.AbstractEventLoop
    keys: dict[str, str]
    workers: list[psutil.Process]  # the replicas' processes as they were first
    folder: Path

    @property
    def url(self) -> str:
        return self.inside.url

    @property
    def worker(self) -> psutil.Process:
        """The first, for those who have one."""
        return self.workers[0]

    def call(self, do: Callable[[], T]) -> T:
        """On the engine's own thread: its state has one owner."""

        async def there() -> T:
            return do()

        return asyncio.run_coroutine_threadsafe(there(), self.loop).result(DEADLINE_S)

    def until(self, true: Callable[[], object]) -> None:
        """Wait for a state, or fail at the deadline."""

        async def there() -> None:
            async with asyncio.timeout(DEADLINE_S):
                while not true():
                    await asyncio.sleep(0.002)

        asyncio.run_coroutine_threadsafe(there(), self.loop).result(2 * DEADLINE_S)

    def stats(self) -> GatewayStats:
        """The machine's."""
        return self.call(self.inside.driver.machine.stats)

    def waiting(self, count: int) -> None:
        """Until the machine has so many requests on their way, and the ingress with it."""
        self.until(lambda: self.inside.driver.machine.stats().in_flight == self.inside.app.in_flight == count)

    def quiet(self) -> None:
        """Until nothing is on its way anywhere, and no task but the server's own and this one is alive."""
        self.waiting(0)
        self.until(lambda: len(asyncio.all_tasks()) == self.idle_tasks + 1)

    idle_tasks: int = 0

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """The worker stands still."""
        self.worker.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):
                self.worker.send_signal(signal.SIGCONT)

    def http(self, tenant: str | None = "shop", **headers: str) -> httpx.Client:
        """A plain client; ``None`` brings no key."""
        if tenant is not None:
            headers["authorization"] = f"Bearer {self.keys[tenant]}"
        return httpx.Client(base_url=self.url, headers=headers, timeout=DEADLINE_S, trust_env=False)

    def official(self, tenant: str = "shop") -> openai.OpenAI:
        """The official client, as its users have it, but for its patience with errors."""
        return openai.OpenAI(
            base_url=f"{self.url}/v1", api_key=self.keys[tenant], max_retries=0, timeout=DEADLINE_S,
        )


def journal(folder: Path) -> list[GatewayEntry]:
    """All that the gateway was told; whole only after the engine has stopped."""
    return list(open_journal(folder / "journal" / "gateway-0.ndjson").entries())  # type: ignore[arg-type]


def check_error(got: httpx.Response, status: int, code: str, param: str | None = None) -> str:
    """The one shape of every refusal; returns its message."""
    assert got.status_code == status, got.text
    assert got.headers["content-type"] == "application/json"
    assert got.headers["x-request-id"]
    assert got.json().keys() == {"error"}
    error = got.json()["error"]
    kind = TYPE_OF_STATUS.get(status, "invalid_request_error")
    assert error == {"message": error["message"], "type": kind, "param": param, "code": code}
    assert error["message"]
    assert not re.search(r'Traceback|File "|\.py|Error:|line \d', got.text), got.text
    if status in (429, 503):
        assert int(got.headers["retry-after"]) >= 1
    return str(error["message"])


def dial(engine: Engine, head: str, data: bytes = b"") -> socket.socket:
    """A connection on which a request has been sent, as far as given."""
    host, port = engine.url.removeprefix("http://").split(":")
    line = socket.create_connection((host, int(port)), timeout=20)
    line.sendall(head.replace("\n", "\r\n").encode() + b"\r\n\r\n" + data)
    return line


def body(text: str, **more: Any) -> dict[str, Any]:
    """A chat request."""
    return {"model": "default", "messages": [{"role": "user", "content": text}], **more}


def write_keys(path: Path) -> dict[str, str]:
    """A key file as a person would make it, and the keys."""
    made = {name: new_key(name) for name in TENANTS}
    path.write_text("\n".join(stanza + TENANTS[name] for name, (_, stanza) in made.items()))
    return {name: key for name, (key, _) in made.items()}


@contextlib.contextmanager
def start(
    folder: Path, cost: StepCost | None = None, pin_cores: bool = False, start_s: float = 60, **changes: Any
) -> Iterator[Engine]:
    """An engine, stopped at the end. ``cost`` None: the model takes no time. ``changes``: sections of the scenario."""
    scenario = msgspec.structs.replace(SCENARIO, **changes)
    keys = write_keys(folder / "keys.toml")
    ring = KeyRing.load(folder / "keys.toml", scenario.classes)
    loop = uvloop.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    ours = {child.pid for child in psutil.Process().children()}
    context = running(scenario, ring, ServeOptions(folder=folder, pin_cores=pin_cores, fake_cost=cost))
    inside = asyncio.run_coroutine_threadsafe(context.__aenter__(), loop).result(start_s)
    try:
        born = (child for child in psutil.Process().children() if child.pid not in ours)  # the encoder is one, too
        workers = sorted((c for c in born if "engine.model.process" in c.cmdline()), key=lambda child: child.pid)
        assert len(workers) == (0 if scenario.upstreams else scenario.replicas)
        engine = Engine(inside, loop, keys, workers, folder)
        engine.idle_tasks = engine.call(lambda: len(asyncio.all_tasks()) - 1)
        yield engine
    finally:
        asyncio.run_coroutine_threadsafe(context.__aexit__(None, None, None), loop).result(60)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()

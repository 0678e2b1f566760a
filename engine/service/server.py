"""Puts the live engine together: keys, facts, gateway machine and driver, one replica process, uvicorn as a library.

``running`` is a context: inside it the engine answers on ``url``. The command line prints and waits; tests and the
demo look inside.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import socket
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import uvicorn

from engine.config import Scenario, gateway_config, replica_config
from engine.errors import UserError
from engine.events import Ended, LevelRecord, RequestRecord
from engine.ledger.journal import JournalWriter
from engine.model.blockhash import Hasher
from engine.model.folder import prepare
from engine.model.process import WorkerSpec
from engine.model.smalllm import small_tokenizer
from engine.model.stepcost import StepCost
from engine.model.tokenizer import Detokenizer, Tokenizer, load_tokenizer
from engine.model.wire import Output, Ready
from engine.policy.gateway import Gateway, fallback_id
from engine.scenario import data_path
from engine.service.app import App
from engine.service.auth import KeyRing
from engine.service.driver import GatewayDriver
from engine.service.facts import FactMaker
from engine.service.replicas import ReplicaProcess, share_cores

DRAIN_TIMEOUT_S = 30.0


class ServeOptions(msgspec.Struct, frozen=True):
    """Where and how, as the command line says it."""

    host: str = "127.0.0.1"
    port: int = 0
    folder: Path | None = None  # run folder: journal/ and ledger/ go below it
    pin_cores: bool = True
    fake_cost: StepCost | None = None
    hash_key: bytes = b""  # b"" = drawn now


@dataclass(slots=True)
class RunningEngine:
    """A live engine, for those who look inside."""

    url: str
    driver: GatewayDriver
    ready: Ready
    app: App
    epoch_ns: int  # on the machine's monotonic clock: the journal's zero

    async def drain(self) -> None:
        """Stop taking work, wait for what runs."""
        self.app.draining = True
        self.driver.drain()
        deadline = time.monotonic() + DRAIN_TIMEOUT_S
        while self.driver.machine.stats().in_flight and time.monotonic() < deadline:
            await asyncio.sleep(0.02)


def tokenizer_for(name: str) -> Tokenizer:
    """The vocabulary of a named model; torch is not imported unless weights must be converted first."""
    if name in ("fake", "tiny"):
        return small_tokenizer()
    folder = prepare(name, lambda line: None)
    assert folder.path is not None
    return load_tokenizer(folder.path)


@contextlib.asynccontextmanager
async def running(scenario: Scenario, keys: KeyRing, options: ServeOptions) -> AsyncIterator[RunningEngine]:
    """Start everything; stop everything at the end."""
    hasher = Hasher(options.hash_key or secrets.token_bytes(16), scenario.prefix.block_tokens)
    epoch_ns = time.monotonic_ns()
    own_cores, replica_cores, threads = share_cores(scenario.model.threads)
    replica = ReplicaProcess(lambda output: driver.hear(output), lambda: lost())
    spec = WorkerSpec(
        socket_path=replica.socket_path, model=scenario.model, replica=replica_config(scenario), hash_key=hasher.key,
        epoch_ns=epoch_ns, threads=threads, cores=replica_cores if options.pin_cores else (),
        journal=str(options.folder / "journal" / "replica-0.ndjson") if options.folder else "",
        fake_cost=options.fake_cost,
    )
    if options.pin_cores and own_cores:
        os.sched_setaffinity(0, own_cores)
    sock = listen(options.host, options.port)
    try:
        ready = await replica.start(spec)
    except BaseException:
        sock.close()
        await replica.stop()
        raise
    tokenizer = tokenizer_for(scenario.model.name)
    config = gateway_config(scenario, keys.tenants)
    folder = options.folder
    journal = JournalWriter(folder / "journal" / "gateway-0.ndjson", "gateway", config, hasher.key) if folder else None
    with contextlib.ExitStack() as stack:
        ledger = stack.enter_context(Ledger(folder / "ledger" / "records.ndjson")) if folder else None
        driver = GatewayDriver(
            Gateway(config), lambda: time.monotonic_ns() - epoch_ns, replica, hasher, lambda: Detokenizer(tokenizer),
            fallback_texts(scenario), journal, ledger.append if ledger else None,
        )
        facts = FactMaker(tokenizer, hasher, scenario, scenario.model.name)
        app = App(driver, keys, facts, scenario, scenario.model.name)

        def lost() -> None:
            """The worker died: every open submission fails now, rather than never."""
            app.replica_lost = True
            driver.hear(Output([Ended(sid, "failed") for sid in driver.open_submissions()]))

        server = _Uvicorn(
            uvicorn.Config(
                app, http="httptools", ws="none", lifespan="off", log_level="warning", access_log=False,
                timeout_keep_alive=75, server_header=False, date_header=False,
            )
        )
        serving = asyncio.create_task(server.serve(sockets=[sock]))
        while not server.started and not serving.done():
            await asyncio.sleep(0.005)
        host, port = sock.getsockname()[:2]
        try:
            yield RunningEngine(f"http://{host}:{port}", driver, ready, app, epoch_ns)
        finally:
            server.should_exit = True
            await serving
            await replica.stop()
            driver.close()


class Ledger:
    """Appends records as JSON lines. The data-tier form (blocks, group commit, views) replaces it behind ``append``."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("xb")
        self._encoder = msgspec.json.Encoder()

    def append(self, record: RequestRecord | LevelRecord) -> None:
        """One line, buffered."""
        self._file.write(self._encoder.encode(record) + b"\n")

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


class _Uvicorn(uvicorn.Server):
    """Signals belong to whoever runs the engine, not to its HTTP server."""

    @contextlib.contextmanager
    def capture_signals(self):  # type: ignore[no-untyped-def]
        yield


def fallback_texts(scenario: Scenario) -> dict[str, str]:
    """Answer id to text, for the classes that have an answer of last resort."""
    return {
        fallback_id(name): data_path("corpora", cls.fallback).read_text().strip()
        for name, cls in scenario.classes.items()
        if cls.fallback
    }


def listen(host: str, port: int) -> socket.socket:
    """A listening socket, or a clear word on why not."""
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise UserError(
            f"cannot listen on {host} port {port}", why=error.strerror or str(error),
            fix="give another --port, or 0 for a free one",
        ) from None
    sock.listen(2048)
    sock.setblocking(False)
    return sock

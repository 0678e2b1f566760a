"""Puts the live engine together: keys, facts, gateway machine and driver, replica processes, uvicorn as a library.

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

from engine.config import Scenario, TenantConfig, gateway_config, replica_config
from engine.errors import UserError
from engine.events import LedgerRecord
from engine.ledger.journal import JournalWriter
from engine.model.blockhash import Hasher
from engine.model.encoder_process import EncoderSpec
from engine.model.folder import prepare
from engine.model.process import WorkerSpec
from engine.model.smalllm import small_tokenizer
from engine.model.tokenizer import Detokenizer, Tokenizer, load_tokenizer
from engine.model.wire import Output, Ready
from engine.policy.gateway import Gateway
from engine.policy.replies import fallback_id
from engine.scenario import data_path
from engine.service.app import App
from engine.service.auth import KeyRing
from engine.service.driver import GatewayDriver
from engine.service.encoder import EncoderClient
from engine.service.facts import FactMaker
from engine.service.metrics import Metrics
from engine.service.pool import HANG_STEPS, ReplicaPool
from engine.service.replicas import share_cores
from engine.stepcost import StepCost

DRAIN_TIMEOUT_S = 30.0
HANG_UP_S = 5  # after the drain: for answers that are being sent
UNBOUND_HANG_S = 120.0
FLUSH_S = 0.2  # a gateway that is killed loses no more of journal and ledger than this


class ServeOptions(msgspec.Struct, frozen=True):
    """Where and how, as the command line says it."""

    host: str = "127.0.0.1"
    port: int = 0
    folder: Path | None = None  # run folder: journal/ and ledger/ go below it
    pin_cores: bool = True
    fake_cost: StepCost | None = None
    step_cost: StepCost | None = None  # of this model on this machine: bounds a step's time; None = tokens alone do
    hash_key: bytes = b""  # b"" = drawn now


@dataclass(slots=True)
class RunningEngine:
    """A live engine, for those who look inside."""

    url: str
    driver: GatewayDriver
    ready: Ready
    app: App
    epoch_ns: int  # on the machine's monotonic clock: the journal's zero
    files: list[JournalWriter | Ledger]
    pool: ReplicaPool
    lost: asyncio.Event  # all replicas have been given up

    def flush(self) -> None:
        """Journal and ledger are with the kernel: for those who leave without ``running``'s end."""
        for file in self.files:
            file.flush()

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
    """Start everything; stop everything at the end. A start that fails half-way leaves nothing behind but files."""
    hasher = Hasher(options.hash_key or secrets.token_bytes(16), scenario.prefix.block_tokens)
    epoch_ns = time.monotonic_ns()
    own_cores, replica_cores, threads = share_cores(scenario.model.threads, scenario.replicas)
    if not options.pin_cores:
        own_cores = replica_cores = ()
    folder = options.folder
    gone = asyncio.Event()
    async with contextlib.AsyncExitStack() as stack:
        if own_cores:
            stack.callback(os.sched_setaffinity, 0, os.sched_getaffinity(0))
            os.sched_setaffinity(0, own_cores)
        sock = stack.enter_context(listen(options.host, options.port))
        metrics = Metrics(scenario)

        driver: GatewayDriver | None = None  # from when all replicas are ready

        def hear(output: Output) -> None:
            metrics.hear(output)
            if driver is not None:
                driver.hear(output)

        def keep(record: LedgerRecord) -> None:
            metrics.append(record)
            if ledger is not None:
                ledger.append(record)

        def lost(replica: int, for_good: bool) -> None:
            if driver is not None:
                driver.lose(replica, for_good)

        def back(replica: int) -> None:
            if driver is not None:
                driver.welcome(replica)

        longest_s = HANG_STEPS * scenario.batcher.max_step_ms / 1000
        # without a calibration only tokens bound a step: a large model on a small machine takes its time
        bound = options.step_cost is not None or scenario.model.name == "fake"
        hang_s = scenario.replica_hang_s or max(longest_s, 0.0 if bound else UNBOUND_HANG_S)
        pool = ReplicaPool(hear, lost, back, gone.set, scenario.replica_restarts, hang_s)
        stack.push_async_callback(pool.stop)
        specs = worker_specs(scenario, keys.tenants, options, hasher.key, epoch_ns, replica_cores, threads)
        ready, *_ = await pool.start(specs)
        tokenizer = tokenizer_for(scenario.model.name)
        config = gateway_config(scenario, keys.tenants)
        journal: JournalWriter | None = None
        ledger: Ledger | None = None
        if folder is not None:
            journal = JournalWriter(folder / "journal" / "gateway-0.ndjson", "gateway", config, hasher.key)
            stack.callback(journal.close)
            ledger = stack.enter_context(Ledger(folder / "ledger" / "records.ndjson"))
        encoder = await start_encoder(scenario, own_cores)
        if encoder is not None:
            stack.push_async_callback(encoder.stop)
        driver = GatewayDriver(
            Gateway(config), lambda: time.monotonic_ns() - epoch_ns, pool, hasher, lambda: Detokenizer(tokenizer),
            fallback_texts(scenario), journal, keep, encoder,
        )
        facts = FactMaker(tokenizer, hasher, scenario, scenario.model.name)
        app = App(driver, keys, facts, scenario, scenario.model.name, metrics, encoder)
        host, port = sock.getsockname()[:2]
        files = [file for file in (journal, ledger) if file is not None]
        engine = RunningEngine(f"http://{host}:{port}", driver, ready, app, epoch_ns, files, pool, gone)
        for replica in set(range(scenario.replicas)) - set(pool.up):  # died while the rest was being started
            driver.lose(replica)
        stack.callback(asyncio.create_task(_flush_often(engine)).cancel)
        server = _Uvicorn(
            uvicorn.Config(
                app, http="httptools", ws="none", lifespan="off", log_level="warning", access_log=False,
                timeout_keep_alive=75, server_header=False, date_header=False,
                timeout_graceful_shutdown=HANG_UP_S + 2,
            )
        )
        serving = asyncio.create_task(server.serve(sockets=[sock]))
        try:
            while not server.started and not serving.done():
                await asyncio.sleep(0.005)
            yield engine
        finally:  # in this order: each may still have a word for the next
            await _end_serving(server, serving)
            await pool.stop()
            if encoder is not None:
                await encoder.stop()
            driver.close()


def worker_specs(
    scenario: Scenario, tenants: dict[str, TenantConfig], options: ServeOptions, hash_key: bytes, epoch_ns: int,
    cores: tuple[int, ...], threads: int,
) -> list[WorkerSpec]:
    """What each replica process is to know. ``cores``: of all of them; () = wherever."""
    folder = options.folder
    return [
        WorkerSpec(
            socket_path="", model=scenario.model, hash_key=hash_key, epoch_ns=epoch_ns,
            replica=replica_config(scenario, tenants, n, options.step_cost), threads=threads,
            cores=cores[n * threads : (n + 1) * threads],
            journal=str(folder / "journal" / f"replica-{n}.ndjson") if folder else "", fake_cost=options.fake_cost,
        )
        for n in range(scenario.replicas)
    ]


async def _end_serving(server: _Uvicorn, serving: asyncio.Task[None]) -> None:
    """Responses may be finished; who has not sent all of its request by then, or takes no answer, is hung up on."""
    server.should_exit = True
    await asyncio.wait([serving], timeout=HANG_UP_S)
    for connection in list(server.server_state.connections):
        connection.transport.abort()  # type: ignore[union-attr]
    await serving


async def _flush_often(engine: RunningEngine) -> None:
    while True:
        await asyncio.sleep(FLUSH_S)
        engine.flush()


async def start_encoder(scenario: Scenario, cores: tuple[int, ...]) -> EncoderClient | None:
    """The encoder, if a class is answered by similar questions. It shares the gateway's cores, not the replica's."""
    if not scenario.semantic.enabled or all(cls.caches != "semantic" for cls in scenario.classes.values()):
        return None
    encoder = EncoderClient()
    await encoder.start(EncoderSpec(cores=cores))
    return encoder


class Ledger:
    """Appends records as JSON lines. The data-tier form (blocks, group commit, views) replaces it behind ``append``."""

    def __init__(self, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("xb")
        except OSError as error:
            why = error.strerror or str(error)
            raise UserError("no ledger can be written", str(path), why, "give a new run folder") from None
        self._encoder = msgspec.json.Encoder()

    def append(self, record: LedgerRecord) -> None:
        """One line, buffered."""
        self._file.write(self._encoder.encode(record) + b"\n")

    def flush(self) -> None:
        """All that was appended is with the kernel. A closed ledger is no mistake."""
        if not self._file.closed:
            self._file.flush()

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

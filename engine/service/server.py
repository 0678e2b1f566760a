"""Puts the live engine together: keys, facts, gateway machine and driver, replica processes, uvicorn as a library.

``running`` is a context: inside it the engine answers on ``url``. The command line prints and waits; tests and the
demo look inside.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial
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
from engine.service.connections import Connections
from engine.service.driver import GatewayDriver
from engine.service.encoder import EncoderClient
from engine.service.encoder_host import EncoderHost, SharedEncoder
from engine.service.facts import FactMaker
from engine.service.keeper import SnapshotKeeper, origin_of
from engine.service.listening import join, listen
from engine.service.metrics import Metrics
from engine.service.pool import HANG_STEPS, ReplicaPool
from engine.service.protocol import GuardedProtocol
from engine.service.replicas import share_cores
from engine.service.shared_replicas import SharedReplicas, Sibling
from engine.service.upstream_pool import UpstreamPool
from engine.stepcost import StepCost

DRAIN_TIMEOUT_S = 30.0
HANG_UP_S = 5  # after the drain: for answers that are being sent
UNBOUND_HANG_S = 120.0
LOOPBACK = "127.0.0.1"
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
    drain_s: float = DRAIN_TIMEOUT_S  # what runs may take so long to end


@dataclass(slots=True)
class RunningEngine:
    """A live engine, for those who look inside."""

    url: str
    driver: GatewayDriver
    ready: Ready
    app: App
    epoch_ns: int  # on the machine's monotonic clock: the journal's zero
    files: list[JournalWriter | Ledger | UpstreamPool]
    pool: ReplicaPool | UpstreamPool | SharedReplicas
    lost: asyncio.Event  # all replicas have been given up
    connections: Connections
    warm_answers: int = 0  # that a former life had left
    drain_s: float = DRAIN_TIMEOUT_S

    def flush(self) -> None:
        """Journal and ledger are with the kernel: for those who leave without ``running``'s end."""
        for file in self.files:
            file.flush()

    async def drain(self) -> None:
        """Stop taking work, wait for what runs; what has not ended by the deadline ends with an error that says so."""
        self.app.draining = True
        self.driver.drain()
        deadline = time.monotonic() + self.drain_s
        while self.driver.machine.stats().in_flight and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        self.driver.cut_short()


def tokenizer_for(name: str) -> Tokenizer:
    """The vocabulary of a named model; torch is not imported unless weights must be converted first."""
    if name in ("fake", "tiny"):
        return small_tokenizer()
    folder = prepare(name, lambda line: None)
    assert folder.path is not None
    return load_tokenizer(folder.path)


@contextlib.asynccontextmanager
async def running(
    scenario: Scenario, keys: KeyRing, options: ServeOptions, sibling: Sibling | None = None
) -> AsyncIterator[RunningEngine]:
    """Start everything; stop everything at the end. A start that fails half-way leaves nothing behind but files.

    ``sibling``: this is one of several gateways, and others start and stop what all of them share.
    """
    keeper = SnapshotKeeper(scenario.snapshot) if scenario.snapshot.path else None
    hash_key = options.hash_key or (keeper.hash_key if keeper else b"") or secrets.token_bytes(16)
    hasher = Hasher(hash_key, scenario.prefix.block_tokens)
    epoch_ns = sibling.epoch_ns if sibling else time.monotonic_ns()
    own_cores, replica_cores, threads = share_cores(scenario.model.threads, scenario.replicas)
    if not options.pin_cores or scenario.upstreams or sibling:
        own_cores = replica_cores = ()
    folder = options.folder
    gone = asyncio.Event()
    async with contextlib.AsyncExitStack() as stack:
        if own_cores:
            stack.callback(os.sched_setaffinity, 0, os.sched_getaffinity(0))
            os.sched_setaffinity(0, own_cores)
        open_port = join if sibling else listen
        socks = [stack.enter_context(open_port(options.host, options.port))]
        if sibling:
            socks.append(stack.enter_context(join(LOOPBACK, sibling.own_port)))
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

        def hear_text(sid: int, text: str) -> None:
            if driver is not None:
                driver.hear_text(sid, text)

        def clock_ns() -> int:
            return time.monotonic_ns() - epoch_ns

        pool: ReplicaPool | UpstreamPool | SharedReplicas
        if scenario.upstreams:
            lane = f"lane-of-{sibling.name}" if sibling else "lane"
            pool = UpstreamPool(scenario, keys.tenants, clock_ns, hear, hear_text, lost, back, folder, lane)
            stack.push_async_callback(pool.stop)
            ready = await pool.start()
        elif sibling is not None:
            pool = SharedReplicas(sibling, hear, lost, back)
            stack.push_async_callback(pool.stop)
            ready = await pool.start()
        else:
            hang_s = hang_after_s(scenario, options)
            pool = ReplicaPool(hear, lost, back, gone.set, scenario.replica_restarts, hang_s)
            stack.push_async_callback(pool.stop)
            specs = worker_specs(scenario, keys.tenants, options, hasher.key, epoch_ns, replica_cores, threads)
            ready, *_ = await pool.start(specs)
        tokenizer = tokenizer_for(scenario.model.name)
        config = gateway_config(scenario, keys.tenants, sibling.gateway if sibling else 0)
        journal: JournalWriter | None = None
        ledger: Ledger | None = None
        if folder is not None:
            name, ledger_name = (sibling.name, f"records-{sibling.name}.ndjson") if sibling else ("0", "records.ndjson")
            journal = JournalWriter(folder / "journal" / f"gateway-{name}.ndjson", "gateway", config, hasher.key)
            stack.callback(journal.close)
            ledger = stack.enter_context(Ledger(folder / "ledger" / ledger_name))
        host = SharedEncoder(sibling.encoder, sibling.encoder_hangs) if sibling else None
        encoder, encoder_digest = await start_encoder(scenario, own_cores, host)
        if encoder is not None:
            stack.push_async_callback(encoder.stop)
        driver = GatewayDriver(
            Gateway(config), clock_ns, pool, hasher, lambda: Detokenizer(tokenizer),
            fallback_texts(scenario), journal, keep, encoder, called_off=keeper.called_off if keeper else None,
            tell_others=sibling.tell_others if sibling else None,
        )
        origin = origin_of(scenario, hash_key, ready.digest, encoder_digest)
        warm_answers = keeper.warm(driver, origin) if keeper else 0
        facts = FactMaker(tokenizer, hasher, scenario, scenario.model.name)
        app = App(driver, keys, facts, scenario, scenario.model.name, metrics, encoder)
        address, port = socks[0].getsockname()[:2]
        files: list[JournalWriter | Ledger | UpstreamPool] = [file for file in (journal, ledger) if file is not None]
        files += [pool] if isinstance(pool, UpstreamPool) else []
        connections = Connections(scenario.ingress, metrics.refused)
        engine = RunningEngine(
            f"http://{address}:{port}", driver, ready, app, epoch_ns, files, pool, gone, connections, warm_answers,
            options.drain_s,
        )
        for replica in set(range(scenario.replicas)) - set(pool.up):  # died while the rest was being started
            driver.lose(replica)
        if isinstance(pool, SharedReplicas):
            pool.greet()
        stack.callback(asyncio.create_task(_flush_often(engine)).cancel)
        server = _Uvicorn(
            uvicorn.Config(
                app, http=partial(GuardedProtocol, connections),  # type: ignore[arg-type]
                ws="none", lifespan="off", log_level="warning", access_log=False, server_header=False,
                date_header=False, proxy_headers=False, timeout_graceful_shutdown=HANG_UP_S + 2,
            )
        )
        if keeper is not None:
            keeper.begin(driver, origin)
            stack.push_async_callback(keeper.stop)
        serving = asyncio.create_task(server.serve(sockets=socks))
        try:
            while not server.started and not serving.done():
                await asyncio.sleep(0.005)
            yield engine
        finally:  # in this order: each may still have a word for the next
            await _end_serving(server, serving)
            await pool.stop()
            if encoder is not None:
                await encoder.stop()
            if keeper is not None:
                await keeper.stop()
                await keeper.save(driver, origin)
            driver.close()


def hang_after_s(scenario: Scenario, options: ServeOptions) -> float:
    """Work and no word for so long, and a replica hangs."""
    longest_s = HANG_STEPS * scenario.batcher.max_step_ms / 1000
    # without a calibration only tokens bound a step: a large model on a small machine takes its time
    bound = options.step_cost is not None or scenario.model.name == "fake"
    return scenario.replica_hang_s or max(longest_s, 0.0 if bound else UNBOUND_HANG_S)


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


async def start_encoder(
    scenario: Scenario, cores: tuple[int, ...], host: EncoderHost | None = None
) -> tuple[EncoderClient | None, str]:
    """The encoder and its digest, if a class is answered by similar questions; on the gateway's cores, not the model's.

    ``host``: None = a process of its own.
    """
    if not scenario.semantic.enabled or all(cls.caches != "semantic" for cls in scenario.classes.values()):
        return None, ""
    encoder = EncoderClient(host=host)
    ready = await encoder.start(EncoderSpec(cores=cores))
    return encoder, ready.digest


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

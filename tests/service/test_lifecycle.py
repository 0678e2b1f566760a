"""How an engine comes and goes: what a signal, a death or a mistake at any moment leaves behind.

Real processes through the command line; a load that takes as long as a test wants is a fake model whose answers come
from a FIFO. Nothing sleeps: every wait is for a state, with a deadline.

Run: python -m pytest tests/service/test_lifecycle.py -q
Mutations it caught: no look for orphans; a signal that does not end the start; no flush at the second signal, nor in
silence by the gateway, nor by the worker; SIGTERM left to its default; nobody hung up on; a loss that nobody waits for;
cores kept; a worker left behind; no check of context, folder; folders kept; one session for program and
engine; a dead program that is not missed; `_limits` never tidied.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import msgspec
import psutil
import pytest

from engine.config import BatcherConfig, PrefixConfig, ReplicaConfig
from engine.errors import UserError
from engine.events import Arrive, Drain, Ended, Plan, RunStep, StepDone, Submit
from engine.ledger.journal import open_journal
from engine.model.blockhash import Hasher
from engine.model.counting import CountingRunner
from engine.policy.replica import Replica
from engine.service.auth import KeyRing
from engine.service.server import ServeOptions, running
from tests.service.conftest import Starter
from tests.service.harness import CHAT, SCENARIO, STEP_20_MS, body, dial, start
from tests.waiting import DEADLINE_S, until

FAKE = ("--set", "model.name=fake", "--set", "semantic.enabled=false")


def gone(pid: int) -> bool:
    """Ended; a zombie that nobody fetches counts."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@dataclass
class Served:
    """A ``serve`` and what it says."""

    process: subprocess.Popen[bytes]
    cwd: Path
    workers: list[psutil.Process] = field(default_factory=list)  # that a test has asked for

    def ready(self) -> dict[str, Any]:
        """Its first line."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.said()
        return msgspec.json.decode(line)

    def said(self) -> str:
        """On stderr, so far."""
        return (self.cwd / "stderr").read_text()

    def worker(self) -> psutil.Process:
        """Its replica."""
        self.workers += until(lambda: psutil.Process(self.process.pid).children(), "a worker")
        return self.workers[-1]

    def end(self) -> int:
        """Its exit code, soon."""
        return self.process.wait(DEADLINE_S)

    def leftovers(self) -> list[str]:
        """Files of run folders below its working directory."""
        return [str(path) for path in (self.cwd / "runs").rglob("*")]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Served]]:
    """``serve(args)``: started in a folder of its own; none of its processes survives the test."""
    made: list[Served] = []

    def begin(*args: str) -> Served:
        command = [sys.executable, "-m", "sim.cli", "serve", "flash-sale", "--port", "0", "--json", *args]
        with (tmp_path / "stderr").open("wb") as err:
            process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=err)
        made.append(Served(process, tmp_path))
        return made[-1]

    yield begin
    for served in made:
        with contextlib.suppress(psutil.NoSuchProcess):
            served.workers += psutil.Process(served.process.pid).children(recursive=True)
        served.process.kill()
        served.process.wait()
        assert served.process.stdout is not None
        served.process.stdout.close()
        for worker in served.workers:
            with contextlib.suppress(psutil.NoSuchProcess):
                worker.kill()


@pytest.fixture
def endless_load(tmp_path: Path) -> Iterator[tuple[tuple[str, ...], Callable[[], int]]]:
    """Options of a model that loads until the test says otherwise, and what waits until it does; closes on return."""
    fifo = tmp_path / "answers.csv"
    os.mkfifo(fifo)
    ends: list[int] = []

    def try_open() -> int | None:
        with contextlib.suppress(OSError):  # ENXIO: nobody reads it yet
            ends.append(os.open(fifo, os.O_WRONLY | os.O_NONBLOCK))
            return ends[-1]
        return None

    yield (*FAKE, "--set", f'model.fake_answers="{fifo}"'), lambda: until(try_open, "a worker that loads")
    for end in ends:
        with contextlib.suppress(OSError):
            os.close(end)


def chat(ready: dict[str, Any], cls: str = "product_qa") -> tuple[socket.socket, bytes]:
    """A request under way on a connection of its own."""
    host, port = ready["url"].removeprefix("http://").split(":")
    data = msgspec.json.encode(body("does the kettle switch itself off?"))
    head = (
        f"POST {CHAT} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {ready['api_key']}\r\n"
        f"x-doorbuster-class: {cls}\r\ncontent-length: {len(data)}\r\n\r\n"
    )
    line = socket.create_connection((host, int(port)), timeout=DEADLINE_S)
    line.sendall(head.encode() + data)
    return line, data


def events(path: Path) -> list[Any]:
    """Of a journal on disk now."""
    return [entry.event for entry in open_journal(path).entries()] if path.is_file() and path.stat().st_size else []


# ---------------------------------------------------------------- while it loads


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_signal_while_it_loads_ends_the_start(
    serve: Callable[..., Served], endless_load: Any, number: signal.Signals
) -> None:
    options, loading = endless_load
    served = serve(*options)
    loading()
    worker = served.worker()
    before = time.monotonic()
    served.process.send_signal(number)
    assert served.end() == 130
    assert time.monotonic() - before < 5, "after so long it would have been killed"
    assert "stopped before it was ready" in served.said()
    assert "Traceback" not in served.said()
    assert gone(worker.pid)
    assert served.leftovers() == []


def test_a_worker_whose_gateway_dies_while_it_loads_follows_it(serve: Callable[..., Served], endless_load: Any) -> None:
    options, loading = endless_load
    served = serve(*options)
    end = loading()
    worker = served.worker()
    served.process.kill()
    served.end()
    os.write(end, b"prompt,answer_id,answer\n")
    os.close(end)  # it has loaded, and nobody will ever connect
    until(lambda: gone(worker.pid), "the worker noticed")


# ---------------------------------------------------------------- signals


def test_a_second_signal_leaves_at_once_and_loses_nothing(serve: Callable[..., Served]) -> None:
    served = serve(*FAKE, "--folder", "run")
    ready = served.ready()
    worker = served.worker()
    worker.suspend()  # what is asked stays under way
    line, _ = chat(ready)
    journal = served.cwd / "run" / "journal" / "gateway-0.ndjson"
    until(lambda: any(isinstance(e, Arrive) for e in events(journal)), "the request arrived")
    served.process.send_signal(signal.SIGINT)
    until(lambda: "draining" in served.said(), "the drain")
    served.process.send_signal(signal.SIGTERM)
    assert served.end() == 130
    line.close()
    worker.resume()
    until(lambda: gone(worker.pid), "the worker noticed")
    assert any(isinstance(e, Drain) for e in events(journal))
    for path in journal.parent.iterdir():
        assert open_journal(path).torn_bytes == 0


def test_the_worker_outlives_a_sigterm_to_the_whole_group(started: Starter) -> None:
    engine = started()
    engine.worker.terminate()
    with engine.http() as client:
        assert client.post(CHAT, json=body("is anybody there?")).status_code == 200
    assert engine.worker.is_running()


def test_silence_is_no_reason_to_keep_files_in_memory(started: Starter) -> None:
    engine = started()
    with engine.http() as client:
        assert client.post(CHAT, json=body("a single question")).status_code == 200
    journals = engine.folder / "journal"
    until(lambda: any(isinstance(e, Arrive) for e in events(journals / "gateway-0.ndjson")), "the gateway's journal")
    until(lambda: any(isinstance(e, StepDone) for e in events(journals / "replica-0.ndjson")), "the replica's journal")
    until(lambda: (engine.folder / "ledger" / "records.ndjson").read_bytes().endswith(b"\n"), "the ledger")


def test_a_killed_gateway_leaves_journals_that_hold_what_happened(serve: Callable[..., Served]) -> None:
    served = serve(*FAKE, "--folder", "run")
    ready = served.ready()
    worker = served.worker()
    line, _ = chat(ready)
    assert line.recv(100).startswith(b"HTTP/1.1 200")
    line.close()
    journals = served.cwd / "run" / "journal"
    until(lambda: any(isinstance(e, Arrive) for e in events(journals / "gateway-0.ndjson")), "the gateway's journal")
    served.process.kill()
    until(lambda: gone(worker.pid), "the worker noticed the hang-up")
    replica = journals / "replica-0.ndjson"
    assert open_journal(replica).torn_bytes == 0
    assert any(isinstance(e, StepDone) for e in events(replica))


# ---------------------------------------------------------------- the end


def test_half_a_body_does_not_hold_up_the_end(tmp_path: Path) -> None:
    with start(tmp_path) as engine:
        head = f"POST {CHAT} HTTP/1.1\nhost: x\nauthorization: Bearer {engine.keys['shop']}\ncontent-length: 100"
        line = dial(engine, head, b"{")
        engine.until(lambda: engine.inside.app.in_flight == 1)
        before = time.monotonic()
    assert time.monotonic() - before < 20, "hung up on within seconds"
    with contextlib.suppress(ConnectionResetError):
        assert line.recv(100) == b""
    line.close()


def test_an_answer_that_nobody_reads_does_not_hold_up_the_end(tmp_path: Path) -> None:
    with start(tmp_path, STEP_20_MS) as engine:
        data = msgspec.json.encode(body("word " * 40, stream=True))
        head = (
            f"POST {CHAT} HTTP/1.1\nhost: x\nauthorization: Bearer {engine.keys['shop']}\n"
            f"content-length: {len(data)}"
        )
        line = dial(engine, head, data)
        engine.waiting(1)
        before = time.monotonic()
    assert time.monotonic() - before < 20
    line.close()


def test_a_lost_replica_ends_serve_with_exit_code_1(serve: Callable[..., Served]) -> None:
    served = serve(*FAKE, "--set", "replica_restarts=0")
    ready = served.ready()
    worker = served.worker()
    worker.suspend()
    line, _ = chat(ready, "checkout_help")
    journal = Path(served.cwd, ready["folder"]) / "journal" / "gateway-0.ndjson"
    until(lambda: any(isinstance(e, Arrive) for e in events(journal)), "the request arrived")
    worker.kill()
    assert b" 50" in line.recv(100), "its client was told"
    line.close()
    assert served.end() == 1
    said = served.said()
    assert "replica 0 has died" in said
    assert "error: no replica is left" in said
    assert "Traceback" not in said
    assert any(isinstance(e, Drain) for e in events(journal))


def test_the_cores_are_given_back() -> None:
    before = os.sched_getaffinity(0)
    scenario = msgspec.structs.replace(SCENARIO, name="pinned")

    async def there() -> set[int]:
        async with running(scenario, KeyRing.single()[0], ServeOptions()):
            return os.sched_getaffinity(0)

    inside = asyncio.run(there())
    assert os.sched_getaffinity(0) == before
    assert len(before) == 1 or inside < before


# ---------------------------------------------------------------- mistakes


def test_a_start_that_fails_half_way_leaves_no_process_and_no_socket(tmp_path: Path) -> None:
    (tmp_path / "ledger").mkdir()
    (tmp_path / "ledger" / "records.ndjson").touch()
    ours = {child.pid for child in psutil.Process().children()}
    before = os.sched_getaffinity(0)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    async def there() -> None:
        async with running(SCENARIO, KeyRing.single()[0], ServeOptions(port=port, folder=tmp_path)):
            raise AssertionError("it must not start")

    with pytest.raises(UserError, match="no ledger can be written"):
        asyncio.run(there())
    assert {child.pid for child in psutil.Process().children()} <= ours
    assert os.sched_getaffinity(0) == before
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", port))


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--set", "model.name=tiny", "--set", "model.context_tokens=100000", "--set", "prefix.blocks=7000"),
         ["model.context_tokens (100000) is more than tiny", "2048", "fix:"]),
        ((*FAKE, "--set", "model.fake_answers=nowhere.csv"), ["nowhere.csv: model.fake_answers cannot be used"]),
        (("--set", "model.name=./nowhere", "--set", "semantic.enabled=false"), ["no such model folder"]),
    ],
)
def test_a_failed_start_says_one_clear_thing_and_leaves_no_run_folder(
    serve: Callable[..., Served], args: tuple[str, ...], words: list[str]
) -> None:
    served = serve(*args)
    assert served.end() == 1
    said = served.said()
    assert said.count("error:") == 1, said
    assert "gave up" not in said and "Traceback" not in said
    for word in words:
        assert word in said
    assert served.leftovers() == []


def test_a_port_in_use_leaves_no_run_folder(serve: Callable[..., Served]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        served = serve(*FAKE, "--port", str(other.getsockname()[1]))
        assert served.end() == 1
    assert "cannot listen on 127.0.0.1" in served.said()
    assert served.leftovers() == []


def test_a_run_folder_is_used_once(serve: Callable[..., Served]) -> None:
    first = serve(*FAKE, "--folder", "run")
    first.ready()
    first.process.terminate()
    assert first.end() == 0
    files = {path: path.read_bytes() for path in (first.cwd / "run").rglob("*") if path.is_file()}
    second = serve(*FAKE, "--folder", "run")
    assert second.end() == 1
    assert "run: this folder holds a run already" in second.said()
    assert "Traceback" not in second.said()
    assert {path: path.read_bytes() for path in (first.cwd / "run").rglob("*") if path.is_file()} == files


def test_a_failed_start_in_a_given_folder_can_be_tried_again(serve: Callable[..., Served]) -> None:
    assert serve(*FAKE, "--folder", "run", "--set", "model.fake_answers=nowhere.csv").end() == 1
    again = serve(*FAKE, "--folder", "run")
    again.ready()
    again.process.terminate()
    assert again.end() == 0


# ---------------------------------------------------------------- an engine that a program runs for itself

DRIVER = """
import signal, sys
from pathlib import Path
from engine.scenario import load
from sim.live import live_engine
sets = ("model.name=fake", "semantic.enabled=false")
with live_engine(load("flash-sale", sets), sets, Path("run")) as engine:
    print(engine.pid, engine.url, next(iter(engine.keys.values())), flush=True)
    signal.pause()
"""


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A program in a live engine, in a process group of its own as at a terminal; and the engine's process id."""
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        start_new_session=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert process.stdout is not None
    pid, url, key = process.stdout.readline().decode().split()
    headers = {"authorization": f"Bearer {key}"}
    got = httpx.post(url + CHAT, json=body("is it waterproof?"), headers=headers, timeout=DEADLINE_S, trust_env=False)
    assert got.status_code == 200
    yield process, int(pid)
    process.kill()
    process.wait()
    process.stdout.close()
    with contextlib.suppress(ProcessLookupError):
        os.kill(int(pid), signal.SIGKILL)


def test_a_ctrl_c_at_the_terminal_drains_the_engine(
    driver: tuple[subprocess.Popen[bytes], int], tmp_path: Path
) -> None:
    process, pid = driver
    os.killpg(process.pid, signal.SIGINT)
    process.wait(DEADLINE_S)
    assert gone(pid)
    for name in ("gateway-0", "replica-0"):
        path = tmp_path / "run" / "journal" / f"{name}.ndjson"
        assert open_journal(path).torn_bytes == 0
        assert any(isinstance(e, Drain) for e in events(path))
    assert (tmp_path / "run" / "ledger" / "records.ndjson").read_bytes().endswith(b"\n")
    assert not (tmp_path / "run" / "keys.toml").exists()


def test_an_engine_whose_program_was_killed_stops_by_itself(
    driver: tuple[subprocess.Popen[bytes], int], tmp_path: Path
) -> None:
    process, pid = driver
    process.kill()
    until(lambda: gone(pid), "the engine noticed")
    assert any(isinstance(e, Drain) for e in events(tmp_path / "run" / "journal" / "gateway-0.ndjson"))


# ---------------------------------------------------------------- a long life


def test_under_endless_load_the_calendars_stay_as_small_as_what_runs() -> None:
    config = ReplicaConfig(
        batcher=BatcherConfig(slots=4, reserved_slots=0, reserved_blocks=0),
        prefix=PrefixConfig(blocks=400, pinned_blocks=0),
    )
    replica, runner = Replica(config), CountingRunner(Hasher(b"k", 16))
    sid = 0
    for now_ns in range(1, 2001):
        for _ in range(2):  # somebody always waits, so that no step is more than one
            sid += 1
            replica.handle(now_ns, Submit(sid, sid, "t", "chat", 1, now_ns, 1 << 60, 20, 3, (), 0))
            runner.add(sid, 20, 3, 3)
        (step,) = (action for action in replica.handle(now_ns, Plan()) if isinstance(action, RunStep))
        for action in replica.handle(now_ns, runner.advance(step, 1)):
            if isinstance(action, Ended):
                runner.forget(action.sid)
    assert replica.stats().ended > 1000
    assert len(replica.batcher._limits.entries()) < 50

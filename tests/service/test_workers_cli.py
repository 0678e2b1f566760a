"""``doorbuster serve --workers 2`` as a person has it: what it says, what signals and deaths leave behind.

Run: python -m pytest tests/service/test_workers_cli.py -q
Mutations it caught: one left alone that stays; signals that the ingress processes hear.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import msgspec
import psutil
import pytest

from engine.events import Drain
from engine.ledger.journal import open_journal
from tests.service.harness import CHAT, body
from tests.service.test_lifecycle import FAKE, events, gone
from tests.waiting import DEADLINE_S, until


@dataclass
class Served:
    """A ``serve`` with two ingress processes, and all that it has started."""

    process: subprocess.Popen[bytes]
    cwd: Path
    ready: dict[str, Any] = field(default_factory=dict)
    family: list[psutil.Process] = field(default_factory=list)

    def said(self) -> str:
        return (self.cwd / "stderr").read_text()

    def post(self, worker: int, text: str, cls: str = "product_qa") -> httpx.Response:
        """At one of them."""
        headers = {"authorization": f"Bearer {self.ready['api_key']}", "x-doorbuster-class": cls}
        url = self.ready["workers"][worker]["url"] + CHAT
        return httpx.post(url, json=body(text), headers=headers, timeout=DEADLINE_S, trust_env=False)

    def status(self, worker: int, path: str) -> int:
        """Of a GET at one of them."""
        return httpx.get(self.ready["workers"][worker]["url"] + path, timeout=DEADLINE_S, trust_env=False).status_code

    def journals(self) -> list[Path]:
        return sorted((self.cwd / "run" / "journal").iterdir())

    def all_gone(self) -> None:
        until(lambda: all(gone(one.pid) for one in self.family), "all have left")

    def replica(self) -> psutil.Process:
        return next(one for one in self.family if "engine.model.process" in one.cmdline())


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    """Ready, in a process group of its own as at a terminal; nobody survives the test."""
    command = [
        sys.executable, "-m", "sim.cli", "serve", "flash-sale", "--port", "0", "--json", "--workers", "2",
        "--folder", "run", *FAKE, "--set", "replica_restarts=0",
    ]
    with (tmp_path / "stderr").open("wb") as err:
        process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=err, start_new_session=True)
    assert process.stdout is not None
    served = Served(process, tmp_path)
    try:
        line = process.stdout.readline()
        assert line, served.said()
        served.ready = msgspec.json.decode(line)
        served.family = psutil.Process(process.pid).children(recursive=True)
        yield served
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            served.family += psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.wait()
        process.stdout.close()
        for one in served.family:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()


def test_the_ready_line_names_each_and_a_sigterm_to_the_whole_group_drains_them(served: Served) -> None:
    pids = {one["pid"] for one in served.ready["workers"]}
    assert len(pids) == 2
    assert pids < {one.pid for one in served.family}
    assert served.ready["pid"] == served.process.pid
    urls = [served.ready["url"], *(one["url"] for one in served.ready["workers"])]
    assert len(set(urls)) == 3
    for n in range(2):
        assert served.post(n, f"is {n} waterproof?").status_code == 200
    os.killpg(served.process.pid, signal.SIGTERM)
    assert served.process.wait(DEADLINE_S) == 0
    served.all_gone()
    assert "Traceback" not in served.said()
    for path in served.journals():
        assert open_journal(path).torn_bytes == 0
    for n in range(2):
        assert any(isinstance(e, Drain) for e in events(served.cwd / "run" / "journal" / f"gateway-{n}.ndjson"))


def test_a_second_signal_leaves_at_once_and_loses_nothing(served: Served) -> None:
    replica = served.replica()
    replica.suspend()  # what is asked stays under way
    with contextlib.suppress(httpx.TransportError):
        ask = subprocess.Popen(
            [sys.executable, "-c", ASK, served.ready["workers"][0]["url"] + CHAT, served.ready["api_key"]],
            stderr=subprocess.DEVNULL,
        )
    journal = served.cwd / "run" / "journal" / "gateway-0.ndjson"
    until(lambda: len(events(journal)), "the request arrived")
    os.killpg(served.process.pid, signal.SIGINT)
    until(lambda: served.status(0, "/readyz") == 503, "the drain")
    os.killpg(served.process.pid, signal.SIGINT)
    assert served.process.wait(DEADLINE_S) == 130
    replica.resume()
    served.all_gone()
    ask.wait(DEADLINE_S)
    for path in served.journals():
        assert open_journal(path).torn_bytes == 0
    assert any(isinstance(e, Drain) for e in events(journal)), "the last thing that it was told"


ASK = """
import sys, httpx
httpx.post(sys.argv[1], json={"model": "default", "messages": [{"role": "user", "content": "hm?"}]},
           headers={"authorization": "Bearer " + sys.argv[2]}, timeout=60, trust_env=False)
"""


def test_a_killed_supervisor_takes_all_with_it(served: Served) -> None:
    for n in range(2):
        assert served.post(n, f"is {n} in stock?").status_code == 200
    served.process.kill()
    served.process.wait()
    served.all_gone()
    for path in served.journals():
        assert open_journal(path).torn_bytes == 0
    for n in range(2):
        ledger = served.cwd / "run" / "ledger" / f"records-{n}.ndjson"
        assert ledger.read_bytes().count(b'"RequestRecord"') == 1


def test_without_replicas_it_ends_with_exit_code_1(served: Served) -> None:
    served.replica().kill()
    assert served.process.wait(DEADLINE_S) == 1
    served.all_gone()
    assert "error: no replica is left" in served.said()
    assert "Traceback" not in served.said()


def test_without_ingress_processes_too(served: Served) -> None:
    for one in served.ready["workers"]:
        os.kill(one["pid"], signal.SIGKILL)
    assert served.process.wait(DEADLINE_S) == 1
    served.all_gone()
    assert "error: no ingress process is left" in served.said()
    assert "Traceback" not in served.said()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_signal_while_they_load_ends_the_start(
    tmp_path: Path, number: signal.Signals, popen: Callable[..., Any]
) -> None:
    process = popen(tmp_path)
    until(lambda: any(map(_is_ingress, psutil.Process(process.pid).children())), "an ingress process that loads")
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    assert process.wait(DEADLINE_S) == 130
    until(lambda: all(gone(one.pid) for one in children), "all have left")
    assert not list((tmp_path / "runs").rglob("*"))


def _is_ingress(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return "engine.service.ingress_process" in process.cmdline()
    return False


@pytest.fixture
def popen() -> Iterator[Callable[[Path], Any]]:
    """A ``serve`` that has only just begun."""
    made: list[subprocess.Popen[bytes]] = []

    def begin(cwd: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "sim.cli", "serve", "flash-sale", "--port", "0", "--workers", "2", *FAKE]
        made.append(subprocess.Popen(command, cwd=cwd, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL))
        return made[-1]

    yield begin
    for process in made:
        process.kill()
        process.wait()

"""A live engine as a subprocess, started through its own command line and spoken to over HTTP, like anybody else would.

The engine and its load must not share an interpreter, or each would wait for the other; the load stays on the cores
that the replica does not use.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from engine.config import Scenario
from engine.errors import UserError
from engine.scenario import Resolved
from engine.service.auth import new_key
from engine.service.replicas import share_cores
from sim.loadgen import Seen, play
from sim.serve import PARENT
from sim.twin.workload import Request

STOP_TIMEOUT_S = 40.0


class LiveEngine(msgspec.Struct, frozen=True):
    """Where it is, how to get in, and its clock's zero on the machine's monotonic clock."""

    url: str
    keys: dict[str, str]  # tenant -> API key
    epoch_ns: int
    pid: int


@contextlib.contextmanager
def live_engine(resolved: Resolved, sets: tuple[str, ...], folder: Path) -> Iterator[LiveEngine]:
    """``doorbuster serve`` on a free port with one key a tenant; stopped, drained, at the end."""
    folder.mkdir(parents=True, exist_ok=True)
    keys = _keys(resolved.scenario, folder / "keys.toml")
    command = [
        sys.executable, "-m", "sim.cli", "serve", resolved.path, "--port", "0", "--json", "--folder", str(folder),
        "--keys", str(folder / "keys.toml"), *(part for item in sets for part in ("--set", item)),
    ]
    # a session of its own: a Ctrl-C at the terminal is for us alone, and it hears one SIGTERM of ours
    env = {**os.environ, PARENT: str(os.getpid())}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=env, start_new_session=True)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        if not line:
            raise UserError("the engine did not start", why=f"exit code {process.wait()}; its last words are above")
        ready = msgspec.json.decode(line)
        yield LiveEngine(ready["url"], keys, ready["epoch_ns"], ready["pid"])
    finally:
        try:
            _stop(process)
        finally:
            process.stdout.close()
            (folder / "keys.toml").unlink(missing_ok=True)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Drained; at once, its files flushed, when the person at the keyboard loses patience."""
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    except KeyboardInterrupt:
        process.terminate()
        process.wait(STOP_TIMEOUT_S)
        raise


def drive(
    engine: LiveEngine, requests: list[Request], scenario: Scenario, on_done: Callable[[int], None]
) -> list[Seen]:
    """Play the requests against it, from the cores that its replicas do not use."""
    own, _, _ = share_cores(scenario.model.threads, scenario.replicas)
    before = os.sched_getaffinity(0) if own else None
    if own:
        os.sched_setaffinity(0, own)
    try:
        return asyncio.run(play(engine.url, engine.keys, requests, on_done))
    finally:
        if before:
            os.sched_setaffinity(0, before)


def _keys(scenario: Scenario, path: Path) -> dict[str, str]:
    classes: dict[str, list[str]] = {}
    for name, cls in scenario.classes.items():
        classes.setdefault(cls.tenant, []).append(name)
    keys: dict[str, str] = {}
    stanzas: list[str] = []
    for tenant, granted in classes.items():
        keys[tenant], stanza = new_key(tenant, granted)
        stanzas.append(stanza)
    path.write_text("\n".join(stanzas))
    path.chmod(0o600)
    return keys

"""What a second ingress process brings where hits are all that is asked: answers a second, one process against two.

The same question that is in the cache, over 32 kept connections, by two client processes of their own; one and two
ingress processes in turns, the fake model idle behind both. Nobody is pinned: on two cores the clients take their part
of what a second process could have, and whatever else runs on the machine does too. CPU of a hit is that of all ingress
processes together, by the operating system.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import psutil

from tests.bench.bench_ingress import ROOT, SETS, said
from tests.bench.figure import Figure
from tests.bench.http_line import ask_often

TURNS, ASKS, WARM, CLIENTS = 5, 12_000, 2_000, 2


@contextmanager
def served(folder: Path, workers: int) -> Iterator[tuple[list[psutil.Process], int, str]]:
    """``doorbuster serve --workers``: its ingress processes, port, key."""
    options = [part for item in SETS for part in ("--set", item)]
    command = [
        sys.executable, "-m", "sim.cli", "serve", "flash-sale", "--model", "fake", "--port", "0", "--json",
        "--folder", str(folder), "--workers", str(workers), *options,
    ]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        ready = json.loads(process.stdout.readline())
        pids = [one["pid"] for one in ready.get("workers", [])] or [process.pid]
        for pid in pids:
            psutil.Process(pid).cpu_affinity(list(range(psutil.cpu_count() or 1)))
        try:
            yield [psutil.Process(pid) for pid in pids], int(ready["url"].rpartition(":")[2]), ready["api_key"]
        finally:
            process.terminate()
            process.wait(60)


def hits(
    pool: ProcessPoolExecutor, processes: list[psutil.Process], port: int, request: bytes, asks: int
) -> tuple[float, float]:
    """Answers a second, and CPU of one in microseconds."""
    before = [process.cpu_times() for process in processes]
    began_s = time.perf_counter()
    told = [pool.submit(ask_often, port, request, asks // CLIENTS, 32 // CLIENTS) for _ in range(CLIENTS)]
    for one in told:
        one.result()
    wall_s = time.perf_counter() - began_s
    after = [process.cpu_times() for process in processes]
    cpu_s = sum(a.user + a.system - b.user - b.system for a, b in zip(after, before, strict=True))
    return asks / wall_s, cpu_s / asks * 1e6


def bench() -> list[Figure]:
    """Hits a second and CPU of a hit."""
    with (
        tempfile.TemporaryDirectory() as folder, served(Path(folder) / "one", 1) as one,
        served(Path(folder) / "two", 2) as two, ProcessPoolExecutor(CLIENTS, mp_context=get_context("spawn")) as pool,
    ):
        found: dict[int, list[tuple[float, float]]] = {1: [], 2: []}
        for processes, port, key in (one, two):
            hits(pool, processes, port, said(key), WARM)
        for _ in range(TURNS):
            for processes, port, key in (one, two):
                found[len(processes)].append(hits(pool, processes, port, said(key), ASKS))
    rates = {n: [rate for rate, _ in each] for n, each in found.items()}
    cpu = {n: median(us for _, us in each) for n, each in found.items()}
    print(f"hits a second {({n: [round(r) for r in each] for n, each in rates.items()})}", file=sys.stderr, flush=True)
    return [
        Figure(median(rates[2]), "exact hits a second, two ingress processes", "one", median(rates[1])),
        Figure(cpu[2], "us CPU an exact hit, two ingress processes", "one", cpu[1]),
    ]

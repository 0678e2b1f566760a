"""What a cached answer costs the ingress, against the least that HTTP can cost here.

One engine (fake model), one question that it has answered, asked again and again over 32 kept connections; in turns
with it ``peers/echo.py``, uvicorn with an application that returns the body. Both have the client's bytes alike. CPU is
the ingress process's own, by the operating system; the engine writes its journal and its ledger meanwhile.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from statistics import median

import psutil

from engine.model.folder import cache_dir
from tests.bench.figure import Figure
from tests.bench.http_line import ask_each, ask_often
from tests.waiting import until

ROOT = Path(__file__).parents[2]
LITELLM = cache_dir() / "peers" / "litellm" / "bin" / "litellm"
TURNS, ASKS, WARM = 5, 10_000, 2_000
SETS = (
    "limiter.enabled=false", "semantic.enabled=false", "exact.ttl_s=3600", "model.fake_speed=inf",
)
TEXT = "is my coupon still good for the blue kettle?"
QUESTION: dict[str, object] = {"model": "default", "messages": [{"role": "user", "content": TEXT}]}


@contextmanager
def engine(folder: str, *sets: str) -> Iterator[tuple[psutil.Process, int, str]]:
    """``doorbuster serve`` with its own command line: process, port, key."""
    options = [part for item in (*SETS, *sets) for part in ("--set", item)]
    command = [
        sys.executable, "-m", "sim.cli", "serve", "flash-sale", "--model", "fake", "--port", "0", "--json",
        "--folder", folder, *options,
    ]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        ready = json.loads(process.stdout.readline())
        try:
            yield psutil.Process(process.pid), int(ready["url"].rpartition(":")[2]), ready["api_key"]
        finally:
            process.terminate()
            process.wait(60)


@contextmanager
def echo() -> Iterator[tuple[psutil.Process, int]]:
    """The floor: process and port."""
    command = [sys.executable, "-m", "tests.bench.peers.echo"]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        try:
            yield psutil.Process(process.pid), int(process.stdout.readline())
        finally:
            process.stdin.close()
            process.wait(60)


def said(key: str, question: dict[str, object] = QUESTION, traffic_class: str = "checkout_help") -> bytes:
    """A request as the official client would send it, more or less."""
    data = json.dumps(question).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer {key}\r\naccept: */*\r\n"
        f"content-type: application/json\r\nx-doorbuster-class: {traffic_class}\r\nuser-agent: bench\r\n"
        f"content-length: {len(data)}\r\n\r\n"
    )
    return head.encode() + data


def cost_us(process: psutil.Process, port: int, request: bytes, times: int) -> tuple[float, list[float]]:
    """CPU of the process for one request, and how long the client waited for each, in seconds."""
    before = process.cpu_times()
    times_s = ask_often(port, request, times)
    after = process.cpu_times()
    return (after.user + after.system - before.user - before.system) / times * 1e6, times_s


def crowd(port: int, key: str) -> None:
    """Until it is ended: questions that nobody has asked, each refused or computed, 24 at a time."""
    numbers = count()

    def another() -> bytes:
        text = f"question number {next(numbers)} about a thing that nobody has asked about before"
        return said(key, {"model": "default", "messages": [{"role": "user", "content": text}]}, "product_qa")

    ask_each(port, another, 10**9, 24, strict=False)


def saturated_ms(asks: int = 4_000) -> tuple[float, float]:
    """p50 and p99 of hits over four connections while the fake model, at the pace of SmolLM2 here, has a full queue."""
    sets = ("model.fake_speed=1.0", "overload.enabled=false")
    with tempfile.TemporaryDirectory() as folder, engine(folder, *sets) as (_, port, key):
        request = said(key)
        ask_often(port, request, 200, 1)
        others = multiprocessing.get_context("spawn").Process(target=crowd, args=(port, key), daemon=True)
        others.start()
        ask_often(port, request, asks // 4, 4)
        waits = sorted(ask_often(port, request, asks, 4))
        assert others.is_alive()
        others.terminate()
        others.join()
    return waits[len(waits) // 2] * 1e3, waits[len(waits) * 99 // 100] * 1e3


@contextmanager
def litellm(folder: str, upstream: int, key: str) -> Iterator[tuple[psutil.Process, int]]:
    """LiteLLM's proxy with its cache in memory, before our engine; one key, no database, one worker: process, port."""
    config = Path(folder) / "litellm.yaml"
    config.write_text(json.dumps({
        "model_list": [{"model_name": "default", "litellm_params": {
            "model": "openai/default", "api_base": f"http://127.0.0.1:{upstream}/v1", "api_key": key,
        }}],
        "litellm_settings": {"cache": True, "cache_params": {"type": "local"}, "telemetry": False},
    }))  # JSON is YAML
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(LITELLM), "--config", str(config), "--host", "127.0.0.1", "--port", str(port)]
    environment = dict(os.environ, LITELLM_LOCAL_MODEL_COST_MAP="True", LITELLM_MASTER_KEY=f"sk-{key}", NO_PROXY="*")
    with (
        (Path(folder) / "litellm.log").open("w") as log,
        subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log) as process,
    ):
        try:
            until(lambda: _listens(port), "LiteLLM is there", 120)
            yield psutil.Process(process.pid), port
        finally:
            process.kill()


def _listens(port: int) -> bool:
    with socket.socket() as line:
        return line.connect_ex(("127.0.0.1", port)) == 0


def peer() -> Iterator[Figure]:
    """Hits of LiteLLM's proxy and ours in turns: CPU of the proxy's process, and answers a second."""
    if not LITELLM.exists():
        print("LiteLLM is not here: make bench-peers brings it", file=sys.stderr, flush=True)
        return
    with (
        tempfile.TemporaryDirectory() as folder, engine(str(Path(folder) / "run")) as (ours, port, key),
        litellm(folder, port, key) as (its, its_port),
    ):
        request, its_request = said(key), said(f"sk-{key}")
        cost_us(its, its_port, its_request, 50)
        cost_us(ours, port, request, 50)
        mine, theirs = [], []
        for _ in range(3):
            theirs.append(_rate(its, its_port, its_request, 300))
            mine.append(_rate(ours, port, request, ASKS))
        time.sleep(1)  # its ledger is flushed five times a second
        heard = (Path(folder) / "run" / "ledger" / "records.ndjson").read_bytes().count(b"\n")
        if heard > 3 * ASKS + 2 * 50:
            raise RuntimeError(f"{heard - 3 * ASKS - 50} of LiteLLM's answers were none of its cache's")
    print(f"CPU us and answers a second: ours {mine}, LiteLLM {theirs}", file=sys.stderr, flush=True)
    for what, at in (("us CPU an exact hit", 0), ("exact hits a second", 1)):
        yield Figure(median(m[at] for m in mine), what, "LiteLLM's proxy, in memory", median(t[at] for t in theirs))


def _rate(process: psutil.Process, port: int, request: bytes, times: int) -> tuple[int, int]:
    began_s = time.perf_counter()
    us, _ = cost_us(process, port, request, times)
    return round(us), round(times / (time.perf_counter() - began_s))


def bench() -> list[Figure]:
    """CPU of a hit, p99 of its answer, and the same while the model has more to do than it can."""
    with tempfile.TemporaryDirectory() as folder, engine(folder) as (ours, port, key), echo() as (floor, floor_port):
        request = said(key)
        cost_us(ours, port, request, WARM)
        cost_us(floor, floor_port, request, WARM)
        mine, its, waits = [], [], []
        for _ in range(TURNS):
            its.append(cost_us(floor, floor_port, request, ASKS)[0])
            cpu, times_s = cost_us(ours, port, request, ASKS)
            mine.append(cpu)
            waits += times_s
        waits.sort()
    ratio = median(a / b for a, b in zip(mine, its, strict=True))
    print(f"hit {[round(us) for us in mine]} us CPU, echo {[round(us) for us in its]} us; ratio {ratio:.2f}; "
          f"answer p50 / p99 {waits[len(waits) // 2] * 1e3:.2f} / {waits[len(waits) * 99 // 100] * 1e3:.2f} ms",
          file=sys.stderr, flush=True)
    p50_ms, p99_ms = saturated_ms()
    print(f"hits while the model is saturated: p50 / p99 {p50_ms:.2f} / {p99_ms:.2f} ms", file=sys.stderr, flush=True)
    return [
        Figure(median(mine), "us CPU an exact hit over HTTP", "uvicorn raw-ASGI echo", median(its)),
        Figure(waits[len(waits) * 99 // 100] * 1e3, "ms an exact hit, p99, 32 connections", "promised", 10.0),
        Figure(p99_ms, "ms an exact hit, p99, while the model is saturated", "promised", 10.0),
        *peer(),
    ]

"""A crowd of connections from a process of its own: thousands of streams that are read to their end, or that idle.

    python -m tests.drill.crowd {streams|idle|loris} PORT KEY COUNT WORDS

Prints ``open`` when all are there (streams: when each has had its first event, and one more second), and at the end one
JSON line. Idle ones end with its stdin. Addresses 127.0.0.2 to .9 take turns, so that ports suffice.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import Counter
from functools import partial
from typing import Any

import uvloop

WORDS = ("shoe", "hat", "cup", "lid", "bag", "pen", "box", "mug", "toy", "lamp", "desk", "sofa", "ring", "coat", "belt")
AT_ONCE = 200  # connections that are being opened
PATIENCE_S = 500.0


def question(number: int) -> str:
    """What stream ``number`` asks."""
    return f"n{number}"


def answer(number: int, words: int) -> str:
    """What the fake model's table says to that: words in an order of its own."""
    return " ".join([f"n{number}", *(WORDS[(number * 7 + at * at) % len(WORDS)] for at in range(words))])


class Stream(asyncio.Protocol):
    """One stream, read as it comes."""

    def __init__(self, request: bytes, first: asyncio.Future[None], over: asyncio.Future[None]) -> None:
        self._request, self._first, self.over = request, first, over
        self.heard: list[bytes] = []
        self.times_s: list[float] = []

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self.heard.append(data)
        self.times_s.append(time.monotonic())
        if not self._first.done():
            self._first.set_result(None)
        if data.endswith(b"0\r\n\r\n"):
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        for future in (self._first, self.over):
            if not future.done():
                future.set_result(None)

    def text(self) -> tuple[str, bool]:
        """What came, and whether the last word was there."""
        raw = b"".join(self.heard)
        lines = [line[6:] for line in raw.split(b"\n") if line.startswith(b"data: {")]
        choices = [choice for line in lines for choice in json.loads(line).get("choices", [])]
        return "".join(c["delta"].get("content") or "" for c in choices), b"data: [DONE]" in raw


async def dial(port: int, number: int, factory: Any, gate: asyncio.Semaphore) -> Any:
    """One connection, from one of eight addresses."""
    async with gate:
        loop = asyncio.get_running_loop()
        _, made = await loop.create_connection(
            factory, "127.0.0.1", port, local_addr=(f"127.0.0.{2 + number % 8}", 0)
        )
        return made


async def streams(port: int, key: str, count: int, words: int) -> dict[str, object]:
    """All at once, each to its end."""
    loop, gate = asyncio.get_running_loop(), asyncio.Semaphore(AT_ONCE)
    firsts, tasks = [], []
    for number in range(count):
        ask = {"model": "default", "messages": [{"role": "user", "content": question(number)}], "stream": True}
        data = json.dumps(ask).encode()
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\n"
            f"x-doorbuster-class: crowd\r\ncontent-length: {len(data)}\r\n\r\n"
        )
        first = loop.create_future()
        firsts.append(first)
        tasks.append(dial(port, number, partial(Stream, head.encode() + data, first, loop.create_future()), gate))
    began_s = time.monotonic()
    made = await asyncio.gather(*tasks)
    connected_s = time.monotonic() - began_s
    await asyncio.gather(*firsts)
    opened_s = time.monotonic() - began_s
    await asyncio.sleep(1)
    print("open", flush=True)
    async with asyncio.timeout(PATIENCE_S):
        await asyncio.gather(*(stream.over for stream in made))
    gaps_s = sorted(b - a for s in made for a, b in zip(s.times_s, s.times_s[1:], strict=False))
    ends: Counter[str] = Counter()
    for number, stream in enumerate(made):
        text, whole = stream.text()
        good = whole and text == answer(number, words)
        ends["whole" if good else "garbled" if whole else "dropped"] += 1
    bad = next((stream for n, stream in enumerate(made) if stream.text()[0] != answer(n, words)), None)
    together_s = min(s.times_s[-1] for s in made) - max(s.times_s[0] for s in made)
    return {
        "ends": dict(ends), "events": len(gaps_s) + len(made), "connected s": round(connected_s, 2),
        "all had a first event s": round(opened_s, 2), "streams s": round(time.monotonic() - began_s, 1),
        "all together s": round(together_s, 1),
        "gap p50 s": _at(gaps_s, 0.5), "gap p99 s": _at(gaps_s, 0.99), "gap max s": _at(gaps_s, 1.0),
        "first bad": b"".join(bad.heard)[:600].decode() if bad else "",
    }


async def idle(port: int, count: int) -> dict[str, object]:
    """Each has asked for its health once, and stays."""
    gate = asyncio.Semaphore(AT_ONCE)

    async def one(number: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        async with gate:
            reader, writer = await asyncio.open_connection(
                "127.0.0.1", port, local_addr=(f"127.0.0.{2 + number % 8}", 0), limit=4096
            )
            writer.write(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n")
            await reader.readuntil(b'"alive"}')
            return reader, writer

    made = await asyncio.gather(*map(one, range(count)))
    print("open", flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    closed = sum(reader.at_eof() for reader, _ in made)
    for _, writer in made:
        writer.close()
    return {"idle": count, "closed by the server": closed}


async def loris(port: int, count: int) -> dict[str, object]:
    """Each sends a byte of a header a second, until the server has had enough."""
    gate = asyncio.Semaphore(AT_ONCE)

    async def one(number: int) -> tuple[bytes, float]:
        async with gate:
            reader, writer = await asyncio.open_connection(
                "127.0.0.1", port, local_addr=(f"127.0.0.{2 + number % 8}", 0), limit=4096
            )
        began_s = time.monotonic()
        writer.write(b"GET /healthz HTTP/1.1\r\nhost: x\r\nx-a: ")
        listening = asyncio.ensure_future(reader.read())
        while not listening.done():
            writer.write(b"a")
            await asyncio.wait([listening], timeout=1.0)
        took_s = time.monotonic() - began_s
        writer.close()
        return listening.result(), took_s

    tasks = [asyncio.ensure_future(one(number)) for number in range(count)]
    await asyncio.sleep(3)
    print("open", flush=True)
    async with asyncio.timeout(PATIENCE_S):
        heard = await asyncio.gather(*tasks)
    times_s = sorted(took_s for _, took_s in heard)
    return {
        "408": sum(said.startswith(b"HTTP/1.1 408") for said, _ in heard), "of": count,
        "first closed s": _at(times_s, 0.0), "last closed s": _at(times_s, 1.0),
    }


def _at(values: list[float], share: float) -> float:
    return round(values[min(len(values) - 1, int(share * len(values)))], 3) if values else 0.0


def main() -> None:
    """See above."""
    what, port, key, count, words = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
    if what == "streams":
        found = uvloop.run(streams(port, key, count, words))
    else:
        found = uvloop.run(idle(port, count) if what == "idle" else loris(port, count))
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()

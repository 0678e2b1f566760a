"""The replica's end of its connections: one to whoever started it, and one to each gateway that shares it.

A gateway says who it is with ``Hello``; from then on it hears of its own submissions, and of all that concerns no
submission. Who hangs up has its submissions aborted: their slots and blocks are for those who are still there. Whoever
is alone and never said ``Hello`` owns the replica and hears everything.
"""

from __future__ import annotations

import contextlib
import selectors
import socket

from engine.events import Abort, Ended
from engine.model.sharing import Board, part_of
from engine.model.wire import Hello, Output, ToReplica, Unframer, Work, decode_to_replica, frame

ORPHAN_CHECK_S = 1.0  # how often one that nobody has connected to looks whether somebody still can
SEND_TIMEOUT_S = 1.0  # one of several gateways that reads nothing is hung up on: it must not hold up the others


class Endpoint:
    """Gateways' connections, read without waiting and written whole."""

    def __init__(self, path: str) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._unframers: dict[socket.socket, Unframer] = {}
        self._gateways: dict[int, socket.socket] = {}  # by index: those that said Hello
        self._open: dict[socket.socket, dict[int, None]] = {}  # submissions that have not ended, by who waits for them
        self._board = Board()
        self._pending: list[ToReplica] = []
        self.greeting = b""
        self.deserted = False

    @property
    def alone(self) -> bool:
        """Nobody is connected."""
        return not self._unframers

    def waits(self) -> bool:
        """Has anybody said something?"""
        self._read(0)
        return bool(self._pending)

    def take(self, idle: bool) -> list[ToReplica]:
        """All messages so far; with ``idle`` sleeps until there is one, but not for ever while nobody is there."""
        sleep_s = ORPHAN_CHECK_S if self.alone else None
        self._read(sleep_s if idle and not self._pending else 0)
        out, self._pending = self._pending, []
        return out

    def send(self, output: Output) -> None:
        """To each gateway what is its own, and what concerns no submission.

        Who waits for a submission hears something at every turn, if only that it lasts: silence is a hang.
        """
        self._board.post(output)
        for mine in self._open.values():
            for event in output.events:
                if isinstance(event, Ended):
                    mine.pop(event.sid, None)
        if not self._gateways:
            for connection in list(self._unframers):
                self._write(connection, frame(output))
        for gateway, connection in list(self._gateways.items()):
            part = part_of(output, gateway)
            if part.events or part.tokens or self._open.get(connection):
                self._write(connection, frame(part))

    def _read(self, timeout: float | None) -> None:
        for key, _ in self._selector.select(timeout):
            if key.fileobj is self._listener:
                connection, _ = self._listener.accept()
                self._unframers[connection], self._open[connection] = Unframer(), {}
                self._selector.register(connection, selectors.EVENT_READ)
                self._write(connection, self.greeting)
            elif key.fileobj in self._unframers:
                self._hear(key.fileobj)  # type: ignore[arg-type]

    def _hear(self, connection: socket.socket) -> None:
        data = b""
        with contextlib.suppress(OSError):
            data = connection.recv(1 << 20)
        if not data:
            self._hang_up(connection)
            return
        for raw in self._unframers[connection].feed(data):
            message = decode_to_replica(raw)
            if isinstance(message, Hello):
                connection.settimeout(SEND_TIMEOUT_S)
                self._gateways[message.gateway] = connection
                self._write(connection, frame(self._board.read(message.gateway)))
                continue
            if isinstance(message, Work):
                self._open[connection][message.submit.sid] = None
            self._pending.append(message)

    def _write(self, connection: socket.socket, data: bytes) -> None:
        try:
            connection.sendall(data)
        except TimeoutError:
            self._hang_up(connection)
        except OSError:
            pass  # its hang-up is read next

    def _hang_up(self, connection: socket.socket) -> None:
        if self._unframers.pop(connection, None) is None:
            return
        self._selector.unregister(connection)
        self._pending += map(Abort, self._open.pop(connection))
        self._gateways = {gateway: c for gateway, c in self._gateways.items() if c is not connection}
        connection.close()
        self.deserted = not self._unframers

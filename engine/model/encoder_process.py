"""The encoder as a process: texts in, vectors out, over a local socket. Stateless; one serves every gateway of a host.

``python -m engine.model.encoder_process``; its spec comes as msgpack on stdin. A plain loop takes what is there, up to
``max_batch`` and no more than its askers have time for (``batch_size.py``), encodes, answers. The newest first: when it
cannot keep up, the oldest are about to be late anyway, and those whose deadline has passed are skipped. Ends when its
last client has hung up; Ctrl-C is the gateway's business.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: see process.py

import contextlib
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable

import msgspec

from engine.errors import UserError
from engine.model.batch_size import BatchSize
from engine.model.wire import LENGTH, Unframer

DIMS = 384
MAX_CHARS = 2048  # a text beyond this has no vector, whatever its tokens: the client need not ask
NOBODY_CAME_S = 60.0  # a gateway that died before it connected leaves no orphan
SEND_TIMEOUT_S = 1.0  # a gateway that reads nothing is hung up on: it must not hold up the others


class Drill(msgspec.Struct, frozen=True, gc=False, tag=True):
    """From now on: ``delay_ms`` more for every batch; with ``hang`` no more answers. For failure drills."""

    delay_ms: int = 0
    hang: bool = False


class EncoderSpec(msgspec.Struct, frozen=True):
    """All that an encoder process needs to know."""

    socket_path: str = ""
    threads: int = 1
    cores: tuple[int, ...] = ()  # pinned to these; () = where its parent is
    max_batch: int = 8  # 16 or 32 take hardly less time a text and hold up a newcomer for twice, four times as long
    window_ms: float = 0.0  # wait for company after the first text; 0: what queued during the last batch is company
    drill: Drill = Drill()


class Encode(msgspec.Struct, frozen=True, gc=False, tag=True):
    """A text; worthless after ``deadline_ns`` of the machine's monotonic clock. ``id`` is the connection's own."""

    id: int
    text: str
    deadline_ns: int
    within_ns: int  # from when it was asked to its deadline


class Cancel(msgspec.Struct, frozen=True, gc=False, tag=True):
    """Nobody wants it any more; unknown ids are no-ops."""

    id: int


class Ready(msgspec.Struct, frozen=True, gc=False, tag=True):
    """The weights are there; sent once after connecting."""

    digest: str
    dims: int


class Vector(msgspec.Struct, frozen=True, gc=False, tag=True):
    """fp32, little-endian; empty for a text that has no vector because it is too long."""

    id: int
    vector: bytes


class Skipped(msgspec.Struct, frozen=True, gc=False, tag=True):
    """Not encoded: cancelled, or its deadline had passed when its turn came."""

    id: int


class Failed(msgspec.Struct, frozen=True, gc=False, tag=True):
    """The model raised on its batch."""

    id: int
    why: str


ToEncoder = Encode | Cancel | Drill
FromEncoder = Ready | Vector | Skipped | Failed

_encoder = msgspec.msgpack.Encoder()
_decode = msgspec.msgpack.Decoder(ToEncoder).decode
decode_from_encoder = msgspec.msgpack.Decoder(FromEncoder).decode


def frame(message: ToEncoder | FromEncoder) -> bytes:
    """One message as bytes for the socket."""
    body = _encoder.encode(message)
    return LENGTH.pack(len(body)) + body


class Loop:
    """Connections, what they wait for, and the model as a function. ``encode`` returns one row of bytes a text."""

    def __init__(self, spec: EncoderSpec, encode: Callable[[list[str]], list[bytes]], ready: Ready) -> None:
        self._spec, self._encode, self._ready, self._drill = spec, encode, ready, spec.drill
        self._size = BatchSize(spec.max_batch)
        self._waiting: dict[tuple[socket.socket, int], Encode] = {}  # oldest first
        self._unframers: dict[socket.socket, Unframer] = {}
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(spec.socket_path)
        self._listener.listen()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)

    def run(self) -> None:
        """Until the last client has hung up."""
        self._read(NOBODY_CAME_S)
        while self._unframers:
            self._read(None if self._drill.hang or not self._waiting else 0)
            if self._waiting and not self._drill.hang:
                self._gather()
                self._turn()
        self._selector.close()
        self._listener.close()

    def _gather(self) -> None:
        end = time.monotonic() + self._spec.window_ms / 1e3
        while len(self._waiting) < self._size.next() and (left := end - time.monotonic()) > 0:
            self._read(left)

    def _turn(self) -> None:
        """One batch of the newest that are still worth it."""
        now_ns = time.monotonic_ns()
        for key, ask in [(key, ask) for key, ask in self._waiting.items() if ask.deadline_ns <= now_ns]:
            self._skip(key[0], ask.id)
        batch = [self._waiting.popitem() for _ in range(min(len(self._waiting), self._size.next()))]
        if not batch:
            return
        time.sleep(self._drill.delay_ms / 1e3)
        answers: list[Vector | Failed]
        try:
            vectors = self._encode([ask.text for _, ask in batch])
            answers = [Vector(ask.id, vector) for (_, ask), vector in zip(batch, vectors, strict=True)]
        except Exception as error:  # whatever a text does to a tokenizer: its batch fails, the process stays
            answers = [Failed(ask.id, repr(error)) for _, ask in batch]
        self._size.took(len(batch), time.monotonic_ns() - now_ns)
        for ((connection, _), _), answer in zip(batch, answers, strict=True):
            self._write(connection, answer)

    def _skip(self, connection: socket.socket, id: int) -> None:
        if self._waiting.pop((connection, id), None) is not None:
            self._write(connection, Skipped(id))

    def _read(self, timeout_s: float | None) -> None:
        for key, _ in self._selector.select(timeout_s):
            if key.fileobj is self._listener:
                connection, _ = self._listener.accept()
                connection.settimeout(SEND_TIMEOUT_S)
                self._unframers[connection] = Unframer()
                self._selector.register(connection, selectors.EVENT_READ)
                self._write(connection, self._ready)
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
            message = _decode(raw)
            if isinstance(message, Encode):
                self._waiting[connection, message.id] = message
                if message.deadline_ns > time.monotonic_ns():
                    self._size.asked(message.within_ns)
            elif isinstance(message, Cancel):
                self._skip(connection, message.id)
            else:
                self._drill = message

    def _write(self, connection: socket.socket, message: FromEncoder) -> None:
        try:
            connection.sendall(frame(message))
        except OSError:
            self._hang_up(connection)

    def _hang_up(self, connection: socket.socket) -> None:
        if self._unframers.pop(connection, None) is not None:
            self._selector.unregister(connection)
            self._waiting = {key: ask for key, ask in self._waiting.items() if key[0] is not connection}
            connection.close()


def main() -> None:
    """Spec on stdin; exit code 1 and one clear line on stderr for a user's mistake."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    spec = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=EncoderSpec)
    if spec.cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, spec.cores)
    try:
        from engine.model.embedder import Embedder  # torch: only here, the messages are the client's too

        embedder = Embedder(threads=spec.threads)
    except UserError as error:
        print(error, file=sys.stderr, flush=True)
        sys.exit(1)

    def encode(texts: list[str]) -> list[bytes]:
        return [row.tobytes() if row.any() else b"" for row in embedder.encode(texts)]

    encode(["the first forward is slow"])
    Loop(spec, encode, Ready(embedder.digest, embedder.dims)).run()


if __name__ == "__main__":
    main()

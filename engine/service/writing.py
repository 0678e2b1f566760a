"""One write for all that a connection is given in one turn of the event loop: joining costs less than a system call.

A response's head, its body, a stream's first and last events come in one piece; so do the tokens of one step.
"""

from __future__ import annotations

import asyncio
from typing import Any

MOST_BYTES = 64 * 1024  # more is written at once, so that a client that does not read is noticed


class TickWriter:
    """A transport that writes at the end of the turn. All else goes to the real one."""

    __slots__ = ("_held", "_held_bytes", "_loop", "_transport")

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport, self._loop = transport, loop
        self._held: list[bytes] = []
        self._held_bytes = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """Soon."""
        if not self._held:
            self._loop.call_soon(self.flush)
        self._held.append(data)
        self._held_bytes += len(data)
        if self._held_bytes > MOST_BYTES:
            self.flush()

    def flush(self) -> None:
        """Now."""
        if self._held:
            data = b"".join(self._held) if len(self._held) > 1 else self._held[0]
            self._held.clear()
            self._held_bytes = 0
            if not self._transport.is_closing():
                self._transport.write(data)

    def close(self) -> None:
        """After all that was written."""
        self.flush()
        self._transport.close()

    def write_eof(self) -> None:
        """After all that was written."""
        self.flush()
        self._transport.write_eof()

    def get_write_buffer_size(self) -> int:
        """Bytes that the kernel has not taken yet."""
        return self._held_bytes + self._transport.get_write_buffer_size()

    def is_closing(self) -> bool:
        """Whether nothing more is sent."""
        return self._transport.is_closing()

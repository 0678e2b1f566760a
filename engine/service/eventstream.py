"""Server-sent events from bytes in any portions: the data of each event, as text.

The part of the WHATWG's rules that the OpenAI protocol uses: lines end with CR, LF or both; ``data`` fields of an event
are joined by line feeds; a blank line ends it; comments and other fields are passed over. An event that grows beyond
``MAX_EVENT_BYTES`` is an error, since whoever sends it does not speak this protocol. Knows no JSON.
"""

from __future__ import annotations

import re

MAX_EVENT_BYTES = 1 << 20
LINE_END = re.compile(rb"\r\n|\n|\r(?!\Z)")  # a CR at the very end may be half of a CRLF


class EventStream:
    """One response's events."""

    def __init__(self) -> None:
        self._rest = b""  # of a line
        self._data: list[bytes] = []
        self._size = 0

    def feed(self, raw: bytes) -> list[str]:
        """Events that ``raw`` completes; ValueError for what is no text or no event stream."""
        *lines, self._rest = LINE_END.split(self._rest + raw)
        out: list[str] = []
        for line in lines:
            if not line:
                if self._data:
                    out.append(b"\n".join(self._data).decode())
                self._data, self._size = [], 0
                continue
            name, _, value = line.partition(b":")
            if name == b"data":
                value = value.removeprefix(b" ")
                self._data.append(value)
                self._size += len(value)
        if self._size + len(self._rest) > MAX_EVENT_BYTES:
            raise ValueError(f"an event of more than {MAX_EVENT_BYTES} bytes")
        return out

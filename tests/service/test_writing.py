"""One write a turn: joined in order, never late for a close, never after it, and never kept without measure.

Caught: a close that does not wait for what was said.
"""

from __future__ import annotations

import asyncio
from typing import Any

from engine.service.writing import MOST_BYTES, TickWriter


class Wire:
    """A transport that remembers what reached it, in order."""

    def __init__(self) -> None:
        self.seen: list[Any] = []
        self.closed = False

    def write(self, data: bytes) -> None:
        self.seen.append(data)

    def close(self) -> None:
        self.seen.append("close")
        self.closed = True

    def write_eof(self) -> None:
        self.seen.append("eof")

    def is_closing(self) -> bool:
        return self.closed

    def get_write_buffer_size(self) -> int:
        return 7

    def get_extra_info(self, name: str) -> str:
        return name


def scene(*turns: Any) -> list[Any]:
    """What reaches the wire; each turn of the loop does one thing with the writer."""

    async def run() -> list[Any]:
        wire = Wire()
        writer = TickWriter(wire, asyncio.get_running_loop())  # type: ignore[arg-type]
        for turn in turns:
            turn(writer)
            await asyncio.sleep(0)
        return wire.seen

    return asyncio.run(run())


def say(*pieces: bytes) -> Any:
    return lambda writer: [writer.write(piece) for piece in pieces]


def test_what_is_said_in_one_turn_is_one_write() -> None:
    assert scene(say(b"a", b"b", b"c"), say(b"d"), say(), say(b"e", b"f")) == [b"abc", b"d", b"ef"]


def test_the_end_comes_after_all_that_was_said() -> None:
    assert scene(lambda w: (w.write(b"a"), w.close(), w.write(b"late")), say(b"later")) == [b"a", "close"]
    assert scene(lambda w: (w.write(b"a"), w.write_eof())) == [b"a", "eof"]


def test_much_is_not_held_until_the_end_of_the_turn() -> None:
    big = b"x" * (MOST_BYTES + 1)

    def much(writer: Any) -> None:
        writer.write(b"a")
        assert writer.get_write_buffer_size() == 7 + 1
        writer.write(big)
        assert writer.get_write_buffer_size() == 7
        assert writer.get_extra_info("peername") == "peername"

    assert scene(much, say(b"b")) == [b"a" + big, b"b"]

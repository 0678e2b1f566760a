"""Text on its way: a tape per submission, and one stream per client that reads a tape or a stored answer.

A tape turns tokens into text once, however many clients listen; a follower that attaches late starts at its beginning.
Nothing here decides anything: machines say who attaches to what, and when it is over.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import msgspec

from engine.events import Answer, Reject
from engine.model.tokenizer import Detokenizer


@dataclass(slots=True, eq=False)
class ClientStream:
    """What one client gets to read. ``end`` is set when the machine has spoken its last word on it."""

    rid: int
    request_id: str
    tier: str = "model"
    level: int = 0
    pieces: list[str] = field(default_factory=list)  # not read yet
    output_tokens: int = 0
    cached_tokens: int = 0
    reason: str = "stop"
    started: bool = False
    end: Answer | Reject | None = None
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    def push(self, piece: str, tokens: int) -> None:
        """More text, and how many tokens it took."""
        self.started = True
        self.output_tokens += tokens
        if piece:
            self.pieces.append(piece)
        self._news.set()

    def finish(self, end: Answer | Reject) -> None:
        """Over."""
        self.end = end
        self.level = end.level
        if isinstance(end, Answer):
            self.tier = end.tier
        self._news.set()

    async def wait(self) -> None:
        """Until there is text or an end."""
        await self._news.wait()

    def take(self) -> str:
        """All text that has come since the last call."""
        text = "".join(self.pieces)
        self.pieces.clear()
        if self.end is None:
            self._news.clear()
        return text


class StoredAnswer(msgspec.Struct, frozen=True, gc=False):
    """A finished text, kept under its answer id."""

    text: str
    tokens: int = 0
    reason: str = "stop"


@dataclass(slots=True, eq=False)
class Tape:
    """The text of one submission, as far as it has come."""

    detokenizer: Detokenizer
    text: str = ""
    tokens: int = 0
    reason: str = "stop"
    readers: list[ClientStream] = field(default_factory=list)

    def record(self, ids: list[int]) -> None:
        """New tokens."""
        self._spread(self.detokenizer.push(ids), len(ids))

    def close(self, reason: str, cached_tokens: int) -> None:
        """No more tokens: what was held back for an unfinished character comes out now."""
        self.reason = reason
        if rest := self.detokenizer.flush():
            self._spread(rest, 0)
        for reader in self.readers:
            reader.reason, reader.cached_tokens = reason, cached_tokens

    def attach(self, reader: ClientStream) -> None:
        """From the beginning, and then as it comes."""
        self.readers.append(reader)
        if self.tokens:
            reader.push(self.text, self.tokens)

    def _spread(self, piece: str, tokens: int) -> None:
        self.text += piece
        self.tokens += tokens
        for reader in self.readers:
            reader.push(piece, tokens)

"""Text on its way: a tape per submission, and one stream per client that reads a tape or a stored answer.

A tape turns tokens into text once, however many clients listen; a follower that attaches late starts at its beginning.
Nothing here decides anything: machines say who attaches to what, and when it is over.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import msgspec

from engine.events import Answer, EndReason, Reject
from engine.model.stepping import TokenLogprobs
from engine.model.tokenizer import Detokenizer
from engine.service.stops import StopStrings


class Logged(msgspec.Struct, frozen=True, gc=False):
    """A token of an answer and how likely it was. Tokens are bytes: one may be half a character."""

    token: bytes
    logprob: float
    top: list[tuple[bytes, float]]  # the likeliest tokens in its place
    offset: int  # characters of the answer before it


class Piece(msgspec.Struct, frozen=True, gc=False):
    """Some of an answer. False when there is nothing in it."""

    text: str = ""
    logprobs: tuple[Logged, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.text or self.logprobs)


NOTHING = Piece()


def joined(pieces: Iterable[Piece]) -> Piece:
    """All of them as one."""
    whole = list(pieces)
    return Piece("".join(piece.text for piece in whole), tuple(log for piece in whole for log in piece.logprobs))


@dataclass(slots=True, eq=False)
class ClientStream:
    """What one client gets to read. ``end`` is set when the machine has spoken its last word on it."""

    rid: int
    request_id: str
    tier: str = "model"
    level: int = 0
    pieces: list[Piece] = field(default_factory=list)  # not read yet
    output_tokens: int = 0
    cached_tokens: int = 0
    reason: str = "stop"
    started: bool = False
    end: Answer | Reject | None = None
    _news: asyncio.Event | None = None  # only for who waits: an answer out of a cache is there at once

    def push(self, text: str, tokens: int, logprobs: tuple[Logged, ...] = ()) -> None:
        """More text, and how many tokens it took."""
        self.started = True
        self.output_tokens += tokens
        if text or logprobs:
            self.pieces.append(Piece(text, logprobs))
        if self._news is not None:
            self._news.set()

    def finish(self, end: Answer | Reject) -> None:
        """Over."""
        self.end = end
        self.level = end.level
        if isinstance(end, Answer):
            self.tier = end.tier
        if self._news is not None:
            self._news.set()

    async def wait(self) -> None:
        """Until there is text or an end, or a push of nothing."""
        if self._news is None:
            self._news = asyncio.Event()
            if self.pieces or self.end is not None:
                self._news.set()
        await self._news.wait()

    def take(self) -> Piece:
        """All that has come since the last call."""
        pieces, self.pieces = self.pieces, []
        if self._news is not None and self.end is None:
            self._news.clear()
        return pieces[0] if len(pieces) == 1 else joined(pieces) if pieces else NOTHING


class StoredAnswer(msgspec.Struct, frozen=True, gc=False):
    """A finished text, kept under its answer id."""

    text: str
    tokens: int = 0
    reason: str = "stop"


class Tape:
    """The text of one submission, as far as it has come.

    It ends before the first of ``stops``. Its tokens are then counted up to the one that completed the stop string,
    as vLLM counts; those computed after it, until the replica hears of it, are nobody's.
    """

    def __init__(self, detokenizer: Detokenizer, stops: tuple[str, ...] = ()) -> None:
        self.text, self.tokens = "", 0
        self.reason: EndReason = "stop"
        self.readers: list[ClientStream] = []
        self._detokenizer, self._stops = detokenizer, StopStrings(stops)
        self._guessed = False  # pieces were counted, not tokens
        self._by_token = bool(stops)  # the token that completes a stop string must be known
        self._raw_chars = 0  # of all text that the tokens made, what is held back included
        self._waiting: list[Logged] = []  # for the text that they stand for

    @property
    def cut(self) -> bool:
        """A stop string was met: the text is complete, whatever still comes."""
        return self._stops.hit

    def record(self, ids: list[int], logprobs: Sequence[TokenLogprobs] = ()) -> bool:
        """New tokens, and their log-probabilities where these were asked for. True: the replica can stop now."""
        if self.cut:
            return False
        if not self._by_token and not logprobs:
            self._spread(self._detokenizer.push(ids), len(ids))
            return False
        for at, token in enumerate(ids):
            if logprobs:
                self._waiting.append(self._logged(token, logprobs[at]))
            raw = self._detokenizer.push([token])
            self._raw_chars += len(raw)
            self._spread(self._stops.push(raw), 1)
            if self.cut:
                return True
        return False

    def record_text(self, text: str) -> bool:
        """A piece without its tokens; it is taken for one until the end says how many there were."""
        if self.cut:
            return False
        self._guessed = True
        self._spread(self._stops.push(text), 1)
        return self.cut

    def close(self, reason: EndReason, cached_tokens: int, output_tokens: int = 0) -> None:
        """No more tokens: what was held back, for an unfinished character or a stop string, comes out now.

        ``output_tokens``: how many there were, 0 = as many as were recorded.
        """
        rest = "" if self.cut else self._stops.push(self._detokenizer.flush())
        rest += self._stops.flush()
        self.reason = "stop" if self.cut else reason
        more = output_tokens - self.tokens if self._guessed and output_tokens and not self.cut else 0
        self._spread(rest, more, last=not self.cut)
        for reader in self.readers:
            reader.reason, reader.cached_tokens = self.reason, cached_tokens

    def attach(self, reader: ClientStream) -> None:
        """From the beginning, and then as it comes."""
        self.readers.append(reader)
        if self.tokens:
            reader.push(self.text, self.tokens)

    def _logged(self, token: int, said: TokenLogprobs) -> Logged:
        spell = self._detokenizer.tokenizer.token_bytes
        return Logged(spell(token), said.logprob, [(spell(other), log) for other, log in said.top], self._raw_chars)

    def _spread(self, text: str, tokens: int, last: bool = False) -> None:
        self.text += text
        self.tokens += tokens
        known = tuple(log for log in self._waiting if last or log.offset < len(self.text))
        del self._waiting[: len(known)]
        if text or tokens or known:
            for reader in self.readers:
                reader.push(text, tokens, known)

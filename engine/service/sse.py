"""An answer on its way to one client: piece by piece as server-sent events, or read to its end and sent whole.

A ``Listener`` reads the stream and the client's side of the connection at once: whoever hangs up, before the first
token or after, streaming or not, is noticed. Knows no routes, keys or policies; the format is OpenAI's over WHATWG's
event streams.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from msgspec import UNSET, UnsetType

from engine.errors import RequestError
from engine.events import Reject
from engine.service.openai import (
    AnswerMessage,
    ChatLogprobs,
    Choice,
    Chunk,
    ChunkChoice,
    Completion,
    Delta,
    TokenLogprob,
    TopLogprob,
    Usage,
    encode_json,
    error_object,
    finite,
    spelt,
    usage_of,
)
from engine.service.stream import ClientStream, Logged, Piece

Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

DONE = b"data: [DONE]\n\n"


def event(value: object) -> bytes:
    """One server-sent event."""
    return b"data: " + encode_json(value) + b"\n\n"


class Listener:
    """One client and what it is read from. Leave it, however you leave, and the request is over and no task is left."""

    def __init__(self, stream: ClientStream, receive: Receive, cancel: Callable[[int], None]) -> None:
        """``receive`` has given the whole body; ``cancel`` takes the stream's rid, and knows when it is too late."""
        self.stream, self._receive, self._cancel = stream, receive, cancel
        self.gone = False
        self._watch: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Listener:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._cancel(self.stream.rid)
        if self._watch is not None and not self._watch.done():
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)

    async def read(self) -> Piece:
        """All that is there, or the next that comes; an empty one when it is over, or nobody is left to read it."""
        while True:
            piece = self.stream.take()
            if self.gone:
                return Piece()
            if piece or self.stream.end is not None:
                return piece
            if self._watch is None:  # an answer out of a cache is never waited for
                self._watch = asyncio.create_task(self._until_gone())
            await self.stream.wait()

    async def _until_gone(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.gone = True
        self.stream.push("", 0)  # wakes the reader


class Wording:
    """Puts one answer into OpenAI's words: a chat completion's here, those of other endpoints in subclasses."""

    prefix = "chatcmpl-"  # of an answer's id

    def __init__(self, answer_id: str, created: int, model: str, prompt_tokens: int, usage_in_chunks: bool) -> None:
        self.id, self.created, self.model = answer_id, created, model
        self._prompt_tokens, self._usage_in_chunks = prompt_tokens, usage_in_chunks

    def whole(self, piece: Piece, stream: ClientStream) -> bytes:
        """The completion object."""
        choice = Choice(AnswerMessage(piece.text), stream.reason, logprobs=logprobs_in(piece))
        return encode_json(Completion(self.id, self.created, self.model, (choice,), self.usage(stream)))

    def first(self, piece: Piece) -> bytes:
        """The role, and the text that is there already."""
        role = self._event(ChunkChoice(Delta(role="assistant", content="")))
        return role + self.more(piece) if piece else role

    def more(self, piece: Piece) -> bytes:
        """More text."""
        return self._event(self.choice(piece))

    def last(self, stream: ClientStream) -> bytes:
        """Why it ended, what it took, and the end of the stream."""
        out = self._event(self.choice(Piece(), stream.reason))
        if self._usage_in_chunks:
            out += event(self.chunk((), self.usage(stream)))
        return out + DONE

    def choice(self, piece: Piece, reason: str | None = None) -> Any:
        """A choice of a chunk: more text, or why there is no more."""
        delta = Delta(content=piece.text) if piece.text else Delta()
        return ChunkChoice(delta, reason, logprobs=logprobs_in(piece))

    def chunk(self, choices: tuple[Any, ...], usage: Usage | UnsetType | None) -> object:
        """One event's object."""
        return Chunk(self.id, self.created, self.model, choices, usage)

    def usage(self, stream: ClientStream) -> Usage:
        """Model tokens of the whole answer."""
        return usage_of(self._prompt_tokens, stream.output_tokens, stream.cached_tokens)

    def _event(self, choice: object) -> bytes:
        return event(self.chunk((choice,), None if self._usage_in_chunks else UNSET))


def logprobs_in(piece: Piece) -> ChatLogprobs | UnsetType:
    """In chat's words; absent where nobody asked, and in an answer that no model computed."""
    return ChatLogprobs(tuple(map(token_logprob, piece.logprobs))) if piece.logprobs else UNSET


def token_logprob(log: Logged) -> TokenLogprob:
    """One token."""
    top = tuple(TopLogprob(spelt(token), finite(logprob), list(token)) for token, logprob in log.top)
    return TokenLogprob(spelt(log.token), finite(log.logprob), list(log.token), top)


async def send_stream(
    send: Send, listener: Listener, piece: Piece, words: Wording, refusal: Callable[[Reject], RequestError]
) -> None:
    """The body of a response whose start is sent; ``piece`` was read already. A refusal that comes now is an event."""

    async def body(data: bytes, more: bool = True) -> None:
        await send({"type": "http.response.body", "body": data, "more_body": more})

    stream = listener.stream
    await body(words.first(piece))
    while piece and (piece := await listener.read()):
        await body(words.more(piece))
    if listener.gone:
        return
    if isinstance(stream.end, Reject):
        await body(event(error_object(refusal(stream.end))), more=False)
    else:
        await body(words.last(stream), more=False)

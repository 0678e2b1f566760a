"""What is said to an upstream, and what of its answer matters here: requests to bodies, events to text and an end.

Only what every OpenAI-compatible server takes is sent, and the answer is read leniently: fields that nobody asked for
are passed over, since each server adds its own. Knows no HTTP.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from engine.model.wire import Work

DONE = "[DONE]"


class Delta(msgspec.Struct, frozen=True, gc=False):
    """A piece of a chat answer."""

    content: str | None = None


class Choice(msgspec.Struct, frozen=True, gc=False):
    """``delta`` in a chat, ``text`` in a completion."""

    delta: Delta = Delta()
    text: str | None = None
    finish_reason: str | None = None


class PromptDetails(msgspec.Struct, frozen=True, gc=False):
    """Of the prompt's tokens."""

    cached_tokens: int | None = None


class Usage(msgspec.Struct, frozen=True, gc=False):
    """Stands in the last event, or in one after it."""

    completion_tokens: int = 0
    prompt_tokens_details: PromptDetails | None = None


class Chunk(msgspec.Struct, frozen=True, gc=False):
    """One event. ``error``: it went wrong after the stream had begun."""

    choices: list[Choice] = []
    usage: Usage | None = None
    error: msgspec.Raw = msgspec.Raw()


class ModelName(msgspec.Struct, frozen=True, gc=False):
    """One of a list of models."""

    id: str


class Models(msgspec.Struct, frozen=True, gc=False):
    """``/v1/models``."""

    data: list[ModelName] = []


class Answered(msgspec.Struct, frozen=True, gc=False):
    """How an answer ended."""

    reason: Literal["stop", "length"]
    output_tokens: int  # as the upstream counts; without a word from it the pieces of text
    cached_tokens: int = 0


decode_chunk = msgspec.json.Decoder(Chunk).decode
decode_models = msgspec.json.Decoder(Models).decode
_encode = msgspec.json.Encoder().encode


def request_of(work: Work, model: str) -> tuple[str, bytes]:
    """Path below ``/v1`` and body. Greedy is said as a temperature of 0; a seed only where something is drawn."""
    params = work.params
    body: dict[str, object] = {
        "model": model, "stream": True, "stream_options": {"include_usage": True},
        "max_tokens": work.submit.max_tokens, "temperature": params.temperature,
    }
    if params.temperature:
        body |= {"top_p": params.top_p, "seed": params.seed}
        if params.top_k:
            body["top_k"] = params.top_k
    if params.stop:
        body["stop"] = list(params.stop)
    if isinstance(work.said, str):
        return "/completions", _encode(body | {"prompt": work.said})
    return "/chat/completions", _encode(body | {"messages": work.said})


class Broken(Exception):
    """What came is no answer."""


class Answer:
    """One answer as its events come. ``take`` gives their text; ``end`` is there when all was said."""

    def __init__(self) -> None:
        self.done = False  # no event will follow
        self._finish: str | None = None
        self._pieces = 0
        self._usage: Usage | None = None

    def take(self, data: str) -> str:
        """Text of one event; Broken when it is an error, or no event of this protocol."""
        if data == DONE:
            self.done = True
            return ""
        try:
            chunk = decode_chunk(data.encode())
        except msgspec.DecodeError as error:
            raise Broken(f"not an event of a completion: {error}") from None
        if bytes(chunk.error) not in (b"", b"null"):
            raise Broken(f"it says: {bytes(chunk.error)[:200].decode(errors='replace')}")
        self._usage = chunk.usage or self._usage
        text = ""
        for choice in chunk.choices[:1]:
            text = choice.delta.content or choice.text or ""
            self._finish = choice.finish_reason or self._finish
        self._pieces += bool(text)
        return text

    def end(self) -> Answered:
        """No more events. Broken when it stopped in the middle."""
        if self._finish is None:
            raise Broken("the answer stopped in the middle")
        usage = self._usage or Usage(self._pieces)
        cached = usage.prompt_tokens_details and usage.prompt_tokens_details.cached_tokens
        return Answered("length" if self._finish == "length" else "stop", usage.completion_tokens, cached or 0)

"""The wire types of ``/v1/completions`` and ``/v1/embeddings``: bodies to requests, results to OpenAI's words.

Strict like ``openai.py``. One prompt a request: a list may hold one string, and token ids are refused. Answers stream
as whole ``text_completion`` objects, as OpenAI's do. Vectors go out as JSON numbers, or as base64 of little-endian
float32: the official client asks for that unless told otherwise. Knows no HTTP, and an encoder by its face only.
Source: the OpenAI API reference, "Create completion" and "Create embeddings".
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Iterable
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from msgspec import UNSET, Meta, UnsetType

from engine.errors import RequestError
from engine.service.driver import Encoder
from engine.service.openai import (
    Sampled,
    Usage,
    check_stream_options,
    decode_body,
    encode_json,
    refuse_unsupported,
)
from engine.service.similar import Done, Word
from engine.service.sse import Wording
from engine.service.stream import ClientStream

MAX_INPUTS = 256  # texts in one embedding request: the encoder serves the gateway's own lookups too

Text = Annotated[str, Meta(min_length=1)]
Told = asyncio.Future[tuple[np.ndarray | None, Word]]

NEUTRAL: dict[str, tuple[object, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "stop": ([],),
    "logprobs": (),  # 0 asks for those of the chosen tokens
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
}  # see ``openai.NEUTRAL``


class CompletionRequest(Sampled, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The body of a request; ``decode_completion`` makes it."""

    prompt: Text | Annotated[list[Text], Meta(min_length=1, max_length=1)]
    n: Any = None
    best_of: Any = None
    echo: Any = None
    suffix: Any = None
    stop: Any = None
    logprobs: Any = None
    logit_bias: Any = None
    presence_penalty: Any = None
    frequency_penalty: Any = None

    @property
    def text(self) -> str:
        """The one prompt."""
        return self.prompt if isinstance(self.prompt, str) else self.prompt[0]


class TextChoice(msgspec.Struct, frozen=True, gc=False):
    """The one answer, or a piece of it."""

    text: str
    finish_reason: str | None = None
    logprobs: None = None
    index: int = 0


class TextCompletion(msgspec.Struct, frozen=True, gc=False):
    """A whole answer, or one event of a stream; ``usage`` as in ``openai.Chunk``."""

    id: str
    created: int
    model: str
    choices: tuple[TextChoice, ...]
    usage: Usage | UnsetType | None = UNSET
    object: str = "text_completion"


class TextWording(Wording):
    """A completion's words."""

    prefix = "cmpl-"

    def whole(self, text: str, stream: ClientStream) -> bytes:
        """The completion object."""
        return encode_json(self.chunk((self.piece(text, stream.reason),), self.usage(stream)))

    def first(self, text: str) -> bytes:
        """The text that is there already, if any: there is no role to tell."""
        return self.more(text) if text else b""

    def piece(self, text: str, reason: str | None = None) -> TextChoice:
        """More text, or why there is no more."""
        return TextChoice(text, reason)

    def chunk(self, choices: tuple[TextChoice, ...], usage: Usage | UnsetType | None) -> TextCompletion:
        """One event's object."""
        return TextCompletion(self.id, self.created, self.model, choices, usage)


class EmbeddingRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The body of a request; ``decode_embedding`` makes it."""

    model: str
    input: Text | Annotated[list[Text], Meta(min_length=1, max_length=MAX_INPUTS)]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Any = None
    user: str | None = None

    @property
    def texts(self) -> list[str]:
        """All of them, in order."""
        return [self.input] if isinstance(self.input, str) else self.input


class Embedding(msgspec.Struct, frozen=True, gc=False):
    """One text's vector."""

    embedding: list[float] | str
    index: int
    object: str = "embedding"


class EmbeddingUsage(msgspec.Struct, frozen=True, gc=False):
    """Tokens of all texts."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingList(msgspec.Struct, frozen=True, gc=False):
    """All vectors, in the order of the texts."""

    data: tuple[Embedding, ...]
    model: str
    usage: EmbeddingUsage
    object: str = "list"


_completion = msgspec.json.Decoder(CompletionRequest).decode
_embedding = msgspec.json.Decoder(EmbeddingRequest).decode


def decode_completion(body: bytes) -> CompletionRequest:
    """Bytes to a request that can be honoured in full; RequestError "invalid_request" names what cannot."""
    ask = decode_body(_completion, body)
    refuse_unsupported(ask, NEUTRAL)
    check_stream_options(ask)
    return ask


def decode_embedding(body: bytes) -> EmbeddingRequest:
    """The same for texts to encode."""
    ask = decode_body(_embedding, body)
    if ask.dimensions is not None:
        raise RequestError("invalid_request", "dimensions is not supported here: leave it out", "dimensions")
    return ask


async def vectors_of(encoder: Encoder, texts: list[tuple[bytes, str]], within_s: float) -> list[np.ndarray]:
    """One a text, all or none; ``texts`` are pairs of digest and text. RequestError says why none."""
    loop = asyncio.get_running_loop()
    waits: list[Told] = [loop.create_future() for _ in texts]

    def teller(wait: Told) -> Done:
        return lambda vector, word: None if wait.done() else wait.set_result((vector, word))

    for (text_key, text), wait in zip(texts, waits, strict=True):
        encoder.encode(text_key, text, within_s, teller(wait))
    vectors: list[np.ndarray] = []
    for at, (vector, word) in enumerate(await asyncio.gather(*waits)):
        if vector is not None:
            vectors.append(vector)
        elif word == "unfit":
            raise RequestError("context_length_exceeded", f"input[{at}] is too long for this encoder", "input")
        elif word == "late":
            raise RequestError("deadline_exceeded", f"the encoder did not answer within {within_s:g} s")
        else:
            raise RequestError("breaker_open", "the encoder does not answer at the moment")
    return vectors


def embedding_list(vectors: Iterable[np.ndarray], encoding: str | None, model: str, tokens: int) -> bytes:
    """``vectors``: float32, one a text. ``encoding`` None is "float"."""
    data = tuple(Embedding(_worded(vector, encoding), index) for index, vector in enumerate(vectors))
    return encode_json(EmbeddingList(data, model, EmbeddingUsage(tokens, tokens)))


def _worded(vector: np.ndarray, encoding: str | None) -> list[float] | str:
    row = vector.astype("<f4")
    return base64.b64encode(row.tobytes()).decode() if encoding == "base64" else row.tolist()

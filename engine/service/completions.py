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
    finite,
    refuse_unsupported,
    spelt,
)
from engine.service.similar import Done, Word
from engine.service.sse import Wording
from engine.service.stream import ClientStream, Logged, Piece

MAX_LOGPROBS = 5  # OpenAI's limit here
MAX_INPUTS = 256  # texts in one embedding request: the encoder serves the gateway's own lookups too

Text = Annotated[str, Meta(min_length=1)]
Told = asyncio.Future[tuple[np.ndarray | None, Word]]

NEUTRAL: dict[str, tuple[object, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
}  # see ``openai.NEUTRAL``


class CompletionRequest(Sampled, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The body of a request; ``decode_completion`` makes it."""

    prompt: Text | Annotated[list[Text], Meta(min_length=1, max_length=1)]
    logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    n: Any = None
    best_of: Any = None
    echo: Any = None
    suffix: Any = None
    logit_bias: Any = None
    presence_penalty: Any = None
    frequency_penalty: Any = None

    @property
    def text(self) -> str:
        """The one prompt."""
        return self.prompt if isinstance(self.prompt, str) else self.prompt[0]

    @property
    def wants_logprobs(self) -> int | None:
        """See ``Sampled``."""
        return self.logprobs


class TextLogprobs(msgspec.Struct, frozen=True, gc=False):
    """Of the tokens of an answer, or of a piece of it; one entry a token in each list.

    ``top_logprobs``: the likeliest and the one that came, which may be one more. ``text_offset``: characters before it.
    """

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoice(msgspec.Struct, frozen=True, gc=False):
    """The one answer, or a piece of it."""

    text: str
    finish_reason: str | None = None
    logprobs: TextLogprobs | None = None
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

    def whole(self, piece: Piece, stream: ClientStream) -> bytes:
        """The completion object."""
        return encode_json(self.chunk((self.choice(piece, stream.reason),), self.usage(stream)))

    def first(self, piece: Piece) -> bytes:
        """The text that is there already, if any: there is no role to tell."""
        return self.more(piece) if piece else b""

    def choice(self, piece: Piece, reason: str | None = None) -> TextChoice:
        """More text, or why there is no more."""
        return TextChoice(piece.text, reason, text_logprobs(piece.logprobs))

    def chunk(self, choices: tuple[TextChoice, ...], usage: Usage | UnsetType | None) -> TextCompletion:
        """One event's object."""
        return TextCompletion(self.id, self.created, self.model, choices, usage)


def text_logprobs(logs: tuple[Logged, ...]) -> TextLogprobs | None:
    """In a completion's words; None where there are none."""
    if not logs:
        return None
    return TextLogprobs(
        [spelt(log.token) for log in logs],
        [finite(log.logprob) for log in logs],
        [{spelt(token): finite(value) for token, value in (*log.top, (log.token, log.logprob))} for log in logs],
        [log.offset for log in logs],
    )


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

"""The wire types of ``/v1/chat/completions`` and ``/v1/models``, and how any body becomes a request.

Strict: what cannot be honoured is refused by name, never ignored, because a client that asked for a JSON object and was
not told would take the answer for one. Labels that change no answer (``user``, ``metadata``) are accepted. Greedy is
the default, unlike OpenAI's temperature of 1: equal questions then have equal answers. Knows no HTTP and no models.
Source: the OpenAI API reference, "Create chat completion", and what its official client sends.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import UNSET, Meta, UnsetType

from engine.errors import RequestError
from engine.model.stepping import MAX_TOP_LOGPROBS, SamplingParams
from engine.service.stops import MAX_STOP_CHARS, MAX_STOPS

DEFAULT_MODEL = "default"  # the name to which every server answers
IMPOSSIBLE = -9999.0
MAX_ECHO = 80  # characters of a client's own words in an error

T = TypeVar("T")

Role = Literal["system", "user", "assistant"]
Count = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
TopK = Annotated[int, Meta(ge=-1, le=2**31 - 1)]
Stop = Annotated[str, Meta(min_length=1, max_length=MAX_STOP_CHARS)]
Stops = Annotated[list[Stop], Meta(max_length=MAX_STOPS)]

NEUTRAL: dict[str, tuple[object, ...]] = {
    "n": (1,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),  # of no tools
    "functions": ([],),
    "function_call": ("none", "auto"),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": (),
    "web_search_options": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
}  # parameters that cannot be honoured yet: the values (beside null) that ask for nothing


class TextPart(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One piece of a message's content."""

    type: Literal["text"]
    text: str


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One turn. The fields that must be null are there because clients send whole answers back as history."""

    role: Role
    content: str | list[TextPart]
    refusal: None = None
    annotations: None = None
    audio: None = None
    function_call: None = None
    tool_calls: None = None

    def plain(self) -> dict[str, str]:
        """What a chat template takes; parts stand on lines of their own."""
        text = self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)
        return {"role": self.role, "content": text}


class StreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How to stream. ``include_obfuscation`` (padding against eavesdroppers) is sent by clients that switch it off."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Sampled(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What every request for text may say, however it brings its prompt."""

    model: str
    max_tokens: Count | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: TopK | None = None  # vLLM's: OpenAI has none; -1 and 0 are no limit
    seed: Seed | None = None
    stop: Stop | Stops | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None

    @property
    def token_limit(self) -> int | None:
        """What the client set."""
        return self.max_tokens

    @property
    def wants_usage(self) -> bool:
        """A usage chunk at the end of a stream."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def wants_logprobs(self) -> int | None:
        """None, or of how many alternatives beside each token."""
        return None

    def params(self) -> SamplingParams:
        """As the client said it; seed 0 stands for none, see ``drawable``."""
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return SamplingParams(
            self.temperature or 0.0, 1.0 if self.top_p is None else self.top_p, self.seed or 0,
            top_k=max(0, self.top_k or 0), stop=stops, logprobs=self.wants_logprobs,
        )

    def drawable(self) -> SamplingParams:
        """For the sampler: where the client gave no seed, each call draws one."""
        params = self.params()
        if self.seed is not None or not params.temperature:
            return params
        return msgspec.structs.replace(params, seed=secrets.randbits(63))


class ChatRequest(Sampled, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The body of a request; ``decode_chat`` makes it."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    max_completion_tokens: Count | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    n: Any = None
    tools: Any = None
    tool_choice: Any = None
    parallel_tool_calls: Any = None
    functions: Any = None
    function_call: Any = None
    logit_bias: Any = None
    presence_penalty: Any = None
    frequency_penalty: Any = None
    response_format: Any = None
    modalities: Any = None
    audio: Any = None
    prediction: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None
    web_search_options: Any = None
    service_tier: Any = None
    store: Any = None

    @property
    def token_limit(self) -> int | None:
        """What the client set, under either name."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def wants_logprobs(self) -> int | None:
        """See ``Sampled``."""
        return self.top_logprobs or 0 if self.logprobs else None

    def conversation(self) -> list[dict[str, str]]:
        """Role and text of each turn."""
        return [message.plain() for message in self.messages]


class CachedTokens(msgspec.Struct, frozen=True, gc=False):
    """Of the prompt, found in the prefix cache."""

    cached_tokens: int


class Usage(msgspec.Struct, frozen=True, gc=False):
    """Model tokens of one request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class AnswerMessage(msgspec.Struct, frozen=True, gc=False):
    """The assistant's turn."""

    content: str
    role: str = "assistant"


class TopLogprob(msgspec.Struct, frozen=True, gc=False):
    """A token that could have come, with its UTF-8."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(msgspec.Struct, frozen=True, gc=False):
    """A token that came."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: tuple[TopLogprob, ...]


class ChatLogprobs(msgspec.Struct, frozen=True, gc=False):
    """Of the tokens of an answer, or of a piece of it."""

    content: tuple[TokenLogprob, ...]
    refusal: None = None


class Choice(msgspec.Struct, frozen=True, gc=False):
    """The one answer."""

    message: AnswerMessage
    finish_reason: str
    index: int = 0
    logprobs: ChatLogprobs | UnsetType = UNSET


class Completion(msgspec.Struct, frozen=True, gc=False):
    """A whole answer. ``created`` is in seconds since 1970."""

    id: str
    created: int
    model: str
    choices: tuple[Choice, ...]
    usage: Usage
    object: str = "chat.completion"


class Delta(msgspec.Struct, frozen=True, gc=False):
    """What a chunk adds."""

    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChunkChoice(msgspec.Struct, frozen=True, gc=False):
    """A piece of the one answer."""

    delta: Delta
    finish_reason: str | None = None
    index: int = 0
    logprobs: ChatLogprobs | UnsetType = UNSET


class Chunk(msgspec.Struct, frozen=True, gc=False):
    """One event of a stream. ``usage`` is null in all but the last where it was asked for, and absent elsewhere."""

    id: str
    created: int
    model: str
    choices: tuple[ChunkChoice, ...]
    usage: Usage | UnsetType | None = UNSET
    object: str = "chat.completion.chunk"


class ModelCard(msgspec.Struct, frozen=True, gc=False):
    """A name under which the model can be asked for."""

    id: str
    created: int
    object: str = "model"
    owned_by: str = "doorbuster"


class ModelList(msgspec.Struct, frozen=True, gc=False):
    """All names."""

    data: tuple[ModelCard, ...]
    object: str = "list"


class ErrorFields(msgspec.Struct, frozen=True, gc=False):
    """Why not."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorObject(msgspec.Struct, frozen=True, gc=False):
    """The body of every refusal."""

    error: ErrorFields


encode_json = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(ChatRequest).decode


def usage_of(prompt_tokens: int, output_tokens: int, cached_tokens: int) -> Usage:
    """Adds up."""
    return Usage(prompt_tokens, output_tokens, prompt_tokens + output_tokens, CachedTokens(cached_tokens))


def spelt(token: bytes) -> str:
    """A token's text; where it is no whole character its bytes by number, as OpenAI's completions spell them."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)


def finite(logprob: float) -> float:
    """JSON has no infinity: OpenAI's -9999.0 stands for a token that cannot come."""
    return max(logprob, IMPOSSIBLE)


def error_object(error: RequestError) -> ErrorObject:
    """The words of a refusal as a client reads them."""
    return ErrorObject(ErrorFields(error.message, error.type, error.param, error.code))


def decode_chat(body: bytes) -> ChatRequest:
    """Bytes to a request that can be honoured in full; RequestError "invalid_request" names what cannot."""
    ask = decode_body(_decode, body)
    refuse_unsupported(ask, NEUTRAL)
    if len({ask.max_tokens, ask.max_completion_tokens} - {None}) == 2:
        raise RequestError("invalid_request", "max_tokens and max_completion_tokens differ: send one", "max_tokens")
    if ask.top_logprobs and not ask.logprobs:
        raise RequestError("invalid_request", "top_logprobs wants logprobs to be true", "top_logprobs")
    check_stream_options(ask)
    return ask


def decode_body(decode: Callable[[bytes], T], body: bytes) -> T:
    """``decode(body)``, with msgspec's complaints in a client's words."""
    try:
        return decode(body)
    except msgspec.ValidationError as error:
        raise _misfit(str(error)) from None
    except msgspec.DecodeError as error:
        what = str(error).removeprefix("JSON is malformed: ")
        where = "" if "(byte " in what else f" (byte {len(body)})"
        raise RequestError("invalid_request", f"the body is not valid JSON: {what}{where}") from None
    except UnicodeDecodeError as error:
        raise RequestError("invalid_request", f"the body is not valid UTF-8{_bad_byte(body)}: {error.reason}") from None
    except RecursionError:
        raise RequestError("invalid_request", "the body is nested too deeply") from None


def refuse_unsupported(ask: msgspec.Struct, neutral: dict[str, tuple[object, ...]]) -> None:
    """Parameters that cannot be honoured pass only where they ask for nothing."""
    for name, values in neutral.items():
        value = getattr(ask, name)
        if value is not None and (type(value) is bool, value) not in [(type(one) is bool, one) for one in values]:
            raise RequestError("invalid_request", f"{name} is not supported here{_instead(values)}", name)


def check_stream_options(ask: Sampled) -> None:
    """They need a stream."""
    if options := ask.stream_options:
        if not ask.stream:
            raise RequestError("invalid_request", "stream_options wants stream to be true", "stream_options")
        if options.include_obfuscation:
            param = "stream_options.include_obfuscation"
            raise RequestError("invalid_request", f"{param} is not supported here: leave it out, or send false", param)


def _instead(neutral: tuple[object, ...]) -> str:
    accepted = [msgspec.json.encode(value).decode() for value in neutral]
    return f": leave it out, or send {' or '.join(accepted)}" if accepted else ": leave it out"


def _misfit(words: str) -> RequestError:
    """JSON of the wrong shape: msgspec's words, with the path as ``param``."""
    what, _, at = words.partition(" - at `$")
    param = at.rstrip("`").removeprefix(".").replace("[...]", "")
    if named := re.fullmatch(r"Object (contains unknown|missing required) field `(.*)`", what, re.DOTALL):
        field = named[2][:MAX_ECHO]
        param = f"{param}.{field}" if param else field
        what = "unknown parameter" if named[1].startswith("contains") else "missing"
    what = what[0].lower() + what[1:][: 2 * MAX_ECHO]
    return RequestError("invalid_request", f"{param or 'the body'}: {what}", param or None)


def _bad_byte(body: bytes) -> str:
    try:
        body.decode()
    except UnicodeDecodeError as error:
        return f" (byte {error.start})"
    return ""

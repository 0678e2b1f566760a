"""Bodies to requests: what is taken, and what is refused in which words. Answers: what the official client reads."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from engine.errors import RequestError
from engine.model.stepping import SamplingParams
from engine.service.openai import NEUTRAL, ChatRequest, decode_chat
from engine.service.sse import DONE, Wording
from engine.service.stream import ClientStream, Logged, Piece

TURN = {"role": "user", "content": "hello"}


def ask(**more: Any) -> bytes:
    return json.dumps({"model": "m", "messages": [TURN], **more}).encode()


def refused(body: bytes) -> RequestError:
    with pytest.raises(RequestError) as caught:
        decode_chat(body)
    assert caught.value.code == "invalid_request" and caught.value.status == 400
    assert "Traceback" not in caught.value.message and len(caught.value.message) < 300
    return caught.value


def test_a_plain_request_is_greedy_and_unlimited() -> None:
    got = decode_chat(ask())
    assert got.conversation() == [TURN]
    assert got.params() == got.drawable() == SamplingParams()
    assert (got.token_limit, got.stream, got.wants_usage) == (None, None, False)


def test_all_that_is_honoured_arrives() -> None:
    got = decode_chat(
        ask(
            messages=[{"role": "system", "content": "s"}, {"role": "assistant", "content": "a", "refusal": None}, TURN],
            temperature=1, top_p=0.5, seed=-7, max_completion_tokens=9, stream=True,
            stream_options={"include_usage": True, "include_obfuscation": False}, user="u", metadata={"k": "v"},
            top_k=40, stop=["\n", "END"],
        )
    )
    assert [turn["role"] for turn in got.conversation()] == ["system", "assistant", "user"]
    assert got.params() == got.drawable() == SamplingParams(1.0, 0.5, -7, top_k=40, stop=("\n", "END"))
    assert decode_chat(ask(stop="x")).params() == SamplingParams(stop=("x",))
    assert decode_chat(ask(logprobs=True)).params() == SamplingParams(logprobs=0)
    assert decode_chat(ask(logprobs=True, top_logprobs=20)).drawable() == SamplingParams(logprobs=20)
    for none in ({"logprobs": False}, {"logprobs": False, "top_logprobs": 0}, {"logprobs": None}):
        assert decode_chat(ask(**none)).params() == SamplingParams()
    for none in ({"stop": None}, {"stop": []}, {"top_k": -1}, {"top_k": 0}, {"top_k": None}):
        assert decode_chat(ask(**none)).params() == SamplingParams()
    assert (got.token_limit, got.stream, got.wants_usage) == (9, True, True)
    assert decode_chat(ask(max_tokens=3)).token_limit == 3
    assert decode_chat(ask(max_tokens=3, max_completion_tokens=3)).token_limit == 3


def test_a_sample_without_seed_is_drawn_anew_each_time() -> None:
    got = decode_chat(ask(temperature=0.7, top_k=3, stop="x"))
    assert got.params().seed == 0
    assert (got.drawable().top_k, got.drawable().stop) == (3, ("x",))
    assert got.drawable().seed != got.drawable().seed
    assert decode_chat(ask(temperature=0.7, seed=3)).drawable().seed == 3


def test_text_parts_become_lines() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert decode_chat(ask(messages=[{"role": "user", "content": parts}])).conversation()[0]["content"] == "one\ntwo"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", ["not valid JSON", "byte 0"]),
        (b'{"model": "m",', ["not valid JSON", "byte 14"]),
        (ask() + b"x", ["not valid JSON", "trailing characters", "byte "]),
        (b'{"model": "m\xff"}', ["not valid UTF-8", "byte 12"]),
        (b'{"model": "\\udc00x"}', ["not valid JSON", "surrogate"]),
        (b"[1]", ["the body", "array"]),
        (ask()[:-1] + b', "tools": ' + b"[" * 100_000, ["nested too deeply"]),
    ],
)
def test_what_is_no_json_object_is_refused_with_its_place(body: bytes, words: list[str]) -> None:
    error = refused(body)
    assert all(word in error.message for word in words), error.message
    assert error.param is None


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"tempratur": 1}, "tempratur"),
        ({"x" * 500: 1}, "x" * 80),
        ({"model": None}, "model"),
        ({"model": 3}, "model"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [TURN, {"role": "tool", "content": "x"}]}, "messages[1].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{**TURN, "name": "bob"}]}, "messages[0].name"),
        ({"messages": [{**TURN, "tool_calls": []}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 2**40}, "max_tokens"),
        ({"max_tokens": 4, "max_completion_tokens": 5}, "max_tokens"),
        ({"temperature": 2.5}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"seed": 2**63}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"stream": 1}, "stream"),
        ({"top_k": -2}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"min_p": 0.1}, "min_p"),
        ({"repetition_penalty": 1.1}, "repetition_penalty"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a", ""]}, "stop[1]"),
        ({"stop": list("abcde")}, "stop"),
        ({"stop": "x" * 257}, "stop"),
        ({"stop": 7}, "stop"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"top_logprobs": -1}, "top_logprobs"),
        ({"logprobs": 3}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": False, "top_logprobs": 3}, "top_logprobs"),
        ({"metadata": {"k": 1}}, "metadata"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
    ],
)
def test_what_does_not_fit_is_refused_by_its_path(more: dict[str, Any], param: str) -> None:
    error = refused(ask(**more))
    assert error.param == param
    assert param in error.message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 2), ("tools", [{}]), ("tool_choice", "required"), ("functions", [{}]),
        ("function_call", {"name": "f"}), ("logit_bias", {"5": 1}),
        ("presence_penalty", 0.5), ("frequency_penalty", -1), ("response_format", {"type": "json_object"}),
        ("modalities", ["audio"]), ("audio", {}), ("prediction", {}), ("reasoning_effort", "high"),
        ("verbosity", "low"), ("web_search_options", {}), ("service_tier", "priority"), ("store", True),
        ("parallel_tool_calls", "yes"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(name: str, value: object) -> None:
    error = refused(ask(**{name: value}))
    assert error.param == name and f"{name} is not supported" in error.message


def test_every_parameter_that_cannot_be_honoured_may_ask_for_nothing() -> None:
    assert NEUTRAL.keys() <= set(ChatRequest.__struct_fields__)
    for name, values in NEUTRAL.items():
        for value in (None, *values):
            decode_chat(ask(**{name: value}))


def finished() -> ClientStream:
    stream = ClientStream(0, "r")
    stream.output_tokens, stream.cached_tokens, stream.reason = 5, 16, "length"
    return stream


def test_the_official_types_read_an_answer() -> None:
    words = Wording("chatcmpl-1", 1_700_000_000, "m", 20, usage_in_chunks=False)
    got = ChatCompletion.model_validate_json(words.whole(Piece("hi"), finished()), strict=True)
    assert got.choices[0].message.content == "hi" and got.choices[0].finish_reason == "length"
    assert got.usage is not None and got.usage.prompt_tokens_details is not None
    assert (got.usage.prompt_tokens, got.usage.completion_tokens, got.usage.total_tokens) == (20, 5, 25)
    assert got.usage.prompt_tokens_details.cached_tokens == 16


@pytest.mark.parametrize("usage", [True, False])
def test_the_official_types_read_a_stream(usage: bool) -> None:
    words = Wording("chatcmpl-1", 1_700_000_000, "m", 20, usage_in_chunks=usage)
    raw = words.first(Piece("he")) + words.more(Piece("y\n")) + words.last(finished())
    assert raw.endswith(b"\n\n" + DONE)
    events = raw.removesuffix(DONE).decode().split("\n\n")[:-1]
    assert all(event.startswith("data: ") and "\n" not in event for event in events)
    chunks = [ChatCompletionChunk.model_validate_json(event.removeprefix("data: "), strict=True) for event in events]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].delta.content for c in chunks[:4]] == ["", "he", "y\n", None]
    assert [c.choices[0].finish_reason for c in chunks[:4]] == [None, None, None, "length"]
    assert [c.usage and c.usage.total_tokens for c in chunks[4:]] == ([25] if usage else [])
    assert all(('"usage":null' in event) == usage for event in events[:4])


LOGS = (
    Logged(b" caf\xc3", -0.5, [(b" caf\xc3", -0.5), (b"<|im_end|>", float("-inf"))], 2),
    Logged(b"\xa9", -1.25, [], 6),
)


def test_the_official_types_read_logprobs_whole_and_streamed() -> None:
    words = Wording("chatcmpl-1", 1_700_000_000, "m", 20, usage_in_chunks=False)
    whole = ChatCompletion.model_validate_json(words.whole(Piece("a café", LOGS), finished()), strict=True)
    event = words.more(Piece(" café", LOGS)).removeprefix(b"data: ")
    last = ChatCompletionChunk.model_validate_json(words.more(Piece("", LOGS[1:])).removeprefix(b"data: "), strict=True)
    for choice in (whole.choices[0], ChatCompletionChunk.model_validate_json(event, strict=True).choices[0]):
        assert choice.logprobs is not None and choice.logprobs.content is not None
        first, second = choice.logprobs.content
        assert (first.token, first.logprob, first.bytes) == ("bytes:\\x20\\x63\\x61\\x66\\xc3", -0.5, [*b" caf\xc3"])
        assert [(top.token, top.logprob) for top in first.top_logprobs][1] == ("<|im_end|>", -9999.0)
        joined = bytes((first.bytes or []) + (second.bytes or []))
        assert joined.decode() == " café", "as OpenAI says"
        assert second.top_logprobs == []
    assert last.choices[0].logprobs is not None and last.choices[0].delta.content is None
    assert b"logprobs" not in words.whole(Piece("hi"), finished()) + words.more(Piece("hi"))

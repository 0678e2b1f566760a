"""Completions of a real engine: a bare prompt goes to the model as it is, everything else is as for chat.

The fake model repeats the last user message of a prompt that has one, and else the prompt's last eight tokens.

Run: ``pytest tests/service/test_completions.py``. Deliberate breaks that it caught: the prompt put through the chat
template; special tokens broken up; the class's system prompt in front; chat's exact key; a similarity key; no blocks;
the first of two prompts; ``echo`` ignored; unsupported parameters and stream options unread; the first piece lost; an
empty first event; no reason at the end; chat's ids, object or ``param``; the tenant's class ignored.
"""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from openai.types import Completion

from engine.errors import RequestError
from engine.events import Arrive
from engine.model.smalllm import small_tokenizer
from engine.model.stepping import SamplingParams
from engine.service.completions import NEUTRAL, CompletionRequest, TextWording, decode_completion
from engine.service.sse import DONE
from engine.service.stream import ClientStream, Logged, Piece
from tests.service.conftest import Starter
from tests.service.harness import CHAT, Engine, body, check_error, journal

COMPLETIONS = "/v1/completions"


def ask(prompt: object = "once upon a time", **more: Any) -> dict[str, Any]:
    return {"model": "default", "prompt": prompt, **more}


def tail_of(text: str) -> str:
    tokenizer = small_tokenizer()
    return tokenizer.decode(tokenizer.encode(text)[-8:])


def tokens_of(text: str) -> int:
    return len(small_tokenizer().encode(text))


def templated(text: str) -> str:
    return small_tokenizer().render([{"role": "user", "content": text}])


# ---------------------------------------------------------------- answers


def test_the_official_client_gets_the_same_text_streamed_and_whole(engine: Engine) -> None:
    text = "Dear customer, your grüße 😀 and the blue kettle with a lid are on their way to the small"
    with engine.official() as client:
        whole = client.completions.create(**ask(text), max_tokens=100)
        events = list(
            client.completions.create(**ask(text), max_tokens=101, stream=True, stream_options={"include_usage": True})
        )
    assert whole.object == events[0].object == "text_completion"
    assert whole.choices[0].text == tail_of(text) != ""
    assert "".join(e.choices[0].text for e in events if e.choices) == whole.choices[0].text
    assert [e.choices[0].finish_reason for e in events if e.choices][-1] == whole.choices[0].finish_reason == "stop"
    assert {e.choices[0].finish_reason for e in events[:-2]} == {None}
    assert whole.usage is not None and events[-1].usage is not None and not events[-1].choices
    assert whole.usage.prompt_tokens == events[-1].usage.prompt_tokens == tokens_of(text)
    assert whole.usage.completion_tokens == events[-1].usage.completion_tokens == 8
    assert whole.model == events[0].model == "fake" and whole.id.startswith("cmpl-")


def test_an_answer_at_its_limit_says_length(engine: Engine) -> None:
    with engine.official() as client:
        got = client.completions.create(**ask("count: one two three four five six seven eight nine"), max_tokens=3)
    assert got.choices[0].finish_reason == "length"
    assert got.usage is not None and got.usage.completion_tokens == 3


def test_a_template_that_the_client_spells_out_is_the_template(engine: Engine) -> None:
    """Same model, same tokens, same answer as chat, and neither is answered from the other's cache."""
    with engine.http() as client:
        chat = client.post(CHAT, json=body("which lamp is brightest?"))
        mine = client.post(COMPLETIONS, json=ask(templated("which lamp is brightest?")))
        again = client.post(COMPLETIONS, json=ask([templated("which lamp is brightest?")]))
    assert mine.json()["choices"][0]["text"] == chat.json()["choices"][0]["message"]["content"]
    assert mine.json()["usage"]["prompt_tokens"] == chat.json()["usage"]["prompt_tokens"]
    assert [got.headers["x-doorbuster-tier"] for got in (chat, mine, again)] == ["model", "model", "exact"]
    assert again.headers["x-doorbuster-source"] == mine.headers["x-request-id"]
    assert again.json()["choices"] == mine.json()["choices"]


def test_a_class_brings_its_limits_but_not_its_system_prompt(started: Starter) -> None:
    engine = started()
    text = "the card was used in two towns within the same minute, which is a sign of something"
    with engine.http("bank", **{"x-doorbuster-class": "fraud"}) as client:
        got = client.post(COMPLETIONS, json=ask(text, max_tokens=90)).json()
        chat = client.post(CHAT, json=body(text)).json()
        longer = client.post(COMPLETIONS, json=ask(templated("a b c d e f g h i j k l m n o p"), max_tokens=90)).json()
    assert got["usage"]["prompt_tokens"] == tokens_of(text) < 100 < chat["usage"]["prompt_tokens"]
    assert (longer["choices"][0]["finish_reason"], longer["usage"]["completion_tokens"]) == ("length", 8)
    engine.call(engine.inside.flush)
    bare, conversation, _ = (e.event for e in journal(engine.folder) if isinstance(e.event, Arrive))
    assert (bare.traffic_class, bare.max_tokens, bare.pinned_blocks, bare.text_key) == ("fraud", 8, 0, b"")
    assert len(bare.blocks) == tokens_of(text) // 16
    assert conversation.pinned_blocks > 0 and conversation.text_key


# ---------------------------------------------------------------- refusals


Case = tuple[dict[str, Any], int, str, str | None]
REFUSED: dict[str, Case] = {
    "no key": ({"tenant": None}, 401, "unauthorized", None),
    "no prompt": ({"json": {"model": "default"}}, 400, "invalid_request", "prompt"),
    "empty prompt": ({"json": ask("")}, 400, "invalid_request", "prompt"),
    "two prompts": ({"json": ask(["a", "b"])}, 400, "invalid_request", "prompt"),
    "token ids": ({"json": ask([1, 2, 3])}, 400, "invalid_request", "prompt[0]"),
    "messages": ({"json": ask(messages=[])}, 400, "invalid_request", "messages"),
    "not honoured": ({"json": ask(echo=True)}, 400, "invalid_request", "echo"),
    "over the context": ({"json": ask("shoe " * 600)}, 400, "context_length_exceeded", "prompt"),
    "class not granted": (
        {"json": ask(), "headers": {"x-doorbuster-class": "fraud"}}, 403, "forbidden", "x-doorbuster-class",
    ),
    "unknown model": ({"json": {**ask(), "model": "gpt-9"}}, 404, "not_found", "model"),
    "wrong method": ({"method": "GET"}, 405, "method_not_allowed", None),
    "too large": ({"content": b" " * 20_001}, 413, "body_too_large", None),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_request_is_refused_in_words_and_does_no_work(engine: Engine, name: str) -> None:
    case, status, code, param = REFUSED[name]
    before = engine.stats()
    with engine.http(case.get("tenant", "shop")) as client:
        got = client.request(
            case.get("method", "POST"), COMPLETIONS, json=case.get("json"), content=case.get("content"),
            headers=case.get("headers"),
        )
        check_error(got, status, code, param)
    assert engine.stats() == before


def test_a_tenants_own_limit_holds_here_too(started: Starter) -> None:
    engine = started()
    with engine.http("trickle") as client:
        assert client.post(CHAT, json=body("first")).status_code == 200
        check_error(client.post(COMPLETIONS, json=ask()), 429, "rate_limited")
    with engine.official("trickle") as client, pytest.raises(openai.RateLimitError):
        client.completions.create(**ask())


# ---------------------------------------------------------------- bodies and words


def raw(**more: Any) -> bytes:
    return json.dumps({"model": "m", "prompt": "p", **more}).encode()


def test_all_that_is_honoured_arrives() -> None:
    got = decode_completion(
        raw(prompt=["x y"], temperature=1, top_p=0.5, seed=-7, max_tokens=9, stream=True, user="u", top_k=5, stop="\n",
            stream_options={"include_usage": True, "include_obfuscation": False})
    )
    assert got.text == "x y" and got.params() == got.drawable() == SamplingParams(1.0, 0.5, -7, top_k=5, stop=("\n",))
    assert (got.token_limit, got.stream, got.wants_usage) == (9, True, True)
    assert decode_completion(raw(logprobs=0)).params() == SamplingParams(logprobs=0)
    assert (decode_completion(raw()).params(), decode_completion(raw()).text) == (SamplingParams(), "p")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 2), ("best_of", 3), ("echo", True), ("suffix", "x"),
        ("logit_bias", {"5": 1}), ("presence_penalty", 0.5), ("frequency_penalty", -1),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(RequestError, match=f"{name} is not supported") as caught:
        decode_completion(raw(**{name: value}))
    assert (caught.value.code, caught.value.param) == ("invalid_request", name)


def test_every_parameter_that_cannot_be_honoured_may_ask_for_nothing() -> None:
    assert NEUTRAL.keys() <= set(CompletionRequest.__struct_fields__)
    for name, values in NEUTRAL.items():
        for value in (None, *values):
            decode_completion(raw(**{name: value}))


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"prompt": None}, "prompt"), ({"prompt": []}, "prompt"), ({"prompt": [""]}, "prompt[0]"),
        ({"prompt": [[1]]}, "prompt[0]"), ({"max_tokens": 0}, "max_tokens"), ({"temperature": 3}, "temperature"),
        ({"logprobs": 6}, "logprobs"), ({"logprobs": True}, "logprobs"), ({"logprobs": -1}, "logprobs"),
        ({"max_completion_tokens": 5}, "max_completion_tokens"), ({"tools": []}, "tools"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
    ],
)
def test_what_does_not_fit_is_refused_by_its_path(more: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        decode_completion(raw(**more))
    assert (caught.value.code, caught.value.param) == ("invalid_request", param)


@pytest.mark.parametrize("usage", [True, False])
def test_a_stream_is_of_whole_objects_and_the_official_type_reads_the_last(usage: bool) -> None:
    stream = ClientStream(0, "r")
    stream.output_tokens, stream.cached_tokens, stream.reason = 5, 16, "length"
    words = TextWording("cmpl-1", 1_700_000_000, "m", 20, usage_in_chunks=usage)
    sent = words.first(Piece("he")) + words.more(Piece("y\n")) + words.last(stream)
    assert words.first(Piece()) == b"" and sent.endswith(b"\n\n" + DONE)
    events = sent.removesuffix(DONE).decode().split("\n\n")[:-1]
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    head = {"id": "cmpl-1", "created": 1_700_000_000, "model": "m", "object": "text_completion"}
    assert all(chunk.items() >= head.items() for chunk in chunks)
    pieces = [("he", None), ("y\n", None), ("", "length")]  # null: there is more
    assert [chunk["choices"] for chunk in chunks[:3]] == [
        [{"text": text, "finish_reason": reason, "logprobs": None, "index": 0}] for text, reason in pieces
    ]
    assert all(("usage" in chunk) == usage and chunk.get("usage") is None for chunk in chunks[:3])
    for event in events[2:]:
        last = Completion.model_validate_json(event.removeprefix("data: "), strict=True)
    assert (last.usage and last.usage.total_tokens) == (25 if usage else None) and len(events) == 3 + usage
    whole = Completion.model_validate_json(words.whole(Piece("hi"), stream), strict=True)
    assert (whole.choices[0].text, whole.choices[0].finish_reason) == ("hi", "length")
    assert whole.usage is not None and whole.usage.prompt_tokens_details is not None
    assert (whole.usage.total_tokens, whole.usage.prompt_tokens_details.cached_tokens) == (25, 16)


def test_logprobs_are_lists_of_one_entry_a_token() -> None:
    logs = (Logged(b"a", -0.5, [(b"b", -0.25), (b"a", -0.5)], 0), Logged(b" \xf0", -3.0, [(b"c", float("-inf"))], 1))
    words = TextWording("cmpl-1", 1_700_000_000, "m", 20, usage_in_chunks=False)
    stream = ClientStream(0, "r")
    piece = Piece("a \ufffd", logs)
    whole = Completion.model_validate_json(words.whole(piece, stream), strict=True)
    event = Completion.construct(**json.loads(words.more(piece).removeprefix(b"data: ")))  # as the client does
    for got in (whole.choices[0].logprobs, event.choices[0].logprobs):
        assert got is not None
        assert (got.tokens, got.token_logprobs, got.text_offset) == (["a", "bytes:\\x20\\xf0"], [-0.5, -3.0], [0, 1])
        assert got.top_logprobs == [{"b": -0.25, "a": -0.5}, {"c": -9999.0, "bytes:\\x20\\xf0": -3.0}]

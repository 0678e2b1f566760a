"""Log-probabilities from a real model's process to the official client: chat and completions, whole and streamed.

Run: python -m pytest tests/service/test_logprobs.py -q
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest

from engine.config import ModelConfig
from engine.model.smalllm import small_tokenizer
from tests.service.harness import CHAT, Engine, body, check_error, start

TEXT = "Is the blue kettle there?"
N = 12


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """Random weights, real probabilities."""
    with start(tmp_path_factory.mktemp("tiny"), model=ModelConfig(name="tiny", context_tokens=512)) as engine:
        yield engine


def ids_of(tokens: list[bytes]) -> list[int]:
    known = {small_tokenizer().token_bytes(token): token for token in range(small_tokenizer().vocab_size)}
    return [known[token] for token in tokens]


def test_chat_has_them_whole_and_streamed(tiny: Engine) -> None:
    with tiny.official() as client:
        whole = client.chat.completions.create(**body(TEXT), max_tokens=N, logprobs=True, top_logprobs=4).choices[0]
        events = list(
            client.chat.completions.create(**body(TEXT), max_tokens=N, logprobs=True, top_logprobs=4, stream=True)
        )
    assert whole.logprobs is not None and whole.logprobs.content is not None
    content = whole.logprobs.content
    tokens = [bytes(said.bytes or []) for said in content]
    assert small_tokenizer().decode(ids_of(tokens)) == whole.message.content
    assert len(content) == N
    for said in content:
        assert len(said.top_logprobs) == 4
        logs = [top.logprob for top in said.top_logprobs]
        assert logs == sorted(logs, reverse=True) and sum(map(math.exp, logs)) <= 1
        assert (said.token, said.logprob) == (said.top_logprobs[0].token, logs[0]), "greedy takes the best"
    parts = [choice.logprobs for event in events for choice in event.choices if choice.logprobs]
    streamed = [said for part in parts for said in part.content or []]
    assert [said.token for said in streamed] == [said.token for said in content]
    assert [said.logprob for said in streamed] == pytest.approx([said.logprob for said in content], abs=1e-4)


def test_completions_have_them_in_their_own_shape(tiny: Engine) -> None:
    with tiny.official() as client:
        for n in (0, 3):
            choice = client.completions.create(model="default", prompt=TEXT, max_tokens=N, logprobs=n).choices[0]
            logs = choice.logprobs
            assert logs is not None and logs.tokens and logs.token_logprobs and logs.top_logprobs and logs.text_offset
            assert len(logs.tokens) == len(logs.token_logprobs) == len(logs.top_logprobs) == len(logs.text_offset) == N
            assert {len(top) for top in logs.top_logprobs} == {max(n, 1)}
            for token, log, top, at in zip(
                logs.tokens, logs.token_logprobs, logs.top_logprobs, logs.text_offset, strict=True
            ):
                assert top[token] == log == max(top.values())
                assert token.startswith("bytes:") or choice.text[at:].startswith(token)


def test_a_drawn_token_brings_the_models_own_probability(tiny: Engine) -> None:
    """Not that of the filtered distribution from which it was drawn: with top_k 1 that would be certainty."""
    with tiny.http() as client:
        greedy, drawn = (
            client.post(CHAT, json=body(TEXT, max_tokens=N, logprobs=True, **more)).json()["choices"][0]["logprobs"]
            for more in ({}, {"temperature": 2.0, "top_k": 1, "seed": 1})
        )
    assert [said["token"] for said in drawn["content"]] == [said["token"] for said in greedy["content"]]
    assert all(said["logprob"] < -1e-3 and said["top_logprobs"] == [] for said in drawn["content"])


def test_who_asks_for_them_gets_them_computed_and_nobody_else_gets_them(tiny: Engine) -> None:
    asks = [{}, {"logprobs": True}, {"logprobs": True}, {}, {"logprobs": True, "stop": "nowhere"}]
    with tiny.http() as client:
        got = [client.post(CHAT, json=body("asked again and again", max_tokens=5, **more)) for more in asks]
    assert [one.headers["x-doorbuster-tier"] for one in got] == ["model", "model", "model", "exact", "model"]
    assert ["logprobs" in one.json()["choices"][0] for one in got] == ["logprobs" in more for more in asks]
    assert len({one.json()["choices"][0]["message"]["content"] for one in got}) == 1


def test_with_a_stop_string_only_what_is_said_has_them(tiny: Engine) -> None:
    with tiny.http() as client:
        text = client.post(CHAT, json=body(TEXT, max_tokens=N)).json()["choices"][0]["message"]["content"]
        stop = text[len(text) // 2 : len(text) // 2 + 2]
        got = client.post(CHAT, json=body(TEXT, max_tokens=N, logprobs=True, stop=stop)).json()
    said = b"".join(bytes(one["bytes"]) for one in got["choices"][0]["logprobs"]["content"])
    assert got["choices"][0]["message"]["content"] == text[: text.index(stop)]
    assert got["choices"][0]["finish_reason"] == "stop"
    assert said.startswith(text[: text.index(stop)].encode()) and len(said) < len(text.encode())
    assert got["usage"]["completion_tokens"] < N


def test_the_fake_model_has_none_and_says_so(engine: Engine) -> None:
    with engine.http() as client:
        said = check_error(client.post(CHAT, json=body("x", logprobs=True)), 400, "invalid_request", "logprobs")
        check_error(
            client.post("/v1/completions", json={"model": "default", "prompt": "x", "logprobs": 0}), 400,
            "invalid_request", "logprobs",
        )
    assert "fake model" in said

"""Embeddings by a real encoder process behind a real engine, read by the official client.

Run: ``pytest tests/service/test_embeddings.py`` (about 5 s for the weights). Deliberate breaks that it caught: doubles
or big-endian floats; base64 unasked; vectors in another order; every input called number 0; a text too long, a late and
a lost encoder taken for one another; no limit, one beside the gateway's, without the user; no wait told, no room
counted, taken while draining; any model's name.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import openai
import pytest
from msgspec.structs import replace

from engine.config import LimiterConfig
from engine.errors import RequestError
from engine.model.encoder_process import Drill, EncoderSpec
from engine.model.smalllm import small_tokenizer
from engine.service import app as app_module
from engine.service.completions import MAX_INPUTS, decode_embedding, embedding_list
from engine.service.encoder import EncoderClient
from engine.service.similar import Done
from sim.twin.replay import replay
from tests.service.conftest import Starter
from tests.service.harness import CHAT, Engine, body, check_error, start

EMBEDDINGS = "/v1/embeddings"
TEXTS = ["Where is my parcel?", "My package has not arrived, where is it?", "How do I descale the kettle?"]


def ask(texts: object = "hello", **more: Any) -> dict[str, Any]:
    return {"model": "minilm", "input": texts, **more}


@pytest.fixture(scope="module")
def encoding(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """An engine whose app has an encoder; nothing else asks it."""
    with start(tmp_path_factory.mktemp("encoding")) as engine:

        async def begin() -> EncoderClient:
            client = EncoderClient(hang_s=3600.0)  # a deaf one stays deaf
            await client.start(EncoderSpec())
            return client

        client = engine.inside.app.encoder = asyncio.run_coroutine_threadsafe(begin(), engine.loop).result(120)
        engine.idle_tasks = engine.call(lambda: len(asyncio.all_tasks()) - 1)
        try:
            yield engine
        finally:
            asyncio.run_coroutine_threadsafe(client.stop(), engine.loop).result(60)


class OneVector:
    """An encoder that thinks all texts equal."""

    def encode(self, text_key: bytes, text: str, deadline_s: float, done: Done) -> None:
        done(np.full(384, 384**-0.5, np.float32), "ok")

    def cancel(self, call: object) -> None:
        pass


def client_of(engine: Engine) -> EncoderClient:
    client = engine.inside.app.encoder
    assert isinstance(client, EncoderClient)
    return client


# ---------------------------------------------------------------- vectors


def test_the_official_client_gets_vectors_that_mean_something_in_the_order_asked(encoding: Engine) -> None:
    with encoding.official() as client:
        got = client.embeddings.create(model="minilm", input=TEXTS)  # base64 on the wire
        as_numbers = client.embeddings.create(model="minilm", input=TEXTS, encoding_format="float")
        alone = client.embeddings.create(model="minilm", input=TEXTS[2])
    rows = np.array([item.embedding for item in got.data], np.float32)
    assert rows.shape == (3, 384) and np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    assert [item.index for item in got.data] == [0, 1, 2] and got.model == "minilm" and got.object == "list"
    assert rows[0] @ rows[1] > 0.5 > 0.2 > rows[0] @ rows[2]
    assert np.array_equal(np.array([item.embedding for item in as_numbers.data], np.float32), rows)
    assert np.array_equal(np.array(alone.data[0].embedding, np.float32), rows[2])
    tokens = sum(len(small_tokenizer().encode(text)) for text in TEXTS)
    assert got.usage.prompt_tokens == got.usage.total_tokens == tokens > alone.usage.total_tokens > 0


def test_base64_is_little_endian_float32_and_numbers_are_the_default(encoding: Engine) -> None:
    with encoding.http() as client:
        numbers = client.post(EMBEDDINGS, json=ask(TEXTS[0])).json()["data"][0]
        coded = client.post(EMBEDDINGS, json=ask([TEXTS[0]], encoding_format="base64")).json()["data"][0]
    assert numbers.keys() == coded.keys() == {"object", "index", "embedding"} and numbers["object"] == "embedding"
    raw = base64.b64decode(coded["embedding"], validate=True)
    assert len(raw) == 4 * 384
    assert [float(x) for x in np.frombuffer(raw, "<f4")] == numbers["embedding"]


def test_a_text_is_encoded_once(encoding: Engine) -> None:
    before = encoding.call(client_of(encoding).stats)
    with encoding.http() as client:
        got = client.post(EMBEDDINGS, json=ask(["twice in one", "twice in one", " twice in one\n"])).json()["data"]
        client.post(EMBEDDINGS, json=ask("twice in one"))
    after = encoding.call(client_of(encoding).stats)
    assert got[0]["embedding"] == got[1]["embedding"] == got[2]["embedding"]
    assert (after.joined - before.joined, after.memo_hits - before.memo_hits) == (2, 1)
    assert after.remembered == before.remembered + 1


def test_what_another_tenant_has_had_encoded_is_encoded_anew(encoding: Engine) -> None:
    """The encoder's memory is ten times as fast as the encoder: nobody must learn by it what others have asked."""
    before = encoding.call(client_of(encoding).stats)
    vectors = []
    for tenant in ("shop", "bank"):
        with encoding.http(tenant) as client:
            vectors.append(client.post(EMBEDDINGS, json=ask("a secret of the shop")).json()["data"][0]["embedding"])
    after = encoding.call(client_of(encoding).stats)
    assert vectors[0] == vectors[1] and after.memo_hits == before.memo_hits
    assert after.remembered == before.remembered + 2


def test_the_gateway_hears_what_it_costs_and_nothing_else(encoding: Engine) -> None:
    before = encoding.stats()
    with encoding.http() as client:
        assert client.post(EMBEDDINGS, json=ask("nobody's business")).status_code == 200
        assert [card["id"] for card in client.get("/v1/models").json()["data"]] == ["fake", "default", "minilm"]
    limits = replace(before.limiter, allowed=before.limiter.allowed + 1)
    assert encoding.stats() == replace(before, limiter=limits)
    encoding.quiet()


# ---------------------------------------------------------------- refusals


Case = tuple[dict[str, Any], int, str, str | None]
REFUSED: dict[str, Case] = {
    "no key": ({"tenant": None}, 401, "unauthorized", None),
    "no input": ({"json": {"model": "minilm"}}, 400, "invalid_request", "input"),
    "empty": ({"json": ask("")}, 400, "invalid_request", "input"),
    "nothing": ({"json": ask([])}, 400, "invalid_request", "input"),
    "token ids": ({"json": ask([1, 2])}, 400, "invalid_request", "input[0]"),
    "too many": ({"json": ask(["x"] * (MAX_INPUTS + 1))}, 400, "invalid_request", "input"),
    "too long": ({"json": ask(["fine", "kettle " * 200])}, 400, "context_length_exceeded", "input"),
    "far too long": ({"json": ask(["kettle " * 2000])}, 400, "context_length_exceeded", "input"),
    "another model": ({"json": {**ask(), "model": "fake"}}, 404, "not_found", "model"),
    "dimensions": ({"json": ask(dimensions=64)}, 400, "invalid_request", "dimensions"),
    "another encoding": ({"json": ask(encoding_format="int8")}, 400, "invalid_request", "encoding_format"),
    "unknown field": ({"json": ask(inputs=[])}, 400, "invalid_request", "inputs"),
    "wrong method": ({"method": "GET"}, 405, "method_not_allowed", None),
    "too large": ({"content": b" " * 20_001}, 413, "body_too_large", None),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_request_is_refused_in_words(encoding: Engine, name: str) -> None:
    case, status, code, param = REFUSED[name]
    with encoding.http(case.get("tenant", "shop")) as client:
        got = client.request(
            case.get("method", "POST"), EMBEDDINGS, json=case.get("json"), content=case.get("content")
        )
        words = check_error(got, status, code, param)
    assert "input[1]" in words or name != "too long"
    encoding.quiet()


def test_a_tenants_own_limit_holds_here_too(encoding: Engine) -> None:
    with encoding.http("trickle") as client:
        assert client.post(EMBEDDINGS, json=ask()).status_code == 200
        got = client.post(EMBEDDINGS, json=ask())
        check_error(got, 429, "rate_limited")
        assert 95 <= int(got.headers["retry-after"]) <= 120, "exact, and longer by a fifth at most, by lot"
    with encoding.official("trickle") as client, pytest.raises(openai.RateLimitError):
        client.embeddings.create(**ask())


def test_text_and_vectors_have_one_account_and_the_journal_holds_both(started: Starter) -> None:
    """Each user's limit too: it is the same user, whatever is asked for."""
    engine = started(limiter=LimiterConfig(user_rps=0.01, user_burst_s=200.0))  # two of each user's
    engine.inside.app.encoder = OneVector()
    with engine.http() as client:
        for path, asked in ((CHAT, body("hello", user="Ann Example")), (EMBEDDINGS, ask("hello", user="Ann Example"))):
            assert client.post(path, json=asked).status_code == 200
        got = client.post(EMBEDDINGS, json=ask("a user's secret", user="Ann Example"))
        check_error(got, 429, "rate_limited")
        assert int(got.headers["retry-after"]) >= 99
        check_error(client.post(CHAT, json=body("a user's secret", user="Ann Example")), 429, "rate_limited")
        assert client.post(EMBEDDINGS, json=ask("hello", user="bob")).status_code == 200
    path = engine.folder / "journal" / "gateway-0.ndjson"
    engine.until(lambda: path.read_bytes().count(b'"Charge"') == 3)
    assert b"secret" not in path.read_bytes() and b"Example" not in path.read_bytes(), "facts, never text"
    assert replay(path).identical


def test_a_server_without_an_encoder_says_so(engine: Engine) -> None:
    with engine.http() as client:
        assert "no encoder runs here" in check_error(client.post(EMBEDDINGS, json=ask()), 404, "not_found", "model")
    with engine.official() as client, pytest.raises(openai.NotFoundError):
        client.embeddings.create(**ask())


def test_a_draining_server_takes_no_more(started: Starter) -> None:
    engine = started()
    asyncio.run_coroutine_threadsafe(engine.inside.drain(), engine.loop).result(20)
    with engine.http() as client:
        check_error(client.post(EMBEDDINGS, json=ask()), 503, "draining")


def test_no_more_are_let_in_than_fit(encoding: Engine) -> None:
    """The same room as for everybody else."""
    most = encoding.inside.app._limits.max_in_flight
    with encoding.http() as client:
        encoding.call(lambda: setattr(encoding.inside.app._rooms, "taken", most))
        try:
            check_error(client.post(EMBEDDINGS, json=ask()), 503, "overloaded")
        finally:
            encoding.call(lambda: setattr(encoding.inside.app._rooms, "taken", 0))


def test_an_encoder_that_is_late_is_504_and_one_that_is_lost_503(
    encoding: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Last in this file: it leaves no encoder behind."""
    client = client_of(encoding)
    with encoding.http() as http, ThreadPoolExecutor(1) as pool:
        encoding.call(lambda: client.drill(Drill(hang=True)))
        with monkeypatch.context() as patch:
            patch.setattr(app_module, "ENCODE_WITHIN_S", 0.2)
            check_error(http.post(EMBEDDINGS, json=ask("are you deaf?")), 504, "deadline_exceeded")
        asked = pool.submit(http.post, EMBEDDINGS, json=ask("are you there?"))
        encoding.until(lambda: client.stats().open == 2)
        asyncio.run_coroutine_threadsafe(client.stop(), encoding.loop).result(60)
        got = asked.result()
        check_error(got, 503, "breaker_open")
        assert got.headers["retry-after"] == "1"
        check_error(http.post(EMBEDDINGS, json=ask("anybody?")), 503, "breaker_open")
        assert http.post(EMBEDDINGS, json=ask(TEXTS[0])).status_code == 200, "what is known needs no encoder"


# ---------------------------------------------------------------- bodies


def test_bodies_become_texts_and_vectors_words() -> None:
    def decoded(**more: Any) -> Any:
        return decode_embedding(json.dumps(ask(**more)).encode())

    assert decoded(texts="a").texts == ["a"] and decoded(texts=["a", "b"], user="u").texts == ["a", "b"]
    assert decoded(dimensions=None).encoding_format is None
    with pytest.raises(RequestError):
        decoded(texts=None)
    got = json.loads(embedding_list([np.array([0.5, -2.0])], "base64", "m", 7))
    assert got["usage"] == {"prompt_tokens": 7, "total_tokens": 7}
    assert base64.b64decode(got["data"][0]["embedding"]) == b"\x00\x00\x00\x3f\x00\x00\x00\xc0"

"""The memo of bodies: bounded, least recently asked first; and what comes out of it is what reading anew would give.

Caught: tags, or the tenant, missing from its key; the draw of the first request used again; labels, wide characters
and an entry's own parts that were not counted.
"""

from __future__ import annotations

import gc
import json
import tracemalloc

import msgspec
import pytest

from engine.events import Arrive
from engine.service.memo import Asked, Memo, bytes_of
from engine.service.openai import decode_chat
from tests.service.harness import CHAT, Engine, body


def key_of(number: int, size: int = 100) -> tuple[str, str, str, tuple[str, ...], bytes]:
    return CHAT, "shop", "chat", (), b"%d" % number + b" " * (size - len(str(number)))


def asked(tokens: int = 10) -> Asked:
    facts = Arrive(0, "r", "shop", "chat", 0, tokens, 5)
    return Asked(decode_chat(json.dumps(body("x")).encode()), facts, [1] * tokens, "x")


def test_it_holds_no_more_than_it_may_and_forgets_who_was_not_asked_for_longest() -> None:
    each = bytes_of(key_of(0), asked())
    memo = Memo(most_bytes=3 * each)
    for number in range(3):
        memo.keep(key_of(number), asked())
    assert memo.find(key_of(0)) is not None
    memo.keep(key_of(3), asked())
    assert [number for number in range(4) if memo.find(key_of(number))] == [0, 2, 3]
    assert (len(memo), memo.held_bytes) == (3, 3 * each)
    memo.keep(key_of(4, size=10_000), asked(1000))  # more than all of it: nothing stays, itself included
    assert (len(memo), memo.held_bytes) == (0, 0)


@pytest.mark.parametrize(
    ("tokens", "more"),
    [
        (10, {}), (500, {}), (10, {"metadata": {f"k{n}": "" for n in range(500)}}),
        (10, {"metadata": {str(n): f"v{n}" for n in range(100)}}), (10, {"user": "\U0001f600" + "e" * 1000}),
        (10, {"stop": ["ab", "bc", "cd", "ef"]}),
    ],
)  # fmt: skip
def test_what_it_holds_is_counted_not_guessed_from_the_body(tokens: int, more: dict[str, object]) -> None:
    """Against what Python's allocator says, after a first one whose shared parts are not counted twice."""
    memo = Memo(most_bytes=1 << 30)

    def keep(number: int) -> None:
        data = json.dumps(body(f"question {number}", **more)).encode()
        blocks = tuple(b"%08d%08d" % (number, at) for at in range(tokens // 16))
        facts = Arrive(number, f"req-{number}", "shop", "chat", 0, tokens, 5, exact_key=data[:16], blocks=blocks)
        prompt = [1000 + number * tokens + at for at in range(tokens)]
        memo.keep((CHAT, "shop", "chat", (), data), Asked(decode_chat(data), facts, prompt, f"question {number}"))

    keep(0)
    counted = memo.held_bytes
    gc.collect()
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    for number in range(1, 101):
        keep(number)
    gc.collect()
    taken = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert taken <= memo.held_bytes - counted <= 2 * taken


def test_what_is_remembered_is_what_would_be_read(engine: Engine) -> None:
    """All facts, the draw under the new name included."""
    facts = engine.inside.app._facts
    conversation = [{"role": "user", "content": "the same question"}]
    ask = decode_chat(json.dumps(body("the same question")).encode())
    rest = ("shop", "chat", conversation, ask.params(), None)
    first, _ = facts.arrive(1, "first", *rest, 10, "somebody", ("a-tag",))
    second, _ = facts.arrive(2, "second", *rest, 20, "somebody", ("a-tag",))
    assert facts.again(first, 2, "second", 20) == second != first


@pytest.mark.parametrize("differs", ["tenant", "class", "tags", "body", "path"])
def test_only_the_same_request_of_the_same_tenant_is_the_same(engine: Engine, differs: str) -> None:
    """Each part of the key by a real request: what differs is read anew, and answered as what it is."""
    memo = engine.inside.app._memo
    said = body(f"the same but for its {differs}")
    with engine.http() as client:
        assert client.post(CHAT, json=said).status_code == 200
        held = engine.call(lambda: len(memo))
        assert client.post(CHAT, json=said).headers["x-doorbuster-tier"] == "exact"
        assert engine.call(lambda: len(memo)) == held
        if differs == "class":
            assert client.post(CHAT, json=said, headers={"x-doorbuster-class": "hasty"}).status_code == 200
        elif differs == "tags":
            assert client.post(CHAT, json=said, headers={"x-doorbuster-tags": "other"}).status_code == 200
        elif differs == "body":
            assert client.post(CHAT, content=json.dumps(said) + " ").status_code == 200
        elif differs == "path":
            got = client.post("/v1/completions", json={"model": "default", "prompt": f"but for its {differs}"})
            assert got.status_code == 200
    if differs == "tenant":
        with engine.http("bank", **{"x-doorbuster-class": "chat"}) as bank:
            assert bank.post(CHAT, json=said).headers["x-doorbuster-tier"] != "exact"
    assert engine.call(lambda: len(memo)) == held + 1
    engine.quiet()


def test_what_was_refused_is_refused_again(engine: Engine) -> None:
    memo, held = engine.inside.app._memo, len(engine.inside.app._memo)
    with engine.http() as client:
        for _ in range(2):
            assert client.post(CHAT, json=body("x", n=2)).status_code == 400
            assert client.post(CHAT, json={**body("x"), "model": "gpt-9"}).status_code == 404
    assert len(memo) == held


def test_a_sample_without_a_seed_is_drawn_anew_from_a_remembered_body() -> None:
    ask = decode_chat(json.dumps(body("x", temperature=1)).encode())
    assert msgspec.structs.asdict(ask.drawable()) != msgspec.structs.asdict(ask.drawable())

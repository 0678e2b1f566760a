"""Bodies that are made to hurt: right status, stable code, no work, no 500, and no byte of them in a log.

``test_openai.py`` has the decoder's own cases; here they come over a socket and through all of the ingress. Caught: a
compressed body that is taken for a plain one.
"""

from __future__ import annotations

import gzip
import json
import logging
from collections.abc import Callable
from typing import Any

import pytest

from tests.service.harness import CHAT, Engine, body, check_error

MARK = "s3cr3t-mark"


def said(**more: Any) -> bytes:
    return json.dumps(body(MARK, **more)).encode()


def with_raw(field: bytes) -> bytes:
    """A good body with one more field, spelt as no encoder would."""
    return said()[:-1] + b"," + field + b"}"


BODIES: dict[str, bytes] = {
    "lists 10,000 deep": with_raw(b'"tools":' + b"[" * 4_900 + b"]" * 4_900),
    "a message 9,000 deep": b'{"model":"default","messages":' + b"[" * 9_000 + b"]" * 9_000 + b"}",
    "objects 3,000 deep": with_raw(b'"tools":' + b'{"a":' * 3_000 + b"1" + b"}" * 3_000),
    "lists without end": with_raw(b'"tools":' + b"[" * 15_000)[:-1],
    "not UTF-8": said().replace(MARK.encode(), b"\xff" + MARK.encode()),
    "overlong UTF-8": said().replace(MARK.encode(), b"\xc0\xaf" + MARK.encode()),
    "a surrogate in UTF-8": said().replace(MARK.encode(), b"\xed\xa0\x80" + MARK.encode()),
    "UTF-16": said().decode().encode("utf-16"),
    "a lone high surrogate": said().replace(MARK.encode(), b"\\ud800" + MARK.encode()),
    "a lone low surrogate": said().replace(MARK.encode(), b"\\udc00" + MARK.encode()),
    "surrogates the wrong way round": said().replace(MARK.encode(), b"\\udc00\\ud800" + MARK.encode()),
    "a byte order mark": b"\xef\xbb\xbf" + said(),
    "NUL before it": b"\x00" + said(),
    "NUL behind it": said() + b"\x00",
    "a raw NUL in a string": said().replace(MARK.encode(), b"\x00" + MARK.encode()),
    "a raw line feed in a string": said().replace(MARK.encode(), b"\n" + MARK.encode()),
    "NaN": with_raw(b'"temperature":NaN'),
    "Infinity": with_raw(b'"temperature":Infinity'),
    "minus Infinity": with_raw(b'"top_p":-Infinity'),
    "a number beyond a double": with_raw(b'"temperature":1e999'),
    "a number of 10,000 digits": with_raw(b'"max_tokens":' + b"9" * 10_000),
    "a thousand million tokens as text": with_raw(b'"max_tokens":"1e9"'),
    "a thousand million tokens as a float": with_raw(b'"max_tokens":1e9'),
    "1e400 tokens": with_raw(b'"max_tokens":1e400'),
    "fewer than no tokens": said(max_tokens=-1),
    "no tokens": said(max_tokens=0),
    "tokens beyond 32 bits": said(max_tokens=2**31),
    "tokens beyond 64 bits": said(max_tokens=2**64),
    "a part of a token": said(max_tokens=1.5),
    "true tokens": said(max_tokens=True),
    "a list of tokens": said(max_tokens=[1]),
    "two documents": said() + said(),
    "a number": b"17",
    "null": b"null",
    "a comment": said()[:-1] + b"/* */}",
    "a comma too many": said()[:-1] + b",}",
    "single quotes": said().replace(b'"', b"'"),
    "a form": b"model=default&messages=" + MARK.encode(),
}  # fmt: skip


@pytest.mark.parametrize("name", BODIES)
def test_a_body_that_is_made_to_hurt_is_a_clear_400(
    engine: Engine, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    before = engine.stats()
    with caplog.at_level(logging.DEBUG), engine.http() as client:
        got = client.post(CHAT, content=BODIES[name], headers={"content-type": "application/json"})
    message = check_error(got, 400, "invalid_request", got.json()["error"]["param"])
    assert MARK not in message and len(got.content) < 1000
    assert MARK not in caplog.text
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert engine.stats() == before
    engine.quiet()


def test_a_thousand_million_tokens_are_cut_to_what_the_class_allows(engine: Engine) -> None:
    with engine.http() as client:
        for many in (10**9, 2**31 - 1):
            got = client.post(CHAT, content=said(max_tokens=many))
            assert got.status_code == 200 and got.json()["usage"]["completion_tokens"] < 200


def test_of_two_equal_keys_the_last_holds(engine: Engine) -> None:
    """RFC 8259 leaves it open and nobody in front of us decides by the body; what is decided is decided once."""
    with engine.http() as client:
        got = client.post(CHAT, content=with_raw(b'"max_tokens":5,"max_tokens":1'))
        assert got.json()["usage"]["completion_tokens"] == 1


def zipped(size: int) -> bytes:
    return gzip.compress(b" " * size)


@pytest.mark.parametrize(
    ("coding", "make"),
    [("gzip", lambda: zipped(10_000_000)), ("deflate", lambda: b"x"), ("br", lambda: b"x"), ("GZIP, identity", said)],
)  # fmt: skip
def test_what_is_compressed_is_not_unpacked(engine: Engine, coding: str, make: Callable[[], bytes]) -> None:
    before = engine.stats()
    with engine.http() as client:
        got = client.post(CHAT, content=make(), headers={"content-encoding": coding})
        check_error(got, 415, "unsupported_encoding", "content-encoding")
        assert client.post(CHAT, content=said(), headers={"content-encoding": "identity"}).status_code == 200
    assert engine.stats().arrived == before.arrived + 1

"""Events from bytes: in pieces as in one, by the rules as far as this protocol uses them; and headers that say when.

Mutations it caught: a CRLF that is cut in two; a lone CR; a comment as data; data that is not joined; no limit.
"""

from __future__ import annotations

import email.utils

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.service.eventstream import MAX_EVENT_BYTES, EventStream
from engine.service.upstream_call import retry_after_ns
from engine.units import S_NS
from engine.upstream_config import UpstreamConfig

LINES = st.sampled_from([b"data: one", b"data:two", b"data", b"data:  three", b": a comment", b"event: x", b"id", b"",
                         "data: f\u00fcr".encode(), b"other: data: x", b"retry: 10", b"data: a:b"])
ENDS = st.sampled_from([b"\n", b"\r\n", b"\r"])


def naive(lines: list[bytes]) -> list[str]:
    """The rules, line by line."""
    out: list[str] = []
    data: list[str] = []
    for line in lines:
        if not line:
            out += ["\n".join(data)] if data else []
            data = []
        elif line.split(b":")[0] == b"data":
            value = line.decode().partition(":")[2]
            data.append(value[1:] if value.startswith(" ") else value)
    return out


@given(lines=st.lists(st.tuples(LINES, ENDS), max_size=30), cuts=st.lists(st.integers(1, 9), max_size=200))
def test_in_pieces_as_in_one(lines: list[tuple[bytes, bytes]], cuts: list[int]) -> None:
    pairs = [*lines, (b"", b"\n")]
    # a CR before an LF would be one end of a line, not two
    pairs = [(line, b"\r\n" if end == b"\r" and not after else end)
             for (line, end), (after, _) in zip(pairs, [*pairs[1:], (b"x", b"")], strict=True)]
    raw = b"".join(line + end for line, end in pairs)
    stream, got = EventStream(), []
    for size in [*cuts, len(raw)]:
        got += stream.feed(raw[:size])
        raw = raw[size:]
    assert got == naive([line for line, _ in pairs])


def test_what_never_ends_is_no_event() -> None:
    for part, size in ((b"x" * 1000, 1000), (b"data: " + b"x" * 1000 + b"\n", 1000)):
        stream = EventStream()
        for _ in range(MAX_EVENT_BYTES // size):
            assert stream.feed(part) == []
        with pytest.raises(ValueError, match="more than"):
            stream.feed(part)
    with pytest.raises(ValueError, match="utf-8"):
        EventStream().feed(b"data: \xff\n\n")


@pytest.mark.parametrize(
    ("said", "seconds"), [(None, 0), ("2", 2), (" 7 ", 7), ("soon", 0), ("-3", 0), ("99999", 3600)]
)
def test_when_to_come_again(said: str | None, seconds: int) -> None:
    assert retry_after_ns(said, 1_700_000_000.0) == seconds * S_NS


def test_a_date_to_come_again() -> None:
    now_s = 1_700_000_000.0
    assert retry_after_ns(email.utils.formatdate(now_s + 30, usegmt=True), now_s) == 30 * S_NS
    assert retry_after_ns(email.utils.formatdate(now_s - 30, usegmt=True), now_s) == 0


@pytest.mark.parametrize("url", ["http://a:1/x", "http://a:1/x/", "http://a:1/x/v1", "http://a:1/x/v1/"])
def test_with_or_without_v1(url: str) -> None:
    assert UpstreamConfig(url=url).root == "http://a:1/x"

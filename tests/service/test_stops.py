"""Stop strings: in pieces as in one, cut where a plain search of the whole text says; and a tape of real tokens.

Run: python -m pytest tests/service/test_stops.py -q
"""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from engine.events import EndReason
from engine.model.smalllm import small_tokenizer
from engine.model.stepping import TokenLogprobs
from engine.model.tokenizer import Detokenizer
from engine.service.stops import StopStrings, cut
from engine.service.stream import ClientStream, Logged, Tape, joined

TEXTS = st.text("abé ", max_size=30)
STOPS = st.lists(st.text("abé ", min_size=1, max_size=5), max_size=4).map(tuple)


def plain_cut(text: str, stops: tuple[str, ...]) -> tuple[str, bool]:
    """Letter by letter: the first end of a stop string, the longest that ends there."""
    for end in range(len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end - len(stop)], True
    return text, False


def in_pieces(text: str, cuts: list[int]) -> list[str]:
    borders = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    return [text[a:b] for a, b in pairwise(borders)]


@settings(max_examples=1500, deadline=None)
@given(text=TEXTS, stops=STOPS, cuts=st.lists(st.integers(1, 29), max_size=30))
@example(text="xab", stops=("ab", "xaby"), cuts=[1, 2])  # found at once the longer one would win
@example(text="aab", stops=("ab",), cuts=[1, 2])
@example(text="aaab", stops=("aab",), cuts=[1, 2, 3])
def test_pieces_are_cut_where_the_whole_text_is(text: str, stops: tuple[str, ...], cuts: list[int]) -> None:
    want, hit = plain_cut(text, stops)
    matcher, sent, read = StopStrings(stops), "", ""
    for piece in in_pieces(text, cuts):
        sent, read = sent + matcher.push(piece), read + piece
        assert want.startswith(sent), "never what a stop string takes away"
        possible = {n for stop in stops for n in range(1, len(stop)) if read.endswith(stop[:n])}
        if not matcher.hit:
            assert len(read) - len(sent) == max(possible, default=0), "no more is held back than could be one"
    assert (sent + matcher.flush(), matcher.hit) == (want, hit)
    assert cut(text, stops) == want
    assert not hit or matcher.push("more") == ""


# ---------------------------------------------------------------- tapes


def played(
    text: str, stops: tuple[str, ...] = (), seed: int | None = None, logs: bool = False, reason: EndReason = "length"
) -> tuple[Tape, ClientStream, list[bool]]:
    """A text as tokens, in random portions, on a tape with one listener."""
    tokenizer = small_tokenizer()
    ids = tokenizer.encode(text)
    tape, stream, told, at = Tape(Detokenizer(tokenizer), stops), ClientStream(0, "r"), [], 0
    tape.attach(stream)
    sizes = random.Random(seed)
    while at < len(ids):
        part = ids[at : at + (1 if seed is None else sizes.randint(1, 4))]
        at += len(part)
        said = [TokenLogprobs(-float(token), [(token, -float(token)), (5, -9.0)]) for token in part]
        told.append(tape.record(part, said if logs else ()))
    tape.close(reason, 16)
    return tape, stream, told


TEXT = "The blue kettle fits.\n\nGrüße 🎉 and thanks"


@pytest.mark.parametrize("seed", [None, 1, 2])
@pytest.mark.parametrize("logs", [False, True])
@pytest.mark.parametrize(
    ("stops", "want"),
    [
        (("\n\n",), "The blue kettle fits."), (("🎉",), "The blue kettle fits.\n\nGrüße "), (("The",), ""),
        (("ttle fi", "kett"), "The blue "), (("not there", "thanks!"), TEXT), ((), TEXT),
    ],
)
def test_a_tape_ends_before_a_stop_string(seed: int | None, logs: bool, stops: tuple[str, ...], want: str) -> None:
    tape, stream, told = played(TEXT, stops, seed, logs)
    assert (tape.text, tape.cut) == (want, want != TEXT)
    assert (stream.take().text, stream.reason, stream.cached_tokens) == (want, "stop" if tape.cut else "length", 16)
    assert sum(told) == tape.cut, "the replica is told once"
    assert stream.output_tokens == tape.tokens
    assert tape.reason == stream.reason


def test_tokens_are_counted_up_to_the_one_that_completes_the_stop_string() -> None:
    ids = small_tokenizer().encode(TEXT)
    for seed in (None, 1, 2, 3):
        tape, *_ = played(TEXT, ("\n\n",), seed)
        assert "\n\n" in small_tokenizer().decode(ids[: tape.tokens])
        assert "\n\n" not in small_tokenizer().decode(ids[: tape.tokens - 1])


@pytest.mark.parametrize("reason", ["aborted", "length", "lost", "failed"])
def test_a_text_that_is_cut_is_complete_however_its_submission_ends(reason: EndReason) -> None:
    tape, stream, _ = played(TEXT, ("kettle",), reason=reason)
    assert (tape.reason, stream.reason) == ("stop", "stop")
    assert played(TEXT, ("?",), reason=reason)[0].reason == reason


def test_what_was_held_back_for_a_stop_string_comes_at_the_end() -> None:
    tape, stream, _ = played("end of the li", ("line", "\n"))
    assert stream.take().text == "end of the li" == tape.text
    half = small_tokenizer().encode("ab🎉")[:-1]
    tape = Tape(Detokenizer(small_tokenizer()), ("\ufffd",))
    tape.record(half)
    tape.close("length", 0)
    assert (tape.text, tape.reason) == ("ab", "stop"), "even one that is half a character"


def test_one_that_attaches_late_hears_what_is_certain_and_no_more() -> None:
    tokenizer = small_tokenizer()
    tape, late = Tape(Detokenizer(tokenizer), ("fits.",)), ClientStream(1, "late")
    ids = tokenizer.encode("The blue kettle fits. Well")
    cutting = next(n for n in range(len(ids)) if "fits." in tokenizer.decode(ids[: n + 1]))
    tape.record(ids[:cutting])
    tape.attach(late)
    assert late.take().text == tape.text and "The blue kettle ".startswith(tape.text)
    assert tape.record(ids[cutting:])
    tape.close("aborted", 0)
    assert tape.text == "The blue kettle "
    assert late.output_tokens == tape.tokens == cutting + 1


@pytest.mark.parametrize("seed", [None, 1, 2, 3])
@pytest.mark.parametrize("stops", [(), ("\n\n",), ("🎉 and",), ("zzz",), ("fits?", "Gr?")])
def test_logprobs_belong_to_the_tokens_whose_text_is_sent(seed: int | None, stops: tuple[str, ...]) -> None:
    tokenizer = small_tokenizer()
    tape, stream, _ = played(TEXT, stops, seed, logs=True)
    logs: tuple[Logged, ...] = joined(stream.pieces).logprobs
    ids = tokenizer.encode(TEXT)[: len(logs)]
    assert [log.token for log in logs] == [tokenizer.token_bytes(token) for token in ids]
    assert [log.logprob for log in logs] == [-float(token) for token in ids]
    assert [log.top[0][0] for log in logs] == [log.token for log in logs]
    said = b"".join(log.token for log in logs)
    assert said.startswith(tape.text.encode()), "nothing that is said is without"
    assert len(said) - len(logs[-1].token) < len(tape.text.encode()), "and nothing beyond it is with"
    for log in logs:
        assert said.decode("utf-8", "ignore")[log.offset :].startswith(log.token.decode("utf-8", "ignore"))
    assert all(piece.logprobs or not piece.text for piece in stream.pieces)

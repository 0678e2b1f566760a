"""Marks of a text: what makes them equal, what makes them differ, and that nothing makes them fail."""

from __future__ import annotations

import csv

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.events import TextMarks
from engine.model.blockhash import Hasher
from engine.model.lexicon import POLES, stem
from engine.model.quantities import quantities_of
from engine.model.textmarks import MARK_BYTES, marks_of
from engine.policy.vetoes import vetoed
from engine.scenario import data_path

HASHER = Hasher(b"k" * 16, 16)


def marks(text: str, *names: str) -> TextMarks:
    return marks_of(text, HASHER, frozenset(names))


def digests(*words: str) -> bytes:
    return b"".join(sorted(HASHER.digest("word", word)[:MARK_BYTES] for word in words))


SAME_NUMBERS = [
    ("it came 10 min ago", "it came ten minutes ago"), ("in 2 weeks", "within 14 days"), ("24 hours", "1 day"),
    ("an hour ago", "1 hr ago"), ("charged 2x", "charged twice"), ("charged 2 times", "charged twice"),
    ("€20 off", "20 euros off"), ("20€ off", "20 eur off"), ("20 % off", "20 percent off"),
    ("twenty five things", "25 things"), ("two hundred and", "200 and"),
    ("at 8pm", "at 20:00"), ("at 8 pm", "at 8:00 pm"),
    ("number 4,312 in line", "number 4312 in line"), ("costs 4.90", "costs 4,90"), ("my 2nd try", "my second try"),
    ("on monday", "on Mon"), ("1.5 kg", "1500 g"), ("5-7 days", "five to seven days"),
    ("the other one", "the other"), ("last week", "past week"),
]  # fmt: skip
OTHER_NUMBERS = [
    ("in 2 weeks", "in 3 weeks"), ("10 days", "10 hours"), ("on monday", "on tuesday"), ("5-7 days", "2-3 days"),
    ("55x40x20", "40x30x20"), ("20 euro", "200 euro"), ("in march", "in july"), ("last week", "last year"),
    ("for weeks", "for months"), ("at 8 am", "at 8 pm"), ("charged", "charged twice"), ("20 %", "20 euro"),
]  # fmt: skip


@pytest.mark.parametrize(("one", "other"), SAME_NUMBERS)
def test_numbers_that_mean_the_same_are_the_same(one: str, other: str) -> None:
    assert marks(one).numbers == marks(other).numbers


@pytest.mark.parametrize(("one", "other"), OTHER_NUMBERS)
def test_other_numbers_differ(one: str, other: str) -> None:
    assert marks(one).numbers != marks(other).numbers


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ten minutes", ["time:600"]), ("5 to 7 days", ["time:432000", "time:604800"]), ("no 4312", ["4312"]),
        ("seventy two", ["72"]), ("three thousand", ["3000"]), ("5k", ["5000"]), ("1,5", ["1.5"]), ("1,500", ["1500"]),
        ("b12 3d x200", []), ("noon", ["date:noon"]), ("in may", ["date:may"]), ("may i", []),
    ],
)  # fmt: skip
def test_quantities(text: str, expected: list[str]) -> None:
    assert quantities_of(text.split())[0] == expected


NEGATION = [  # deny the same: no veto either way
    ("Why isn't my id verified?", "why can't my ID be verified"), ("i cant log in", "I am unable to log in"),
    ("why didnt my top up work", "Why did my top-up not work?"),
    ("I don't know why it was declined", "why was it declined"),
    ("no idea where my parcel is", "where is my parcel"), ("is it on or not", "is it on"),
    ("order no. 3 is gone", "order 3 is gone"), ("w/o the cable", "without the cable"),
    ("I’m not able to pay", "I am unable to pay"), ("my card was not accepted", "my card was declined"),
]  # fmt: skip
DENIAL = [  # one denies what the other says
    ("the lamp works with the case", "the lamp works without the case"), ("i havent paid", "i have paid"),
    ("it did not open", "it opened"), ("flowers please", "flowers no"),
    ("the parcel was opened", "the parcel was unopened"),
    ("the bag was not in the box, the rest was there", "the bag was in the box, the rest was not delivered"),
    ("the blades may be washed", "everything but the blades may be washed"), ("it was declined", "it was not declined"),
    ("the money is not gone but I got a mail", "the money is gone but I got no mail"),
]  # fmt: skip


@pytest.mark.parametrize(("one", "other"), NEGATION)
def test_texts_that_deny_the_same_may_share(one: str, other: str) -> None:
    assert not vetoed(("negation",), marks(one), marks(other))


@pytest.mark.parametrize(("one", "other"), DENIAL)
def test_a_denial_keeps_texts_apart(one: str, other: str) -> None:
    assert vetoed(("negation",), marks(one), marks(other))
    assert vetoed(("negation",), marks(other), marks(one))


OPPOSITES = [
    ("before the sale", "after the sale"), ("with gps on", "with gps off"),
    ("went up and then down", "went down and then up"),
    ("credit instead of money", "money instead of credit"), ("is it in stock", "is it out of stock"),
    ("the cheapest one", "the dearest one"), ("it is correct", "it is not correct"), ("lock it", "unlock it"),
]  # fmt: skip
NO_OPPOSITES = [
    ("is it up or down", "is it down or up"), ("it is wrong", "it is not correct"), ("the first one", "the first"),
    ("up and down", "up"), ("the best before the sale", "before the sale the best"),
]  # fmt: skip


@pytest.mark.parametrize(("one", "other"), OPPOSITES)
def test_opposites_keep_texts_apart(one: str, other: str) -> None:
    assert vetoed(("opposites",), marks(one), marks(other))


@pytest.mark.parametrize(("one", "other"), NO_OPPOSITES)
def test_what_is_no_opposite(one: str, other: str) -> None:
    assert not vetoed(("opposites",), marks(one), marks(other))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Where is it. Is the Hoverfell Kettle in?", ("hoverfell", "kettl")), ("where is the hoverfell kettle", ()),
        ("WHERE IS MY KETTLE", ()), ("does FLASH20 work", ("flash20",)), ("my 3d popup", ("3d",)), ("I am ok, I'm", ()),
        ("on Monday or in May", ()), ("does it take Visa", ("visa",)), ("a red one", ("red",)), ("12 kg", ()),
    ],
)  # fmt: skip
def test_names(text: str, expected: tuple[str, ...]) -> None:
    assert marks(text).names == digests(*expected)


def test_names_of_a_catalogue_need_no_capital() -> None:
    assert marks("the hoverfell kettle", "hoverfell", "kettle").names == digests("hoverfell", "kettl")
    assert marks("HOVERFELL!", "hoverfell").names == digests("hoverfell")


def test_words_are_folded_and_stop_words_left_out() -> None:
    assert marks("Where are the parcels?").words == marks("where is a parcel").words == digests("parcel")
    assert [stem(word) for word in ("returned", "returns", "returning", "return")] == ["return"] * 4


def test_another_key_gives_other_digests() -> None:
    assert marks_of("a parcel", Hasher(b"x" * 16, 16)).words != marks("a parcel").words


def test_no_word_is_a_side_of_a_pair_and_its_own_opposite() -> None:
    assert all(-pole not in poles for poles in POLES.values() for pole in poles)


def check(found: TextMarks) -> None:
    for joined in (found.words, found.numbers, found.names):
        parts = [joined[at : at + MARK_BYTES] for at in range(0, len(joined), MARK_BYTES)]
        assert parts == sorted(set(parts)) and all(len(part) == MARK_BYTES for part in parts)
    assert list(found.poles) == sorted(set(found.poles))
    assert all(-pole not in found.poles for pole in found.poles)
    assert all(-(1 << 63) < pole < 1 << 63 for pole in found.poles)


PIECES_OF_TEXT = (
    "no not never but 5 7 - to 12:30 8pm € % 2x a an hour day up down or instead of Hoverfell 3rd unopened ' . , ? w/o "
    "isn't two hundred twenty may in stock 1.000,5 55x40 x failed 12: :3 ²"
)
PIECES = st.sampled_from(PIECES_OF_TEXT.split())


@given(st.one_of(st.text(max_size=80), st.lists(PIECES, max_size=14).map(" ".join), st.lists(PIECES).map("".join)))
def test_any_text_has_marks_that_share_with_themselves(text: str) -> None:
    found = marks(text)
    check(found)
    assert found == marks(text)
    assert not vetoed(("numbers", "negation", "names", "opposites"), found, found)


@given(st.lists(PIECES, max_size=14))
def test_white_space_makes_no_difference(pieces: list[str]) -> None:
    assert marks(" ".join(pieces)) == marks("  " + " \n\t".join(pieces) + " ")


@given(st.sampled_from([text for pair in NEGATION + DENIAL + OPPOSITES + SAME_NUMBERS for text in pair]))
def test_case_makes_no_difference_but_to_names(text: str) -> None:
    lower, upper = marks(text.lower()), marks(text.upper())
    for name in ("words", "numbers", "negations", "poles"):
        assert getattr(lower, name) == getattr(upper, name)


def test_every_question_of_the_corpus_has_sound_marks() -> None:
    with data_path("corpora", "questions.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            check(marks(row["text"]))

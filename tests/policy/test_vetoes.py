"""Vetoes compare marks. Pairs of questions through the real marks, and each veto by itself.

Run: python -m pytest tests/policy/test_vetoes.py -q
"""

from __future__ import annotations

import pytest

from engine.cache_config import SemanticConfig, Veto
from engine.events import TextMarks
from engine.model.blockhash import Hasher
from engine.model.textmarks import marks_of
from engine.policy.fixed import FixedRule
from engine.policy.rules import Candidate
from engine.policy.vetoes import vetoed

HASHER = Hasher(b"k", 16)
DIFFER: list[tuple[Veto, str, str]] = [
    ("numbers", "does the code give 20 % off", "does the code give 30 % off"),
    ("numbers", "is it here in two days", "is it here in three days"),
    ("negation", "my refund has arrived", "my refund has not arrived"),
    ("negation", "can i return sale items", "cant i return sale items"),
    ("opposites", "do you ship before christmas", "do you ship after christmas"),
]
ALIKE = [
    ("is the kettle in stock?", "Is the kettle in stock"),
    ("it takes 2 days, right", "it takes two days, right"),
    ("i haven't got my parcel", "i have not got my parcel"),
]


@pytest.mark.parametrize(("veto", "one", "other"), DIFFER)
def test_what_differs_is_vetoed_both_ways_round(veto: Veto, one: str, other: str) -> None:
    a, b = marks_of(one, HASHER), marks_of(other, HASHER)
    assert vetoed((veto,), a, b) and vetoed((veto,), b, a)
    assert not vetoed((), a, b)


@pytest.mark.parametrize(("one", "other"), ALIKE)
def test_the_same_in_other_words_is_not(one: str, other: str) -> None:
    assert not vetoed(("numbers", "negation", "opposites"), marks_of(one, HASHER), marks_of(other, HASHER))


def test_a_vetoed_neighbour_does_not_hide_the_next_one() -> None:
    rule = FixedRule(SemanticConfig(cosine=0.9))
    bad = Candidate((b"h", b"1"), 990_000, "a1", TextMarks(numbers=b"0020"))
    good = Candidate((b"h", b"2"), 950_000, "a2", TextMarks())
    assert rule.judge(TextMarks(), [bad, good], False, 0).serve == 1

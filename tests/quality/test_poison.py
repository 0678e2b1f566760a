"""A poisoner's victims with and without quarantine, on the corpus' own questions and the real encoder.

Run: python -m pytest tests/quality/test_poison.py -q
"""

from __future__ import annotations

import pytest

from sim.quality.poison import drill
from sim.quality.questions import Questions, own_corpus


@pytest.fixture(scope="module")
def questions() -> Questions:
    return own_corpus()[0]


def test_without_quarantine_others_are_served_what_was_planted(questions: Questions) -> None:
    assert drill(questions, 0).victims > 100


@pytest.mark.parametrize("others", [1, 2])
def test_with_it_nobody_is_and_the_cache_still_serves(questions: Questions, others: int) -> None:
    harm = drill(questions, others)
    assert harm.victims == 0
    assert harm.served > 500
    assert harm.quarantined >= 100, "what was planted stays where it is"

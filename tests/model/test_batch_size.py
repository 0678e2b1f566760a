"""How many texts an encoder takes at once.

Run: python -m pytest tests/model/test_batch_size.py -q
Mutations it caught: one batch, not two, in the time of the least patient; the most patient's time; who asked long ago
still counts; no batch at all for somebody who has hardly any time; more than the most; a batch that was not full is
reason for more.
"""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from engine.model.batch_size import LATELY, TRIES_AFTER, BatchSize
from engine.units import MS_NS

FIXED_NS, TEXT_NS = 3_630_688, 5_219_150  # of MiniLM on one core


def sizes(within_ns: int, fixed_ns: int = FIXED_NS, text_ns: int = TEXT_NS, most: int = 8) -> list[int]:
    """Full batches without end at such a pace; the last hundred."""
    size = BatchSize(most)
    size.asked(within_ns)
    seen = []
    for _ in range(50 + 100):
        seen.append(size.next())
        size.took(seen[-1], fixed_ns + seen[-1] * text_ns)
    return seen[50:]


def test_two_batches_fit_into_the_time() -> None:
    fifty = sizes(50 * MS_NS)
    assert set(fifty) == {4, 5} and fifty.count(5) <= 100 / TRIES_AFTER, "of four texts: 24.5 ms; of five 29.7"
    assert set(sizes(150 * MS_NS)) == {8} and set(sizes(18 * MS_NS)) == {1, 2}


@given(st.integers(1, 1000), st.integers(0, 100_000_000), st.integers(1, 100_000_000), st.integers(1, 50))
def test_it_stays_at_the_most_that_fits_and_tries_one_more_now_and_then(
    within_ms: int, fixed_ns: int, text_ns: int, most: int
) -> None:
    """Against the answer that the cost itself gives, whatever its shape of fixed and variable."""
    within_ns = within_ms * MS_NS
    fits = [n for n in range(1, most + 1) if 2 * (fixed_ns + n * text_ns) <= within_ns]
    best = max(fits, default=1)
    seen = sizes(within_ns, fixed_ns, text_ns, most)
    assert set(seen) <= {best, min(best + 1, most)}
    assert seen.count(best + 1) <= (len(seen) / TRIES_AFTER if best < most else 0)


def test_it_takes_all_it_may_until_somebody_is_in_a_hurry() -> None:
    size = BatchSize(8)
    size.took(8, 40 * MS_NS)
    assert size.next() == 8, "nobody has said how much time there is"
    size.asked(50 * MS_NS)
    size.took(3, 10 * MS_NS)
    assert size.next() == 8, "ten is quick enough"
    size.took(3, 40 * MS_NS)
    assert size.next() == 2, "three were too many"
    for _ in range(TRIES_AFTER):
        size.took(1, 1 * MS_NS)
    assert size.next() == 2, "a text alone says nothing of three"


def test_the_least_patient_counts_and_only_who_asked_lately() -> None:
    size = BatchSize(8)
    for within_ms in (30_000, 20, 30_000):
        size.asked(within_ms * MS_NS)
    size.took(8, 15 * MS_NS)
    assert size.next() == 7
    for _ in range(LATELY - 1):
        size.asked(30_000 * MS_NS)
    size.took(8, 15 * MS_NS)
    assert size.next() == 7
    for _ in range(TRIES_AFTER):
        size.took(7, 15 * MS_NS)
    assert size.next() == 8

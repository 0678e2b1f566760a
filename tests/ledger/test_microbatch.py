"""The decision to flush against a naive reference. ``pytest tests/ledger/test_microbatch.py``
"""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from engine.ledger.microbatch import MicroBatcher

ROWS, WINDOW_NS = 5, 100


@given(st.lists(st.integers(0, 60), max_size=60), st.lists(st.integers(1, 50), min_size=1, max_size=30))
def test_no_row_waits_longer_than_the_window(gaps: list[int], early: list[int]) -> None:
    """Rows come at any time; looks come when they are due or earlier (a wake), never later."""
    arrivals, at = [], 0
    for gap in gaps:
        at += gap
        arrivals.append(at)
    batcher, now, waiting, turn = MicroBatcher(ROWS, WINDOW_NS), 0, [], 0
    while arrivals or waiting:
        while arrivals and arrivals[0] <= now:
            waiting.append(arrivals.pop(0))
        due = batcher.look(now, len(waiting))
        assert not due or waiting
        if len(waiting) >= ROWS:
            assert due
        if due:
            assert len(waiting) >= ROWS or now - waiting[0] <= WINDOW_NS
            waiting = waiting[ROWS:]
            batcher.flushed(now, len(waiting))
        assert all(now - row < WINDOW_NS for row in waiting) or len(waiting) >= ROWS or not due
        assert batcher.next_look_ns(now) > now or waiting
        turn += 1
        now = min(max(now + 1, batcher.next_look_ns(now)), now + early[turn % len(early)])


def test_a_lone_row_waits_for_the_window_and_the_row_count_does_not() -> None:
    batcher = MicroBatcher(ROWS, WINDOW_NS)
    assert not batcher.look(0, 0)
    assert not batcher.look(60, 1)
    assert batcher.next_look_ns(60) == 100  # it may have come at 1
    assert not batcher.look(99, 4)
    assert batcher.look(100, 4) and batcher.look(99, 5)


def test_a_hurry_flushes_what_waits_and_nothing_else() -> None:
    batcher = MicroBatcher(ROWS, WINDOW_NS)
    assert batcher.look(0, 1, hurried=True) and not batcher.look(0, 0, hurried=True)


def test_rows_left_behind_keep_their_age() -> None:
    batcher = MicroBatcher(ROWS, WINDOW_NS)
    batcher.look(0, 0)
    assert batcher.look(90, 7)
    batcher.flushed(90, 2)
    assert batcher.look(100, 2)

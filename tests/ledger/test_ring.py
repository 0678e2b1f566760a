"""Room, reserved room, and losses told at their place. ``pytest tests/ledger/test_ring.py``
"""

from __future__ import annotations

import threading

from hypothesis import given
from hypothesis import strategies as st

from engine.ledger.record import LossRecord
from engine.ledger.ring import Ring
from engine.records import LevelRecord
from tests.ledger.trace import accounted, click


def test_critical_records_have_places_that_others_cannot_take() -> None:
    ring = Ring(3, 2, 100, lambda: None)
    for n in range(5):
        ring.append(click(n))
    for n in range(5, 9):
        ring.append(click(n), critical=True)
    assert (ring.accepted, ring.dropped) == (5, 4)
    assert ring.take(99, 0) == [
        click(0), click(1), click(2), LossRecord(3, 2, "ClickRecord"),
        click(5), click(6), LossRecord(6, 2, "ClickRecord"),
    ]
    assert not ring.untold and ring.take(99, 8) == []


def test_one_loss_record_a_kind_even_where_nothing_follows() -> None:
    ring = Ring(1, 0, 100, lambda: None)
    ring.append(click(0))
    for n in range(1000):
        ring.append(click(n))
    ring.append(LevelRecord(1, 1))
    assert ring.take(1, 7) == [click(0), LossRecord(8, 1, "LevelRecord"), LossRecord(8, 1000, "ClickRecord")]


def test_the_writer_is_woken_once_when_a_batch_is_complete() -> None:
    woken: list[int] = []
    ring = Ring(10, 0, 3, lambda: woken.append(len(ring)))
    for n in range(8):
        ring.append(click(n))
    assert woken == [3]


@given(st.lists(st.tuples(st.sampled_from(["ordinary", "critical", "level", "take"]), st.integers(1, 5)), max_size=80))
def test_everything_offered_is_in_the_log_or_counted_at_its_place(steps: list[tuple[str, int]]) -> None:
    ring, log, offered, number = Ring(4, 2, 3, lambda: None), [], [], 0
    for what, count in steps:
        if what == "take":
            log += ring.take(count, len(log))
            continue
        for _ in range(count):
            record = LevelRecord(number, 0) if what == "level" else click(number)
            before, number = ring.dropped, number + 1
            room = len(ring) < (6 if what == "critical" else 4)
            ring.append(record, critical=what == "critical")
            assert (ring.dropped == before) == room
            offered.append((record, room))
    while ring.untold or len(ring):
        log += ring.take(3, len(log))
    accounted(log, offered)
    assert ring.accepted + ring.dropped == len(offered)


def test_two_threads_lose_no_count() -> None:
    """The appender never waits while another thread takes: all 300,000 are accounted for, in order."""
    total, ring, log = 300_000, Ring(50, 10, 30, lambda: None), []
    record = click(0)
    done = threading.Event()

    def appender() -> None:
        for n in range(total):
            ring.append(record, critical=n % 7 == 0)
        done.set()

    thread = threading.Thread(target=appender)
    thread.start()
    while not done.is_set() or len(ring) or ring.untold:
        log += ring.take(20, len(log))
    thread.join()
    lost = sum(entry.count for entry in log if isinstance(entry, LossRecord))
    assert lost == ring.dropped and sum(entry is record for entry in log) == ring.accepted == total - lost
    assert lost > 0

"""Who computed and what the breakers were, by hand. Broken once each: the state after the last move lost; a move before
the start not cut; open time of all boundaries added up; requests that were not served counted as computed."""

from __future__ import annotations

import msgspec
import pandas as pd

from engine.events import BreakerRecord, RequestRecord
from engine.scenario import load
from engine.units import S_NS
from sim.desk import boundaries
from sim.desk.frames import level_frame, requests_frame
from sim.desk.report import RunView, render
from sim.desk.summary import summarise

TWO = load("flash-sale", ("replicas=2",)).scenario
UPSTREAMS = load("flash-sale", (
    'upstreams.left.url="http://127.0.0.1:1/v1"', 'upstreams.right.url="http://127.0.0.1:2/v1"',
)).scenario
MOVES = [
    BreakerRecord(4 * S_NS, "replica-1", "closed", "open", "failing"),
    BreakerRecord(6 * S_NS, "replica-1", "open", "half_open", "rested"),
    BreakerRecord(7 * S_NS, "replica-1", "half_open", "closed", "recovered"),
    BreakerRecord(9 * S_NS, "encoder", "closed", "open", "slow"),
]


def frame_of(*where: tuple[int, str]) -> pd.DataFrame:
    return requests_frame([
        RequestRecord(
            f"r{n}", "storefront", "product_qa", n * S_NS // 4, outcome, 0, replica=replica,  # type: ignore[arg-type]
            tier="model" if outcome == "served" else None, ttft_ns=1, e2e_ns=2,
        )
        for n, (replica, outcome) in enumerate(where)
    ])


FRAME = frame_of(*[(0, "served")] * 9, *[(1, "served")] * 3, (1, "failed"))


def test_each_state_holds_until_the_next_move() -> None:
    found = boundaries.breaker_frame(MOVES, 10 * S_NS)
    assert [(b, begin / S_NS, end / S_NS, state) for b, begin, end, state in found.to_numpy().tolist()] == [
        ("encoder", 0, 9, "closed"), ("encoder", 9, 10, "open"), ("replica-1", 0, 4, "closed"),
        ("replica-1", 4, 6, "open"), ("replica-1", 6, 7, "half_open"), ("replica-1", 7, 10, "closed"),
    ]


def test_a_run_that_begins_later_begins_with_what_the_breaker_was_then() -> None:
    found = boundaries.breaker_frame(MOVES[:3], 5 * S_NS, start_ns=5 * S_NS)
    assert found[["from_ns", "to_ns", "state"]].to_numpy().tolist() == [
        [0, S_NS, "open"], [S_NS, 2 * S_NS, "half_open"], [2 * S_NS, 5 * S_NS, "closed"],
    ]


def test_the_table_counts_by_boundary() -> None:
    rows = boundaries.table(FRAME, boundaries.breaker_frame(MOVES, 10 * S_NS), TWO).to_dict("records")
    assert rows == [
        {"boundary": "replica 0", "requests": 9, "computed": 9, "opened, times": 0, "open, s": 0, "half-open, s": 0},
        {"boundary": "replica 1", "requests": 4, "computed": 3, "opened, times": 1, "open, s": 2, "half-open, s": 1},
        {"boundary": "encoder", "requests": 0, "computed": 0, "opened, times": 1, "open, s": 1, "half-open, s": 0},
    ]


def test_the_report_shows_it_where_there_is_a_choice_or_news() -> None:
    levels = level_frame([], 10 * S_NS)
    breakers = boundaries.breaker_frame(MOVES[:3], 10 * S_NS)

    def page(scenario, breakers) -> str:  # type: ignore[no-untyped-def]
        summary = summarise(FRAME, scenario, "load", 7, 10.0, levels, 0.5)
        return render(RunView(summary, FRAME, levels, scenario, breakers), None, None, {}, {})

    shown = page(UPSTREAMS, boundaries.breaker_frame(MOVES, 10 * S_NS)).replace(" %", "%")
    assert "left 75%, right 25%; encoder&#39;s breaker was open for 1.0 s; right&#39;s breaker was open for" in shown
    assert "right&#39;s breaker was open for 2.0 s" in shown
    assert "Who computed, and whom the door trusted" in page(TWO, breakers[:0])
    one = msgspec.structs.replace(TWO, replicas=1)
    assert "whom the door trusted" in page(one, breakers) and "whom the door trusted" not in page(one, breakers[:0])

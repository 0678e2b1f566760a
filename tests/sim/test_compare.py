"""Two runs against each other: figures counted by hand, a run against itself, the floor, the page, words for mistakes.

Run: python -m pytest tests/sim/test_compare.py -q
Mutations it caught: the code of a refusal ignored; the matrix transposed; ratios, goodput or a share's sign turned;
other arrivals or another scenario accepted; starts, or levels, not laid over each other; |.| after the quantile; caches
among the model's answers; no resolution, or an uncapped one; few requests judged; a mark missed by the last bit of a
float; the floor paired with the twin, or of a twin; W1 over the wrong mean; blocks of one request, or that do not wrap;
half a block; cached answers in a busy period; 60 % intervals; Clopper-Pearson; one colour in the matrix; dots lost
beyond the axis; a median of one; cut labels; SLOs that are not the run's; exit 0 always.
"""

from __future__ import annotations

import io
import json
import re
from itertools import pairwise
from pathlib import Path

import msgspec
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from rich.console import Console
from typer.testing import CliRunner

from engine.config import ClassConfig, Scenario
from engine.errors import DoorbusterError, UserError
from engine.events import LevelRecord, RequestRecord
from engine.units import MS_NS, S_NS
from sim.cli import app
from sim.desk import certificate
from sim.desk.bootstrap import blocks, bootstrap_rule, quantile_intervals, wilson
from sim.desk.compare import (
    MARKS,
    Comparison,
    Floor,
    Score,
    Side,
    compare,
    confusion,
    curves,
    decisions,
    ks,
    pair,
    ratios,
)
from sim.desk.comparison_words import amount, said, verdict_line
from sim.desk.frames import level_frame, requests_frame, write_run
from sim.desk.look import TIER_COLOURS, TWIN, take_heading
from sim.desk.summary import summarise

CLASSES = {
    "pay": ClassConfig(criticality="critical", slo_ttft_ms=1000, slo_e2e_ms=2000, caches="none"),
    "ask": ClassConfig(criticality="standard", slo_ttft_ms=1000, slo_e2e_ms=2000),
}
SALE = Scenario(name="sale", classes=CLASSES)
EVIL = "<script>alert(1)</script>"


def row(
    i: int, tier: str | None = "model", ttft: float = 100, e2e: float = 500, cls: str = "ask",
    code: str | None = None, at_ms: float | None = None, outcome: str | None = None,
) -> RequestRecord:
    """Request number ``i``, a second after the one before it."""
    return RequestRecord(
        request_id=f"r{i}", tenant="t", traffic_class=cls, level=0, tier=tier, error_code=code,
        outcome=outcome or ("served" if tier else "rejected"), replica=0 if tier == "model" else None,
        arrived_ns=round((1000 * i if at_ms is None else at_ms) * MS_NS),
        ttft_ns=round(ttft * MS_NS) if tier else None, e2e_ns=round(e2e * MS_NS),
    )


def side(
    rows: list[RequestRecord], levels: list[LevelRecord] | None = None, used: float | None = 0.9,
    duration_s: float = 60, lateness_ms: float | None = 0,
) -> Side:
    frame = requests_frame(rows)
    late_ns = None if lateness_ms is None else round(lateness_ms * MS_NS)
    frame["lateness_ns"] = pd.array([late_ns] * len(frame), "Int64")
    changes = None if levels is None else level_frame(levels, round(duration_s * S_NS))
    return Side(frame, changes, used, duration_s)


def scores(found: Comparison) -> dict[str, Score]:
    by_key = {score.key: score for score in found.scores}
    assert len(by_key) == len(found.scores)
    return by_key


def scored(a: list[RequestRecord], b: list[RequestRecord], **more) -> dict[str, Score]:
    return scores(compare(side(a, **more), side(b, **more), CLASSES))


LIVE = [
    row(0, "exact", 3, 3), row(1, "exact", 3, 3), row(2, "coalesced"), row(3), row(4), row(5, cls="pay"),
    row(6, "fallback", 1, 1, code="overloaded"), row(7, None, code="overloaded"), row(8, None, code="rate_limited"),
    row(9, outcome="failed"),
]
OTHER = [
    row(0, "exact", 3, 3), row(1, "coalesced"), row(2, "coalesced"), row(3),
    row(4, "fallback", 1, 1, code="overloaded"), row(5, cls="pay"),
    row(6, "fallback", 1, 1, code="deadline_exceeded"), row(7, None, code="deadline_exceeded"),
    row(8, None, code="rate_limited"), row(9),
]


# ---------------------------------------------------------------- decisions


def test_a_decision_is_the_tier_that_answered_or_the_code_that_turned_away() -> None:
    assert list(decisions(requests_frame(LIVE))) == [
        "exact", "exact", "coalesced", "model", "model", "model", "fallback", "overloaded", "rate_limited", "failed",
    ]


def test_the_matrix_is_live_by_row_and_twin_by_column() -> None:
    table = confusion(pair(requests_frame(LIVE), requests_frame(OTHER)))
    assert list(table.index) == list(table.columns) == [
        "exact", "coalesced", "fallback", "model", "deadline_exceeded", "failed", "overloaded", "rate_limited",
    ]
    cells = {(a, b): int(table.loc[a, b]) for a in table.index for b in table.columns if table.loc[a, b]}
    assert cells == {
        ("exact", "exact"): 1, ("exact", "coalesced"): 1, ("coalesced", "coalesced"): 1, ("model", "model"): 2,
        ("model", "fallback"): 1, ("fallback", "fallback"): 1, ("overloaded", "deadline_exceeded"): 1,
        ("rate_limited", "rate_limited"): 1, ("failed", "model"): 1,
    }


def test_agreement_is_the_share_of_the_diagonal_with_wilsons_interval_and_by_class() -> None:
    found = compare(side(LIVE), side(OTHER), CLASSES)
    assert found.decision_agreement == 0.6
    assert (found.agreement.low, found.agreement.high) == pytest.approx((0.3127, 0.8318), abs=1e-4)  # 6 of 10
    by_key = scores(found)
    whole = by_key["disagreement"]
    assert whole.value == 0.4 and whole.ok is False
    assert (whole.low, whole.high) == pytest.approx((1 - 0.8318, 1 - 0.3127), abs=1e-4)
    assert by_key["disagreement.ask"].value == pytest.approx(4 / 9) and by_key["disagreement.pay"].value == 0
    assert by_key["disagreement.ask"].ok is None  # only the whole is judged
    assert found.matrix["failed"] == {"model": 1} and "deadline_exceeded" not in found.matrix


def test_wilson_against_a_published_value() -> None:
    found = wilson(81, 263)  # Newcombe 1998, table I: 0.2553 to 0.3662
    assert found.value == pytest.approx(0.308, abs=1e-3)
    assert (found.low, found.high) == (pytest.approx(0.2553, abs=5e-4), pytest.approx(0.3662, abs=5e-4))
    assert wilson(0, 0).value is None


def test_requests_of_one_run_only_are_counted_and_judged_and_left_out_of_the_pairs() -> None:
    found = compare(side(LIVE), side([*OTHER[:9], row(20), row(21)]), CLASSES)
    assert (found.pairs, found.only_first, found.only_second) == (9, 1, 2)
    unpaired = scores(found)["unpaired"]
    assert unpaired.value == pytest.approx(3 / 12) and unpaired.ok is False
    assert found.decision_agreement == pytest.approx(6 / 9)


def test_pairs_are_found_by_id_and_not_by_place() -> None:
    rows = [row(0, "exact"), row(1, "model"), row(2, "coalesced")]
    shuffled = requests_frame(rows).iloc[::-1]
    pairs = pair(requests_frame(rows), shuffled)
    assert list(pairs["decision_a"]) == list(pairs["decision_b"]) == ["exact", "model", "coalesced"]
    assert list(pair(shuffled, shuffled)["request_id"]) == ["r0", "r1", "r2"]  # in order of arrival


# ---------------------------------------------------------------- amounts and quantiles


def test_amounts_are_those_made_by_hand() -> None:
    found = compare(side(LIVE, used=0.90), side(OTHER, used=0.95), CLASSES)
    by_key = scores(found)
    assert by_key["goodput"].live == pytest.approx(7 / 60) and by_key["goodput"].change == pytest.approx(8 / 7 - 1)
    assert by_key["deflection"].live == pytest.approx(3 / 7) and by_key["deflection"].twin == pytest.approx(3 / 8)
    assert by_key["deflection"].change == pytest.approx(3 / 8 - 3 / 7)
    assert found.deflection_abs == pytest.approx(3 / 7 - 3 / 8)  # a size, not a sign
    assert found.shed_abs == 0 and by_key["shed"].live == 0.1  # overloaded and too late, of offered
    assert by_key["degraded"].change == pytest.approx(0.1) and by_key["degraded"].ok is None
    assert by_key["utilisation"].value == pytest.approx(0.05)
    assert "utilisation" not in scored(LIVE, OTHER, used=None)


def test_a_late_answer_is_not_goodput() -> None:
    late = [row(i, e2e=2001 if i < 5 else 500) for i in range(20)]
    goodput = scored([row(i) for i in range(20)], late)["goodput"]
    assert goodput.change == pytest.approx(-0.25) and goodput.ok is False


def test_quantile_errors_are_relative_to_the_first_run() -> None:
    live = [row(i, ttft=100 + i, e2e=1000 + 10 * i) for i in range(40)]
    twin = [row(i, ttft=1.1 * (100 + i), e2e=0.9 * (1000 + 10 * i)) for i in range(40)]
    found = compare(side(live), side(twin), CLASSES)
    assert found.errors == {
        "ttft_p50": pytest.approx(0.1), "ttft_p95": pytest.approx(0.1), "ttft_p99": None,  # 40 carry no p99
        "e2e_p50": pytest.approx(0.1), "e2e_p95": pytest.approx(0.1), "e2e_p99": None,
    }
    by_key = scores(found)
    assert by_key["ask.e2e_p50"].change == pytest.approx(-0.1)
    assert by_key["ask.ttft_p50"].live == pytest.approx(119.5) and by_key["ask.ttft_p50"].twin == pytest.approx(131.45)
    judged = {k: s.ok for k, s in by_key.items() if k.startswith("ask.") and s.ok is not None}
    assert judged == {"ask.ttft_p50": False, "ask.ttft_p95": True, "ask.e2e_p50": False, "ask.e2e_p95": False}
    assert found.verdict == "no"


def test_a_p99_comes_with_two_hundred_requests_and_is_not_judged() -> None:
    for n, there in ((199, False), (200, True)):
        rows = [row(i, e2e=500 + i) for i in range(n)]
        score = scored(rows, rows)["ask.e2e_p99"]
        assert (score.value is not None) is there and score.ok is None


def test_few_requests_are_shown_but_not_judged() -> None:
    rows, worse = [row(i) for i in range(20)], [row(i, e2e=5000) for i in range(20)]
    for n, judged in ((9, (False, False)), (10, (True, False)), (19, (True, False)), (20, (True, True))):
        found = scored(rows[:n], worse[:n])
        assert found["ask.e2e_p95"].change == pytest.approx(9)
        assert tuple(found[f"ask.e2e_{point}"].ok is False for point in ("p50", "p95")) == judged


def test_only_served_requests_have_a_latency_and_the_model_has_a_section_of_its_own() -> None:
    cached = [row(i, "exact", 3, 4) for i in range(30)]
    live = [*cached, *(row(30 + i, e2e=1000) for i in range(10))]
    twin = [row(0, None, code="overloaded", e2e=9000), *cached[1:], *(row(30 + i, e2e=1200) for i in range(10))]
    found = scored(live, twin)
    assert found["by the model.e2e_p50"].change == pytest.approx(0.2) and found["by the model.e2e_p50"].ok is None
    assert found["all.e2e_p50"].change == 0 and found["all.e2e_p50"].n == 39


@pytest.mark.parametrize(("late_ms", "ok"), [(0, False), (0.9, False), (1.1, True), (None, False)])
def test_what_the_load_generator_cannot_tell_apart_counts_as_equal_and_says_so(late_ms, ok) -> None:
    live, twin = [row(i, "exact", 3, 3) for i in range(30)], [row(i, "exact", 4, 4) for i in range(30)]
    score = scores(compare(side(live, lateness_ms=late_ms), side(twin), CLASSES))["ask.e2e_p50"]
    assert score.change == pytest.approx(1 / 3) and score.ok is ok
    assert bool(score.note) is ok and ("1.0 ms apart" in verdict_line(score)) is ok


def test_a_late_load_generator_hides_nothing_beyond_ten_milliseconds() -> None:
    live = side([row(i, e2e=100) for i in range(30)], lateness_ms=500)
    for e2e, ok in ((111, False), (109, True)):
        twin = side([row(i, e2e=e2e) for i in range(30)])
        assert scores(compare(live, twin, CLASSES))["ask.e2e_p50"].ok is ok


# ---------------------------------------------------------------- pairs of latencies, distances, curves


def test_paired_latency_is_a_factor_in_either_direction() -> None:
    live = [row(i, e2e=1000) for i in range(10)]
    twin = [row(i, e2e=1000 * factor) for i, factor in enumerate([2, 0.5, 2, 0.5, 2, 0.5, 1, 0.5, 4])]
    found = scored(live, [*twin, row(9, "exact", 1, 1)])
    assert found["paired.alike.all.p50"].value == pytest.approx(1)  # a factor of 2: slower and faster do not cancel
    assert found["paired.alike.all.p90"].value == pytest.approx(2**1.2 - 1)  # rank 7.2 of 0 to 8: 2, then 4
    assert found["paired.alike.all.p50"].n == 9 and found["paired.served.all.p50"].n == 10
    assert found["paired.alike.by the model.p50"].n == 9
    assert found["paired.alike.all.p50"].change == pytest.approx(0)  # the middle itself: 1 x
    assert "paired.alike.pay.p50" not in found


def test_latency_ratios_are_second_over_first_and_no_time_at_all_has_one_too() -> None:
    pairs = pair(requests_frame([row(0), row(1)]), requests_frame([row(0, e2e=1000), row(1, e2e=0)]))
    assert list(ratios(pairs, "e2e")) == pytest.approx([2.0, 0.1 / 500])


def test_distances_are_those_of_the_books() -> None:
    a, b = np.array([1.0, 2, 3, 4]), np.array([3.0, 4, 5, 6])
    assert ks(a, b) == 0.5 and ks(a, a) == 0 and ks(a, a + 10) == 1 and ks(b, a) == 0.5
    live, twin = [row(i, e2e=500) for i in range(4)], [row(i, e2e=500 + 50 * i) for i in range(4)]
    assert scored(live, twin)["all.e2e.w1"].value == pytest.approx(75 / 500)
    assert scored(twin, live)["all.e2e.w1"].value == pytest.approx(75 / 575)  # of the first run's mean


def test_curves_lay_one_start_over_the_other_and_compare_bin_by_bin() -> None:
    live = [row(i, ttft=100, at_ms=1000 * i + 100) for i in range(10)]
    twin = [row(i, ttft=100 if i else 300, e2e=500 if i != 3 else 1500, at_ms=1000 * i + 5100) for i in range(10)]
    up = [LevelRecord(2 * S_NS, 1), LevelRecord(4 * S_NS, 0)]
    later = [LevelRecord(round(7.5 * S_NS), 1), LevelRecord(9 * S_NS, 0)]
    a, b = side(live, up, duration_s=10), side(twin, later, duration_s=15)
    found = {name: table for name, (_, table) in curves(a, b, pair(a.frame, b.frame)).items()}
    assert (found["offered"]["first"] == found["offered"]["second"]).all() and len(found["offered"]) == 10
    gap = found["served"]["second"] - found["served"]["first"]
    assert list(gap) == [0, 0, 0, -1, 1, 0, 0, 0, 0, 0]  # one answer ended a second later
    assert found["p95 to first token"]["second"].iloc[0] == pytest.approx(300)
    level = found["overload level"]
    assert list(level["first"][:5]) == [0, 0, 1, 1, 0] and list(level["second"][:5]) == [0, 0, 0.5, 1, 0]
    by_key = scores(compare(a, b, CLASSES))
    assert by_key["curve.served.max"].value == 1 and by_key["curve.served.mean"].value == pytest.approx(0.2)
    assert by_key["curve.p95 to first token.max"].value == pytest.approx(200)
    assert by_key["curve.overload level.mean"].value == pytest.approx(0.05)
    assert "curve.overload level.mean" not in scores(compare(a, side(twin, duration_s=15), CLASSES))


# ---------------------------------------------------------------- intervals


def waves(seed: int, n: int = 400, lean: float = 1.1) -> tuple[np.ndarray, np.ndarray]:
    """Latencies whose ratio wanders around ``lean``: an AR(1) of correlation 0.9. The true ratio of medians: lean."""
    rng = np.random.default_rng(seed)
    noise, wander = rng.normal(0, 0.05, n), np.zeros(n)
    for i in range(1, n):
        wander[i] = 0.9 * wander[i - 1] + noise[i]
    return np.full(n, 1e9), 1e9 * lean * np.exp(wander)


def coverage(block: int, runs: int = 60) -> float:
    found = [quantile_intervals(*waves(seed), [0.5], block, draws=100, seed=seed)[0] for seed in range(runs)]
    return sum(interval is not None and interval[0] <= 0.1 <= interval[1] for interval in found) / runs


def test_intervals_cover_the_truth_only_if_blocks_keep_what_hangs_together() -> None:
    assert coverage(40) >= 0.8
    assert coverage(1) <= 0.6


def test_intervals_use_what_both_runs_share() -> None:
    rng = np.random.default_rng(5)
    live = rng.lognormal(20, 1, 300)
    (found,) = quantile_intervals(live, 1.2 * live, [0.5], 10)
    assert found == pytest.approx((0.2, 0.2))  # paired: no spread where the ratio has none
    (found,) = quantile_intervals(live, 1.2 * rng.permutation(live), [0.5], 10)
    assert found is not None and found[0] < 0.1 and found[1] > 0.3


def test_intervals_come_back_the_same_and_not_from_few_pairs() -> None:
    a, b = waves(1)
    assert quantile_intervals(a, b, [0.5, 0.95], 20) == quantile_intervals(a, b, [0.5, 0.95], 20)
    assert quantile_intervals(a, b, [0.5], 20) != quantile_intervals(a, b, [0.5], 20, seed=4)
    assert quantile_intervals(a[:9], b[:9], [0.5], 2) == [None] and quantile_intervals(a[:10], b[:10], [0.5], 2)[0]
    assert quantile_intervals(a, np.full(len(b), np.nan), [0.5], 20) == [None]


def test_blocks_are_runs_of_neighbours_that_wrap_round() -> None:
    drawn = np.zeros(50, dtype=int)
    for index in blocks(50, 8, 400, 1):
        assert len(index) == 50
        for start in range(0, 48, 8):
            assert all((b - a) % 50 == 1 for a, b in pairwise(index[start : start + 8]))
        drawn += np.bincount(index, minlength=50)
    assert drawn.min() > 300 and drawn.max() < 500  # nobody at an edge is drawn less


def test_a_block_is_two_busy_periods_of_the_first_run() -> None:
    # two computed at once keep the engine busy; one that is not computed belongs to them, and keeps nothing busy itself
    rows = []
    for k in range(20):
        at = 10_000 * k
        rows += [
            row(4 * k, at_ms=at, e2e=3000), row(4 * k + 1, at_ms=at + 1000, e2e=2000),
            row(4 * k + 2, "coalesced", 3, 2000, at_ms=at + 2000), row(4 * k + 3, at_ms=at + 3500, e2e=100),
        ]
    rule = bootstrap_rule(pair(requests_frame(rows), requests_frame(rows)))
    assert (rule.busy_requests, rule.block, rule.capped) == (2, 4, False)  # 80 requests in 40 periods
    endless = [row(i, e2e=5000) for i in range(50)]
    rule = bootstrap_rule(pair(requests_frame(endless), requests_frame(endless)))
    assert (rule.busy_requests, rule.block, rule.capped) == (50, 10, True)
    assert "too narrow" in certificate.rule_words(compare(side(endless), side(endless), CLASSES))


# ---------------------------------------------------------------- identity, marks, floor


def mixed(seed: int, n: int = 240, factor: float = 1.0) -> list[RequestRecord]:
    rng = np.random.default_rng(seed)
    out = []
    for i in range(n):
        spread = rng.uniform(0.9, 1.1)
        if i % 5 == 0:
            out.append(row(i, ttft=100 * factor, e2e=800 * factor * spread, cls="pay"))
        elif i % 5 == 1:
            out.append(row(i, "exact", 3, 4))
        elif i % 40 == 2:
            out.append(row(i, None, code="overloaded"))
        else:
            out.append(row(i, ttft=150 * factor, e2e=900 * factor * spread))
    return out


def test_a_run_against_itself_agrees_in_everything() -> None:
    run = side(mixed(1), [LevelRecord(5 * S_NS, 2), LevelRecord(9 * S_NS, 0)])
    found = compare(run, run, CLASSES)
    assert found.decision_agreement == 1 and found.verdict == "yes"
    assert set(found.errors.values()) == {0.0} and found.deflection_abs == found.shed_abs == 0
    assert {score.value for score in found.scores} == {0.0, None}  # None: too few for a p99
    assert all(line.startswith("yes") for line in found.lines) and len(found.lines) == 5 + 3 * 4
    intervals = {(s.low, s.high) for s in found.scores if s.section in ("all", "ask", "pay") and s.value is not None}
    assert intervals == {(0.0, 0.0)}


BASE = [row(i, e2e=1000 + i, ttft=500 + i) for i in range(100)]
MISSES = {
    "unpaired": BASE[:98],
    "disagreement": [*BASE[:94], *(row(i, "coalesced", 500 + i, 1000 + i) for i in range(94, 100))],
    "goodput": [*BASE[:96], *(row(i, e2e=2500) for i in range(96, 100))],
    "deflection": [*BASE[:96], *(row(i, "exact", 500 + i, 1000 + i) for i in range(96, 100))],
    "shed": [*BASE[:96], *(row(i, None, code="overloaded") for i in range(96, 100))],
    "e2e_p50": [row(i, e2e=1.07 * (1000 + i), ttft=500 + i) for i in range(100)],
    "e2e_p95": [*BASE[:85], *(row(i, e2e=1400, ttft=500 + i) for i in range(85, 100))],
    "ttft_p50": [row(i, e2e=1000 + i, ttft=1.1 * (500 + i)) for i in range(100)],
    "ttft_p95": [*BASE[:85], *(row(i, e2e=1000 + i, ttft=800) for i in range(85, 100))],
}


def missed(twin: list[RequestRecord]) -> tuple[set[str], Comparison]:
    found = compare(side(BASE), side(twin), CLASSES)
    return {s.key.split(".")[-1] for s in found.scores if s.ok is False}, found


@pytest.mark.parametrize("name", MARKS)
def test_every_mark_can_be_missed(name: str) -> None:
    which, found = missed(MISSES[name])
    assert name in which and found.verdict == "no"
    assert sum(line.startswith("no") for line in found.lines) == sum(s.ok is False for s in found.scores)
    if name.startswith(("e2e", "ttft", "unpaired")):
        assert which == {name}  # the others pull each other along: a shed request is no goodput
    assert missed(BASE)[1].verdict == "yes"


def test_a_figure_at_its_mark_passes() -> None:
    other = [row(i, "coalesced") for i in range(100)]
    base = [row(i) for i in range(100)]
    assert scored(base, [*base[:95], *other[95:]])["disagreement"].ok is True
    assert scored(base, [*base[:94], *other[94:]])["disagreement"].ok is False


def test_the_floor_stands_beside_every_figure() -> None:
    live, twin, again = side(mixed(1)), side(mixed(2, factor=1.06)), side(mixed(3, factor=1.02))
    alone, found, floors = (compare(live, twin, CLASSES), compare(live, twin, CLASSES, again),
                            compare(live, again, CLASSES))
    assert alone.noise_floor == {}
    assert found.noise_floor["all.e2e_p50"].value == floors.errors["e2e_p50"]
    assert found.noise_floor["ask.ttft_p50"] == Floor(pytest.approx(0.02), pytest.approx(3))
    assert found.noise_floor["shed"] == Floor(0.0, None)  # live does not differ from live: no multiple of nothing
    assert set(found.noise_floor) == {s.key for s in found.scores if s.value is not None}
    assert [s.ok for s in found.scores] == [s.ok for s in alone.scores]  # the marks do not move
    (line,) = [x for x in found.lines if "ask, first token, p50" in x]
    assert line == "yes: ask, first token, p50: +6.0 % (+6.0 to +6.0 %), mark 8 %; 3.0 times live against live"


def test_words_of_a_difference() -> None:
    score = Score("k", "ask", "w", "%", 0.392, change=-0.392, low=-1.01, high=0.042)
    assert said(score) == "-39.2 % (-101 to +4.2 %)"
    assert [amount(0.05, "%"), amount(0.0312, "%"), amount(0.002, "pp", "+"), amount(0.13, "x"), amount(None, "%")] == [
        "5 %", "3.1 %", "+0.2 pp", "1.13 x", "–",
    ]
    assert [amount(1.5, "/s"), amount(1172.7, "ms"), amount(0.361, ""), amount(-0.0001, "%", "+")] == [
        "1.50/s", "1.17 s", "0.361", "+0.0 %",
    ]


def test_the_json_is_the_contract_and_more_after_it() -> None:
    tree = json.loads(msgspec.json.encode(compare(side(mixed(1)), side(mixed(2)), CLASSES, side(mixed(3)))))
    assert list(tree)[:6] == [
        "decision_agreement", "errors", "deflection_abs", "shed_abs", "noise_floor", "verdict",
    ]
    assert list(tree["errors"]) == ["ttft_p50", "ttft_p95", "ttft_p99", "e2e_p50", "e2e_p95", "e2e_p99"]
    assert tree["verdict"] in ("yes", "no") and isinstance(tree["decision_agreement"], float)
    assert set(tree["noise_floor"]["goodput"]) == {"value", "times"}


# ---------------------------------------------------------------- runs that cannot be compared


def test_runs_without_a_common_request_are_refused() -> None:
    with pytest.raises(UserError, match="no request id in common"):
        compare(side([row(1)]), side([row(2)]), CLASSES)


def test_the_same_ids_of_another_workload_are_refused() -> None:
    rows = [row(i) for i in range(50)]
    with pytest.raises(UserError, match="17 of 50 common request ids"):
        compare(side(rows), side([row(i, at_ms=1000 * i + (0 if i % 3 else 3)) for i in range(50)]), CLASSES)
    with pytest.raises(UserError, match="did not see the same arrivals"):
        compare(side(rows), side([row(i, cls="pay") for i in range(50)]), CLASSES)
    compare(side(rows), side([row(i, at_ms=1000 * i + 0.4 * (i % 2)) for i in range(50)]), CLASSES)
    compare(side(rows), side([row(i, at_ms=1000 * i + 7000) for i in range(50)]), CLASSES)  # another start, as a whole


# ---------------------------------------------------------------- figures and page


def test_the_matrix_figure_says_its_finding_and_shows_every_cell() -> None:
    figure = certificate.confusion_map(pair(requests_frame(LIVE), requests_frame(OTHER)))
    axis = figure.axes[0]
    cells = {(t.get_position()[1], t.get_position()[0]): t.get_text() for t in axis.texts}
    assert cells[(0, 0)] == "1  (50 %)" and cells[(3, 2)] == "1  (33 %)" and cells[(0, 3)] == "·"
    assert [t.get_text() for t in axis.get_yticklabels()][:2] == ["exact", "coalesced"]
    assert "live" in axis.get_ylabel() and "twin" in axis.get_xlabel()
    title = take_heading(figure)[0]
    assert title.startswith("Live and twin decided alike for 60.0 % of 10 requests; most often apart: exact (live)")
    diagonal = {to_hex(p.get_facecolor()) for p in axis.patches if p.get_x() == p.get_y()}
    assert diagonal and not diagonal & {to_hex(p.get_facecolor()) for p in axis.patches if p.get_x() != p.get_y()}
    same = certificate.confusion_map(pair(requests_frame(LIVE), requests_frame(LIVE)))
    assert take_heading(same)[0] == "Live and twin decided alike for 100.0 % of 10 requests"


def test_the_ratio_figure_is_twin_over_live_in_the_colours_of_who_answered() -> None:
    live = [*(row(i, at_ms=500 * i) for i in range(9)), row(9, "exact", 2, 2), row(10)]
    twin = [row(i, ttft=150, e2e=600, at_ms=500 * i) for i in range(9)]
    twin += [row(9, "exact", 2, 1), row(10, "exact", 3, 3)]
    figure = certificate.ratio_over_time(pair(requests_frame(live), requests_frame(twin)))
    first, end = figure.axes
    dots = {line.get_label(): line for line in end.lines}
    assert list(dots["model"].get_ydata()) == pytest.approx([1.2] * 9)
    assert list(dots["model"].get_xdata()) == pytest.approx([0.5 * i for i in range(9)])
    assert to_hex(dots["model"].get_color()) == TIER_COLOURS["model"].lower()
    assert list(dots["exact"].get_ydata()) == pytest.approx([0.5])
    reach = end.get_ylim()
    assert list(dots["decided differently"].get_ydata()) == pytest.approx([reach[0]])  # 0.006: drawn at the edge
    assert reach[0] * reach[1] == pytest.approx(1) and end.get_yscale() == "log" and reach[1] >= 2
    (median,) = [line for line in end.lines if to_hex(line.get_color()) == TWIN.lower()]
    assert list(median.get_xdata()) == [1, 3] and list(median.get_ydata()) == pytest.approx([1.2, 1.2])  # one is few
    assert list({line.get_label(): line for line in first.lines}["model"].get_ydata()) == pytest.approx([1.5] * 9)
    title = take_heading(figure)[0]
    assert "9 pairs that the model answered in both, half end within 1.20 x" in title and "twin takes 1.20 x" in title


def test_a_run_in_which_nobody_was_served_has_figures_and_a_verdict() -> None:
    nobody = side([row(0, None, code=EVIL)])
    pairs = pair(nobody.frame, nobody.frame)
    certificate.confusion_map(pairs)
    assert take_heading(certificate.ratio_over_time(pairs))[0] == "No pair was served by the same decision"
    found = compare(nobody, nobody, CLASSES)
    assert found.errors["e2e_p50"] is None and found.verdict == "yes" and found.deflection_abs == 0


def text_of(found: Comparison) -> str:
    console = Console(width=100, file=io.StringIO(), color_system=None)
    console.print(certificate.table(found, ("live", "twin")))
    return console.file.getvalue()


def test_the_table_fits_100_columns_and_cuts_no_number() -> None:
    for floor in (None, side(mixed(3, factor=1.02))):
        text = text_of(compare(side(mixed(1)), side(mixed(2, factor=2.5)), CLASSES, floor))
        assert max(map(len, text.splitlines())) <= 100 and "…" not in text
        rows = [re.split(r"\s{2,}", line.strip()) for line in text.splitlines()]
        found = next(r for r in rows if r[0] == "first token, p50" and r[1].startswith("150"))
        assert found[1:4] == ["150.0 ms", "375.0 ms", "+150.0 % (+150 to +150 %)"] and found[-1] == "no"
        assert ("2 % x75.0" in text) is (floor is not None)


def test_the_page_stands_alone_and_what_comes_from_outside_is_no_markup() -> None:
    run = side([*(row(i, cls=EVIL) for i in range(20)), row(20, None, code=EVIL)])
    found = compare(run, run, CLASSES)
    page = certificate.render(found, pair(run.frame, run.frame), ("live", "twin"), {EVIL: EVIL})
    assert "<script" not in page and "&lt;script&gt;" in page
    assert "default-src 'none'" in page and page.count("<svg") == 2
    assert re.findall(r'(?:href|src)="(?!#)', page) == []
    assert '<span class="mark">yes</span>' in page and certificate.sentence(found, ("live", "twin")) in page
    assert page.count("<li><b>") == len(found.lines)
    assert certificate.sentence(found, ("live", "twin")).startswith("Live and twin agree: all ")


# ---------------------------------------------------------------- the command


def run_folder(
    at: Path, rows: list[RequestRecord], kind: str = "load", scenario: str = "sale", slo_e2e_ms: float = 2000
) -> Path:
    at.mkdir(parents=True)
    frame = requests_frame(rows)
    write_run(at, frame, rows, 60 * S_NS)
    sale = msgspec.structs.replace(SALE, name=scenario)
    summary = summarise(frame, sale, kind, 7, 60.0, level_frame([], 60 * S_NS), 0.9)
    (at / "summary.json").write_bytes(msgspec.json.encode(summary))
    values: dict[str, object] = {}
    for name, cls in CLASSES.items():
        values[f"classes.{name}.criticality"] = cls.criticality
        values[f"classes.{name}.slo_ttft_ms"], values[f"classes.{name}.slo_e2e_ms"] = cls.slo_ttft_ms, slo_e2e_ms
    (at / "resolved.json").write_text(json.dumps({k: {"value": v, "origin": "file"} for k, v in values.items()}))
    return at


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    """A demo's folder, whose twin shares its settings."""
    folder = run_folder(tmp_path / "demo", mixed(1))
    (run_folder(folder / "twin", mixed(2), "sim") / "resolved.json").unlink()
    return folder


def invoke(*args: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["compare", *map(str, args)])
    if isinstance(done.exception, DoorbusterError):
        return 1, str(done.exception)  # what main() prints before it exits with 1
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.stdout


def test_a_demo_is_compared_with_its_own_twin_and_gets_a_certificate(demo: Path) -> None:
    code, text = invoke(demo)
    assert code == 0, text
    assert "yes: Live and twin agree" in text and "decisions: live by row, twin by column" in text
    first = (demo / "certificate.html").read_bytes()
    assert first.count(b"<svg") == 2
    assert invoke(demo)[0] == 0 and (demo / "certificate.html").read_bytes() == first  # again, and the same


def test_json_and_exit_3_where_the_verdict_is_no(demo: Path, tmp_path: Path) -> None:
    slow = run_folder(tmp_path / "slow", mixed(2, factor=1.5), "sim")
    code, text = invoke(demo, slow, "--json")
    tree = json.loads(text)
    assert code == 3 and tree["verdict"] == "no" and tree["errors"]["ttft_p95"] == pytest.approx(0.5)
    code, text = invoke(demo, slow)
    assert code == 3 and "no: Live and twin do not agree" in text and "no: ask, first token, p50: +50.0 %" in text


def test_a_floor_is_another_run_of_the_same_kind(demo: Path, tmp_path: Path) -> None:
    again = run_folder(tmp_path / "again", mixed(3, factor=1.02))
    code, text = invoke(demo, "--floor", again, "--json")
    assert code == 0 and json.loads(text)["noise_floor"]["ask.ttft_p50"]["value"] == pytest.approx(0.02)
    code, text = invoke(demo, "--floor", demo / "twin")
    assert code == 1 and "the floor is of another kind" in text
    code, text = invoke(demo, again)
    assert code == 0 and "First and second agree" in text  # two live runs: neither is a twin


def test_slos_are_those_that_the_run_had(tmp_path: Path) -> None:
    a = run_folder(tmp_path / "a", [row(i, e2e=1000) for i in range(20)], slo_e2e_ms=500)
    tree = json.loads(invoke(a, a, "--json")[1])
    assert next(s["live"] for s in tree["scores"] if s["key"] == "goodput") == 0


def test_mistakes_are_told_in_words(demo: Path, tmp_path: Path) -> None:
    lone = run_folder(tmp_path / "lone", mixed(1))
    other = run_folder(tmp_path / "other", mixed(1), scenario="chat")
    strangers = run_folder(tmp_path / "strangers", [row(9000 + i) for i in range(5)])
    shifted = run_folder(tmp_path / "shifted", [row(i, at_ms=900 * i) for i in range(240)])
    unfinished = run_folder(tmp_path / "unfinished", mixed(1))
    (unfinished / "summary.json").unlink()
    bare = run_folder(tmp_path / "bare", mixed(1))
    (bare / "resolved.json").unlink()
    for args, words in (
        ((tmp_path / "nowhere",), "no such run"), ((demo, tmp_path / "nowhere"), "no such run"),
        ((lone,), "one run, and no twin in it"), ((demo, tmp_path), "no such run"),
        ((demo, other), "the runs are of other scenarios"), ((demo, "--floor", other), "of other scenarios"),
        ((demo, strangers), "no request id in common"), ((demo, shifted), "did not see the same arrivals"),
        ((demo, unfinished), "was not finished"), ((demo, bare), "no settings of the run"),
    ):
        code, text = invoke(*args)
        assert code == 1 and words in text, args
    assert not (demo / "certificate.html").exists()
    assert CliRunner().invoke(app, ["compare"]).exit_code == 2

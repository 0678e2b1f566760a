"""The overload level against everything ever observed.

invariant: mutation that it caught
- lowest first: sheddable work allowed to 3; standard work held at 2
- raw level: `>` for `>=`; one SLO for all classes; the lowest class decides; a negative age reported
- up at once: one level at a time; only at the end of a window
- a level holds: a nanosecond longer; from its first call on instead of its last; a call for 3 is none for 2
- ties: the last class named; the order of the observation
- wake: at level 0 with nobody waiting; none while somebody waits; none above level 0; for a class nobody configured
- a clock that steps back; a change reported that was none; off but moving; time booked on the new level; miscounts
"""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config import ClassConfig, OverloadConfig, RetryConfig
from engine.events import Arrive
from engine.policy.overload import LevelChange, Overload
from engine.policy.retries import RetryStats
from engine.units import MS_NS, S_NS

CONFIG = OverloadConfig(
    brownout_share=0.2, degraded_share=0.4, shed_share=0.5, window_ms=100, hold_ms=300, graded=False,
)
GRADED = msgspec.structs.replace(CONFIG, graded=True)
WINDOW_NS = 100 * MS_NS
HOLD_NS = 300 * MS_NS
CLASSES = {
    "recommend": ClassConfig(criticality="sheddable", slo_ttft_ms=1500),
    "chat": ClassConfig(criticality="standard", slo_ttft_ms=3000),
    "fraud": ClassConfig(criticality="critical", slo_ttft_ms=500),
    "search": ClassConfig(criticality="standard", slo_ttft_ms=3000),
}
AT_MS = {"recommend": (300, 600, 750), "chat": (600, 1200, 1500), "fraud": (100, 200, 250), "search": (600, 1200, 1500)}

Moment = tuple[int, dict[str, int]]  # when, and since when each class waits
Ages = dict[str, int | None]

AGES_NS = st.one_of(
    st.none(),
    st.sampled_from([ms * MS_NS + off for row in AT_MS.values() for ms in row for off in (-1, 0)]),
    st.integers(-5 * MS_NS, 2 * S_NS),
)
WAITS = st.one_of(st.just({}), st.dictionaries(st.sampled_from([*CLASSES, "unknown"]), AGES_NS, max_size=4))
STEPS_NS = st.one_of(
    st.sampled_from([0, 1, WINDOW_NS - 1, WINDOW_NS, WINDOW_NS + 1, 2 * WINDOW_NS, 3 * WINDOW_NS, 10**6 * WINDOW_NS]),
    st.integers(-20 * MS_NS, 60 * MS_NS),
    st.integers(0, 15 * WINDOW_NS),
    st.none(),  # wait for the wake
)
MOVES = st.lists(st.tuples(STEPS_NS, WAITS), min_size=1, max_size=40)


def raw_of(moment: Moment) -> tuple[int, str, int]:
    """Level, class and age that one observation alone calls for."""
    now_ns, oldest_ns = moment
    callers = []
    for order, (name, cls) in enumerate(CLASSES.items()):
        if name in oldest_ns:
            age_ns = max(0, now_ns - oldest_ns[name])
            level = len([ms for ms in AT_MS[name] if age_ns >= ms * MS_NS])
            callers.append((min(level, 2) if cls.criticality == "sheddable" else level, -order, name, age_ns))
    if not callers:
        return 0, "", 0
    level, _, name, age_ns = max(callers)
    return level, name, age_ns


def level_after(history: list[Moment]) -> int:
    """By the definition: the highest that an observation of the last 300 ms called for."""
    now_ns = history[-1][0]
    return max(raw_of(moment)[0] for moment in history if now_ns - moment[0] < HOLD_NS)


@settings(max_examples=500, deadline=None)
@given(moves=MOVES)
def test_any_history_gives_the_level_of_its_replay(moves: list[tuple[int | None, dict[str, int | None]]]) -> None:
    overload = Overload(CONFIG, CLASSES)
    history: list[Moment] = []
    spent_ns = [0, 0, 0, 0, 0]
    now_ns, highest_ns = S_NS, 0
    for step_ns, ages_ns in moves:
        wake_ns = overload.next_wake_ns()
        now_ns = (wake_ns or now_ns + 1) if step_ns is None else now_ns + step_ns
        before, before_ns = overload.level, highest_ns
        highest_ns = max(highest_ns, now_ns)
        oldest_ns = {name: highest_ns - age_ns for name, age_ns in ages_ns.items() if age_ns is not None}
        change = overload.observe(now_ns, oldest_ns)
        overload.check()
        history.append((highest_ns, oldest_ns))
        raw, traffic_class, age_ns = raw_of(history[-1])
        assert overload.level == level_after(history)
        assert overload.level >= raw, "up at once"
        assert overload.level <= max(before, raw), "nothing but waiting raises the level"
        if overload.level == before:
            assert change is None
        else:
            assert change == LevelChange(highest_ns, overload.level, traffic_class, age_ns)
        wake_ns = overload.next_wake_ns()
        if overload.level or any(name in CLASSES for name in oldest_ns):
            assert wake_ns is not None and highest_ns < wake_ns <= highest_ns + WINDOW_NS and wake_ns % WINDOW_NS == 0
        else:
            assert wake_ns is None
        spent_ns[before] += highest_ns - before_ns if len(history) > 1 else 0
        assert overload.stats().level_ns == tuple(spent_ns)


@settings(max_examples=200, deadline=None)
@given(moves=MOVES)
def test_woken_on_time_a_level_ends_within_a_window_of_its_hold(moves: list[tuple[int | None, Ages]]) -> None:
    overload = Overload(CONFIG, CLASSES)
    now_ns = 0
    called_ns = [0] * 5  # when each level, or a higher one, was called for last
    for step_ns, ages_ns in moves:
        until_ns = now_ns + abs(step_ns or WINDOW_NS) % (20 * WINDOW_NS)
        oldest_ns = {name: until_ns - age_ns for name, age_ns in ages_ns.items() if age_ns is not None}
        while now_ns < until_ns:  # as the gateway does
            wake_ns = overload.next_wake_ns()
            assert wake_ns is None or wake_ns > now_ns, "a wake never spins"
            now_ns = min(until_ns, wake_ns or until_ns)
            before = overload.level
            overload.observe(now_ns, oldest_ns)
            for level in range(1, raw_of((now_ns, oldest_ns))[0] + 1):
                called_ns[level] = now_ns
            assert all(now_ns - called_ns[level] >= HOLD_NS for level in range(overload.level + 1, before + 1)), "holds"
            assert not overload.level or now_ns - called_ns[overload.level] < HOLD_NS + WINDOW_NS, "and not for ever"


@settings(max_examples=200, deadline=None)
@given(ages_ns=st.lists(st.integers(0, 100 * S_NS), min_size=1, max_size=20))
def test_sheddable_work_alone_never_gets_the_level_beyond_two(ages_ns: list[int]) -> None:
    overload = Overload(CONFIG, CLASSES)
    for i, age_ns in enumerate(ages_ns):
        overload.observe(i * WINDOW_NS, {"recommend": i * WINDOW_NS - age_ns})
        assert overload.level <= 2
        assert overload.level == 2 or age_ns < 600 * MS_NS


def test_up_at_once_down_when_it_has_held() -> None:
    overload = Overload(CONFIG, CLASSES)
    assert overload.observe(0, {"chat": 0}) is None
    assert overload.observe(1499 * MS_NS, {"chat": 1000 * MS_NS}) is None
    assert overload.observe(1500 * MS_NS, {"chat": 0}) == LevelChange(1500 * MS_NS, 3, "chat", 1500 * MS_NS)
    changes = []
    while (wake_ns := overload.next_wake_ns()) is not None:
        assert wake_ns <= 1800 * MS_NS
        if (change := overload.observe(wake_ns, {})) is not None:
            changes.append((change.at_ns // MS_NS, change.level, change.traffic_class))
    assert changes == [(1800, 0, "")]
    stats = overload.stats()
    assert (stats.level, stats.rises, stats.falls) == (0, 1, 1)
    assert [ns // MS_NS for ns in stats.level_ns] == [1500, 0, 0, 300, 0]


def test_it_falls_to_what_was_called_for_since() -> None:
    overload = Overload(CONFIG, CLASSES)
    overload.observe(0, {"chat": -1500 * MS_NS})
    overload.observe(50 * MS_NS, {"chat": -1200 * MS_NS})  # level 2
    assert overload.observe(299 * MS_NS, {}) is None
    assert overload.observe(300 * MS_NS, {}) == LevelChange(300 * MS_NS, 2, "", 0)
    assert overload.observe(350 * MS_NS, {}) == LevelChange(350 * MS_NS, 0, "", 0)


def test_one_loud_observation_is_a_call_and_the_hold_begins_anew() -> None:
    overload = Overload(CONFIG, CLASSES)
    overload.observe(0, {"fraud": -200 * MS_NS})
    assert overload.observe(250 * MS_NS, {"fraud": 50 * MS_NS}) is None
    assert overload.observe(549 * MS_NS, {}) is None
    assert overload.observe(550 * MS_NS, {}) == LevelChange(550 * MS_NS, 0, "", 0)


def test_waiting_at_a_lower_level_lets_the_level_fall_there_and_no_further() -> None:
    overload = Overload(CONFIG, CLASSES)
    overload.observe(0, {"chat": -1500 * MS_NS})
    for i in range(1, 20):
        overload.observe(i * WINDOW_NS, {"chat": i * WINDOW_NS - 700 * MS_NS})
    assert overload.level == 1
    assert overload.observe(2 * S_NS, {"fraud": 2 * S_NS - 199 * MS_NS}) is None


def test_after_a_long_pause_what_waits_now_is_all_the_evidence() -> None:
    years_ns = 10 * 365 * 86_400 * S_NS
    for waits, level in (({}, 0), ({"chat": -1000 * MS_NS}, 1), ({"chat": -1500 * MS_NS}, 3)):
        overload = Overload(CONFIG, CLASSES)
        overload.observe(0, {"chat": -1500 * MS_NS})
        overload.observe(years_ns, {name: years_ns + ns for name, ns in waits.items()})
        assert overload.level == level


def test_of_equal_calls_the_first_class_of_the_configuration_is_named() -> None:
    for names in (["search", "chat"], ["chat", "search"]):
        overload = Overload(CONFIG, CLASSES)
        change = overload.observe(0, dict.fromkeys(names, -1300 * MS_NS))
        assert change == LevelChange(0, 2, "chat", 1300 * MS_NS)


def test_a_request_from_the_future_has_not_waited_yet() -> None:
    overload = Overload(CONFIG, CLASSES)
    overload.observe(0, {"fraud": -100 * MS_NS})
    assert overload.level == 1
    assert overload.observe(300 * MS_NS, {"chat": 301 * MS_NS}) == LevelChange(300 * MS_NS, 0, "chat", 0)


def test_a_class_nobody_configured_is_no_call() -> None:
    overload = Overload(CONFIG, CLASSES)
    assert overload.observe(0, {"unknown": -3600 * S_NS}) is None
    assert overload.next_wake_ns() is None


def test_a_controller_that_is_off_stays_at_level_zero() -> None:
    overload = Overload(OverloadConfig(enabled=False), CLASSES)
    assert overload.observe(0, {"chat": -3600 * S_NS}) is None
    assert overload.observe(S_NS, {"chat": -3600 * S_NS}) is None
    assert (overload.level, overload.next_wake_ns()) == (0, None)
    assert overload.stats().level_ns == (S_NS, 0, 0, 0, 0)
    overload.check()


def test_nothing_seen_yet_is_nothing_to_wait_for() -> None:
    overload = Overload(CONFIG, CLASSES)
    assert overload.next_wake_ns() is None
    overload.check()


def ask(priority_draw: int = 0, attempt: int = 0, tenant: str = "t") -> Arrive:
    return Arrive(0, "r", tenant, "chat", 0, 10, 10, draw=priority_draw, attempt=attempt)


def test_all_or_nothing_keeps_whole_criticalities_out() -> None:
    for ages_ms, kept_out in ((600, []), (1200, [2]), (1500, [1, 2])):
        overload = Overload(CONFIG, CLASSES)
        overload.observe(0, {"chat": -ages_ms * MS_NS})
        assert [priority for priority in (0, 1, 2) if overload.sheds(ask(), priority, 0)] == kept_out


@settings(max_examples=200, deadline=None)
@given(moves=MOVES)
def test_graded_the_level_is_at_least_what_the_share_amounts_to(moves) -> None:
    overload = Overload(GRADED, CLASSES)
    now_ns = 0
    for step_ns, ages_ns in moves:
        wake_ns = overload.next_wake_ns()
        now_ns = max(now_ns, (wake_ns or now_ns + 1) if step_ns is None else now_ns + step_ns)
        overload.observe(now_ns, {name: now_ns - age for name, age in ages_ns.items() if age is not None})
        overload.check()
        share = overload.stats().share_millionths
        assert overload.level >= (0 if share == 2_000_000 else 2 if share >= 1_000_000 else 3)
        assert not overload.sheds(ask(), 0, now_ns), "critical work is never kept out"
        assert share == 2_000_000 or overload.next_wake_ns() is not None, "a share that is cut is watched"


def test_second_tries_beyond_the_budget_are_shed_first_and_only_under_overload() -> None:
    overload = Overload(CONFIG, CLASSES, RetryConfig(budget_share=0.5, budget_most=2))
    assert not any(overload.sheds(ask(attempt=1), 1, 0) for _ in range(10)), "level 0: nobody counts"
    overload.observe(0, {"chat": -600 * MS_NS})
    assert overload.level == 1
    assert [overload.sheds(ask(attempt=1), 1, 0) for _ in range(3)] == [False, False, True]
    assert not overload.sheds(ask(attempt=1, tenant="other"), 1, 0), "each tenant has a budget of its own"
    assert not overload.sheds(ask(), 1, 0) and not overload.sheds(ask(attempt=7), 0, 0)
    overload.arrived(ask())
    assert overload.sheds(ask(attempt=2), 1, 0), "half a try"
    overload.arrived(ask())
    assert not overload.sheds(ask(attempt=2), 1, 0)
    overload.arrived(ask(attempt=1))
    assert overload.stats().retries == RetryStats(seen=1, refused=2)
    overload.check()


@pytest.mark.parametrize("config", [CONFIG, GRADED])
def test_retry_after_is_a_second_at_least(config: OverloadConfig) -> None:
    overload = Overload(config, CLASSES)
    overload.observe(0, {"chat": -1500 * MS_NS})
    assert overload.calm_ns() >= S_NS

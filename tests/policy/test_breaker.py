"""The breaker against a list of all that ever happened, and scripted scenes after resilience4j's own suite.

The suite's checklist, and the scene that shows it:
- rejects when open, counts it: rejects_when_open_and_says_when
- opens on failures (two shapes), on slow calls (by the clock, by word): opens_on_the_share_of_failures, opens_on_slow_*
- half-open after the wait, by attempt, by itself: rejects_when_open_*, the_open_time_doubles_*, lost_probes_*
- half-open: only N, none when they are gone, a permit freed on release: a_thousand_callers_*, a_cancelled_probe_*
- half-open: ignored is released, then closed: a_cancelled_probe_frees_its_permit_once, nothing_but_cancellations_*
- back to open on failures, on slow calls; closed below both: half_open_opens_again_*, half_open_closes_below_*
- longest wait in half-open, to open and to closed: lost_probes_*, one_lost_probe_*
- metrics start anew; disabled: half_open_closes_below_the_shares_and_starts_anew, off_lets_everything_through_*
- never from closed to half-open; no event for what is no change: the_table_is_closed_*
- one transition however many report: opens_on_the_share_of_failures, results_of_an_earlier_epoch_*
Not here because there is no such thing: forced open, metrics only, reset by hand, another initial state, a scheduler.

invariant: mutation that it caught
- window: one slot too few cleared; skipped seconds not cleared; seconds of the wrong length; totals that never fall;
  kept over a change; the closed kind in half-open; a call that failed late not slow as well
- trips: no minimum, or above the window; `>` for `>=` (failures, slow); the other share's limit; slow never opens;
  shares rounded up
- verdicts: hang is good; the word "slow" unheard; slow at the very limit; 0 = all slow; cancelled, or ignored, counted
- permits: N + 1; all; an outcome frees one; a cancelled probe keeps its own; released twice; probes noted in the wrong
  state, or kept for the next half-open; refusals not counted
- epochs: late results recorded; a probe heard after it was given up; only openings counted as changes
- half-open: judged by the first; the minimum of closed; lost probes silent, or good; the youngest one waited for
- moments: due a nanosecond late; one due thing a look; changes or hangs dated when looked at; told twice
- open time: no back-off; never starting over; no cap; jitter that lengthens, or always the first
- Retry-After: given though let through; by the breaker's own clock; a clock that steps back; off but counting
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import get_args

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from engine.config import BreakerConfig
from engine.policy.breaker import TABLE, Breaker, State, Transition, Verdict, Why
from engine.units import MS_NS, S_NS

VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
CONFIGS = [
    BreakerConfig(window="count", window_size=6, minimum_calls=4, failure_share=0.5, slow_share=0.75, slow_ms=700,
                  open_ms=1_000, open_max_ms=5_000, half_open_permits=3, half_open_max_ms=2_000),
    BreakerConfig(window="count", window_size=3, minimum_calls=9, failure_share=1.0, slow_share=1.0, slow_ms=0,
                  open_ms=500, open_max_ms=500, half_open_permits=1, half_open_max_ms=1_500),
    BreakerConfig(window="time", window_size=3, minimum_calls=3, failure_share=0.4, slow_share=0.6, slow_ms=900,
                  open_ms=800, open_max_ms=9_000, half_open_permits=4, half_open_max_ms=1_200),
    BreakerConfig(window="time", window_size=1, minimum_calls=2, failure_share=0.7, slow_share=0.3, slow_ms=400,
                  open_ms=2_000, open_max_ms=3_000, half_open_permits=2, half_open_max_ms=800),
]
JITTERS: list[tuple[int, ...] | None] = [None, (), (0, 250_000, 999_999)]


@dataclass(eq=False)
class Call:
    """An admitted call in the specification."""

    epoch: int
    given_ns: int
    expired: bool = False  # half-open has given it up
    back: bool = False


class NaiveBreaker:
    """Keeps everything, counts from scratch, moves time in the order of what is due."""

    def __init__(self, config: BreakerConfig, jitter: tuple[int, ...] | None) -> None:
        self.config, self.jitter = config, jitter or (0,)
        self.now_ns = 0
        self.state: State = "closed"
        self.epoch = self.opened = self.streak = self.until_ns = 0
        self.calls: list[Call] = []
        self.outcomes: list[tuple[int, int, bool, bool]] = []  # epoch, when, failed, slow
        self.log: list[Transition] = []
        self.counts = dict.fromkeys(("ok", "slow", "failed", "silent", "late", "unknown", "refused"), 0)

    def probes(self) -> list[Call]:
        """Those that half-open waits for."""
        mine = [c for c in self.calls if c.epoch == self.epoch and not c.back and not c.expired]
        return mine if self.state == "half_open" else []

    def window(self) -> list[tuple[int, int, bool, bool]]:
        mine = [o for o in self.outcomes if o[0] == self.epoch]
        if self.state == "half_open":
            return mine
        if self.config.window == "count":
            return mine[-self.config.window_size :]
        last = mine[-1][1] // S_NS if mine else 0
        return [o for o in mine if last - o[1] // S_NS < self.config.window_size]

    def full(self) -> bool:
        spent = len(self.probes()) + len(self.window())
        return self.state == "open" or (self.state == "half_open" and spent >= self.config.half_open_permits)

    def due(self) -> tuple[int, Call | None] | None:
        if self.state == "open":
            return self.until_ns, None
        out = [(c.given_ns + self.config.half_open_max_ms * MS_NS, c) for c in self.probes()]
        return min(out, key=lambda due: due[0]) if out else None

    def advance(self, now_ns: int) -> None:
        self.now_ns = max(self.now_ns, now_ns)
        while (due := self.due()) and due[0] <= self.now_ns:
            at_ns, probe = due
            if probe is None:
                self.go(at_ns, "half_open", "rested")
            else:
                probe.expired = True
                self.record(at_ns, True, False, "hung")

    def go(self, at_ns: int, state: State, why: Why) -> None:
        self.log.append(Transition(at_ns, self.state, state, why))
        if state == "open":
            self.streak = self.streak + 1 if self.state == "half_open" else 0
            length_ns = min(self.config.open_ms * 2**self.streak, self.config.open_max_ms) * MS_NS
            cut = self.jitter[self.opened % len(self.jitter)]
            self.until_ns = at_ns + length_ns - length_ns * cut // 10**6
            self.opened += 1
        self.state = state
        self.epoch += 1

    def record(self, at_ns: int, failed: bool, slow: bool, failing: Why = "failing") -> None:
        self.outcomes.append((self.epoch, at_ns, failed, slow))
        window, config = self.window(), self.config
        if self.state == "closed":
            least = min(config.minimum_calls, config.window_size) if config.window == "count" else config.minimum_calls
            if len(window) < least:
                return
        of = config.half_open_permits if self.state == "half_open" else len(window)
        if sum(o[2] for o in window) >= config.failure_share * of - 1e-9:
            self.go(at_ns, "open", failing)
        elif sum(o[3] for o in window) >= config.slow_share * of - 1e-9:
            self.go(at_ns, "open", "slow")
        elif self.state == "half_open" and len(window) == config.half_open_permits:
            self.go(at_ns, "closed", "recovered")

    def acquire(self, now_ns: int) -> int | None:
        self.advance(now_ns)
        if self.full():
            self.counts["refused"] += 1
            return None
        self.calls.append(Call(self.epoch, self.now_ns))
        return len(self.calls) - 1

    def release(self, now_ns: int, permit: int, verdict: Verdict) -> None:
        self.advance(now_ns)
        if not 0 <= permit < len(self.calls) or self.calls[permit].back:
            self.counts["unknown"] += 1
            return
        call = self.calls[permit]
        call.back = True
        if call.epoch != self.epoch or call.expired:
            self.counts["late"] += 1
        elif verdict in ("cancelled", "ignored"):
            self.counts["silent"] += 1
        else:
            long = self.config.slow_ms > 0 and self.now_ns - call.given_ns > self.config.slow_ms * MS_NS
            failed, slow = verdict in ("fail", "hang"), verdict == "slow" or long
            self.counts["failed" if failed else "slow" if slow else "ok"] += 1
            self.record(self.now_ns, failed, slow)


class BreakerMachine(RuleBasedStateMachine):
    """Two breakers hear the same calls; one is looked at all the time, the other has a clock that never steps back."""

    @initialize(which=st.sampled_from(CONFIGS), jitter=st.sampled_from(JITTERS))
    def start(self, which: BreakerConfig, jitter: tuple[int, ...] | None) -> None:
        self.breaker, self.unwatched = Breaker(which, jitter), Breaker(which, jitter)
        self.naive = NaiveBreaker(which, jitter)
        self.now_ns = self.seen = 0
        self.out: list[int] = []
        self.log: list[Transition] = []

    @rule(count=st.integers(1, 6))
    def acquire(self, count: int) -> None:
        for _ in range(count):
            permit = self.naive.acquire(self.now_ns)
            waits_ns = self.breaker.retry_after_ns(self.now_ns)
            assert (waits_ns == 0) == (permit is not None), "retry after: 0 exactly when it lets through"
            assert self.breaker.acquire(self.now_ns) == self.unwatched.acquire(self.naive.now_ns) == permit
            if permit is not None:
                self.out.append(permit)

    @rule(pick=st.integers(0, 50), verdict=st.sampled_from(VERDICTS), count=st.integers(1, 4), again=st.booleans())
    def release(self, pick: int, verdict: Verdict, count: int, again: bool) -> None:
        for _ in range(min(count, len(self.out))):
            permit = self.out[pick % len(self.out)]
            if not again:
                self.out.remove(permit)
            self.give(permit, verdict)
            if again:  # a second time
                self.out.remove(permit)
                self.give(permit, "fail")

    @rule(permit=st.sampled_from([-1, 10**9]))
    def release_of_a_stranger(self, permit: int) -> None:
        self.give(permit, "fail")

    def give(self, permit: int, verdict: Verdict) -> None:
        for one in (self.naive, self.breaker):
            one.release(self.now_ns, permit, verdict)
        self.unwatched.release(self.naive.now_ns, permit, verdict)

    @rule(ms=st.one_of(st.sampled_from([0, 1, 399, 400, 401, 699, 700, 701, 999, 1000, 1001]), st.integers(-50, 4_000)))
    def time_passes(self, ms: int) -> None:
        self.now_ns += ms * MS_NS

    @rule(less=st.integers(0, 1))
    def wait(self, less: int) -> None:
        """Until something is due, or just before."""
        if (due_ns := self.breaker.next_wake_ns()) is not None:
            self.now_ns = max(self.now_ns, due_ns - less)

    @invariant()
    def same(self) -> None:
        if not hasattr(self, "naive"):
            return
        naive = self.naive
        naive.advance(self.now_ns)
        assert self.breaker.state(self.now_ns) == naive.state
        due = naive.due()
        assert self.breaker.next_wake_ns() == (due and due[0])
        free = 0 if not naive.full() else naive.due()[0] - self.now_ns
        assert self.breaker.retry_after_ns(self.now_ns) == free
        self.breaker.check()
        self.unwatched.check()
        stats = self.breaker.stats()
        assert stats.state == naive.state and stats.opened == naive.opened
        assert stats.open_permits == sum(not c.back for c in naive.calls)
        assert stats.probes == len(naive.probes())
        assert {name: getattr(stats, name) for name in naive.counts} == naive.counts
        window = naive.window()
        sums = (len(window), sum(o[2] for o in window), sum(o[3] for o in window))
        assert (stats.window_calls, stats.window_failed, stats.window_slow) == sums
        self.log += self.breaker.transitions()
        assert self.log == naive.log
        assert self.breaker.transitions() == [], "transitions: told once"

    def teardown(self) -> None:
        if hasattr(self, "naive"):
            self.unwatched.state(self.naive.now_ns)
            assert self.unwatched.transitions() == self.naive.log, "looking changes nothing"
            assert self.unwatched.stats() == self.breaker.stats()


BreakerMachine.TestCase.settings = settings(max_examples=250, stateful_step_count=40, deadline=None)
TestBreaker = BreakerMachine.TestCase


@pytest.mark.parametrize("seed", range(8))
def test_long_random_lives(seed: int) -> None:
    """Fashions of weather, so that every row of the table is met often."""
    r = random.Random(seed)
    world = BreakerMachine()
    world.start(CONFIGS[seed % 4], JITTERS[seed % 3])
    weather = VERDICTS
    for n in range(1_500):
        if n % 25 == 0:
            weather = r.choice([VERDICTS, ("ok",), ("fail", "hang"), ("slow", "slow", "ok"), ("ok", "ok", "cancelled")])
        what = r.random()
        if what < 0.35:
            world.acquire(r.randint(1, 4))
        elif what < 0.75:
            world.release(r.randrange(50), r.choice(weather), r.randint(1, 4), r.random() < 0.1)
        elif what < 0.95:
            world.time_passes(r.choice([0, 1, 300, 700, 1_300]) + r.randint(-20, 200))
        else:
            world.wait(r.randint(0, 1))
        world.same()
    world.teardown()
    assert {(t.before, t.why) for t in world.log} >= {("closed", "failing"), ("open", "rested"), ("half_open", "hung")}


# ---------------------------------------------------------------- scenes

PLAIN = BreakerConfig(
    window="count", window_size=10, minimum_calls=4, failure_share=0.5, slow_share=0.5, slow_ms=1_000,
    open_ms=1_000, open_max_ms=6_000, half_open_permits=3, half_open_max_ms=2_000,
)


def but(**changes: object) -> BreakerConfig:
    return msgspec.structs.replace(PLAIN, **changes)


def calls(breaker: Breaker, now_ns: int, *verdicts: Verdict, took_ms: int = 0) -> None:
    """One after the other."""
    for verdict in verdicts:
        permit = breaker.acquire(now_ns)
        assert permit is not None, "let through"
        now_ns += took_ms * MS_NS
        breaker.release(now_ns, permit, verdict)


def tripped(config: BreakerConfig = PLAIN, at_ns: int = 0) -> Breaker:
    breaker = Breaker(config)
    calls(breaker, at_ns, *["fail"] * 4)
    assert breaker.state(at_ns) == "open"
    return breaker


def half_open(config: BreakerConfig = PLAIN) -> tuple[Breaker, int]:
    breaker = tripped(config)
    now_ns = breaker.next_wake_ns()
    assert now_ns is not None and breaker.state(now_ns) == "half_open"
    breaker.transitions()
    return breaker, now_ns


def whys(breaker: Breaker) -> list[str]:
    return [t.why for t in breaker.transitions()]


def test_the_table_is_closed_and_every_state_can_be_left() -> None:
    assert {before for before, _ in TABLE} == {*TABLE.values()} == set(get_args(State))
    assert all(before != after for (before, _), after in TABLE.items()), "no transition to itself: nothing to tell"
    assert ("closed", "rested") not in TABLE, "never from closed to half-open"


def test_rejects_when_open_and_says_when() -> None:
    breaker = tripped(at_ns=5)
    assert breaker.acquire(5) is None
    assert breaker.retry_after_ns(5) == S_NS
    assert breaker.acquire(S_NS + 4) is None and breaker.retry_after_ns(S_NS + 4) == 1
    assert breaker.acquire(S_NS + 5) is not None
    assert breaker.stats().refused == 2


@pytest.mark.parametrize("verdicts", [["fail"] * 4, ["ok", "hang", "ok", "fail"], ["fail", "fail", "ok", "ok"]])
def test_opens_on_the_share_of_failures(verdicts: list[Verdict]) -> None:
    breaker = Breaker(PLAIN)
    calls(breaker, 0, *verdicts)
    assert breaker.transitions() == [Transition(0, "closed", "open", "failing")], "one transition, told once"


@pytest.mark.parametrize("size", range(1, 31))
def test_a_share_that_is_a_fraction_is_met_by_just_that_fraction(size: int) -> None:
    for failures in range(1, size + 1):
        config = but(window_size=size, minimum_calls=size, failure_share=failures / size)
        for failed, state in ((failures - 1, "closed"), (failures, "open")):
            breaker = Breaker(config)
            calls(breaker, 0, *["ok"] * (size - failed), *["fail"] * failed)
            assert breaker.state(0) == state, f"{failed} of {size} at {failures} of {size}"


def test_low_volume_does_not_trip() -> None:
    breaker = Breaker(PLAIN)
    calls(breaker, 0, "fail", "fail", "fail")
    assert breaker.state(0) == "closed"
    calls(breaker, 0, *["cancelled", "ignored"] * 20)
    assert breaker.state(0) == "closed", "silence is no volume"
    calls(breaker, 0, "ok")
    assert breaker.state(0) == "open", "three of four"


def test_a_count_window_needs_no_more_calls_than_it_holds() -> None:
    breaker = Breaker(but(window_size=3, minimum_calls=100))
    calls(breaker, 0, *["fail"] * 3)
    assert breaker.state(0) == "open"


@pytest.mark.parametrize(("took_ms", "opens"), [(1_000, False), (1_001, True)])
def test_opens_on_slow_calls_by_the_clock(took_ms: int, opens: bool) -> None:
    breaker = Breaker(PLAIN)
    calls(breaker, 0, *["ok"] * 4, took_ms=took_ms)
    assert whys(breaker) == ["slow"] * opens


def test_opens_on_slow_calls_by_the_callers_word() -> None:
    breaker = Breaker(but(slow_ms=0))
    calls(breaker, 0, "ok", "ok", took_ms=10**6)
    calls(breaker, 0, "slow", "slow")
    assert whys(breaker) == ["slow"]


def test_a_call_that_failed_late_is_slow_too() -> None:
    breaker = Breaker(but(failure_share=1.0))
    calls(breaker, 0, "ok", "ok", "fail", "fail", took_ms=1_500)
    assert whys(breaker) == ["slow"]


def test_old_outcomes_leave_a_count_window() -> None:
    breaker = Breaker(but(window_size=4, minimum_calls=4))
    calls(breaker, 0, "fail", "ok", "ok", "ok", "ok", "fail")
    assert breaker.state(0) == "closed", "one of the last four"
    calls(breaker, 0, "fail")
    assert breaker.state(0) == "open", "two of the last four"


def test_old_outcomes_leave_a_time_window_second_by_second() -> None:
    breaker = Breaker(but(window="time", window_size=2))
    for second, verdict in enumerate(["fail", "fail", "ok", "fail", "ok", "ok"]):
        calls(breaker, second * S_NS + 999_999_999, verdict)
        assert breaker.stats().window_calls == min(second + 1, 2)
    calls(breaker, 3_600 * S_NS, "fail", "fail", "fail")
    assert breaker.state(3_600 * S_NS) == "closed" and breaker.stats().window_calls == 3, "an hour later"
    calls(breaker, 3_601 * S_NS, "fail")
    assert breaker.state(3_601 * S_NS) == "open"


def test_a_thousand_callers_at_half_open_are_exactly_n_probes() -> None:
    breaker, now_ns = half_open()
    let = [permit for _ in range(1_000) if (permit := breaker.acquire(now_ns)) is not None]
    assert len(let) == 3 and breaker.stats().refused == 997
    breaker.release(now_ns, let[0], "ok")
    assert breaker.acquire(now_ns) is None, "a probe that reported has used its permit up"
    assert breaker.state(now_ns) == "half_open"


@pytest.mark.parametrize("verdict", ["cancelled", "ignored"])
def test_a_cancelled_probe_frees_its_permit_once(verdict: Verdict) -> None:
    breaker, now_ns = half_open()
    let = [breaker.acquire(now_ns) for _ in range(3)]
    assert breaker.acquire(now_ns) is None and breaker.retry_after_ns(now_ns) == 2 * S_NS
    for _ in range(5):  # once is once
        breaker.release(now_ns, let[1] or 0, verdict)
    assert breaker.retry_after_ns(now_ns) == 0
    fourth = breaker.acquire(now_ns)
    assert fourth is not None and breaker.acquire(now_ns) is None
    for permit in (let[0], let[2], fourth):
        breaker.release(now_ns, permit or 0, "ok")
    assert whys(breaker) == ["recovered"]
    assert breaker.stats().unknown == 4


def test_nothing_but_cancellations_never_gets_it_stuck() -> None:
    breaker, now_ns = half_open()
    for n in range(500):
        permit = breaker.acquire(now_ns + n)
        assert permit is not None
        breaker.release(now_ns + n, permit, "cancelled")
    assert breaker.state(now_ns + 500) == "half_open"
    calls(breaker, now_ns + 501, "ok", "ok", "ok")
    assert breaker.state(now_ns + 501) == "closed"


def test_lost_probes_count_as_failed_after_the_longest_wait() -> None:
    breaker, now_ns = half_open()
    let = [breaker.acquire(now_ns + n) for n in range(3)]
    assert breaker.next_wake_ns() == now_ns + 2 * S_NS
    assert breaker.acquire(now_ns + 2 * S_NS - 1) is None
    assert breaker.state(now_ns + 2 * S_NS) == "half_open", "one of three is not yet half"
    assert breaker.state(now_ns + 2 * S_NS + 1) == "open"
    assert breaker.transitions() == [Transition(now_ns + 2 * S_NS + 1, "half_open", "open", "hung")]
    for permit in let:
        breaker.release(now_ns + 3 * S_NS, permit or 0, "ok")
    assert breaker.stats().late == 3 and breaker.stats().open_permits == 0
    breaker.check()


def test_one_lost_probe_does_not_keep_it_from_closing() -> None:
    breaker, now_ns = half_open()
    breaker.acquire(now_ns)
    calls(breaker, now_ns, "ok", "ok")
    assert breaker.acquire(now_ns) is None
    assert breaker.state(now_ns + 2 * S_NS) == "closed"
    assert breaker.transitions() == [Transition(now_ns + 2 * S_NS, "half_open", "closed", "recovered")]


def test_half_open_closes_below_the_shares_and_starts_anew() -> None:
    breaker, now_ns = half_open()
    calls(breaker, now_ns, "ok", "fail")
    assert breaker.state(now_ns) == "half_open", "judged when all are back"
    calls(breaker, now_ns, "ok")
    assert whys(breaker) == ["recovered"]
    stats = breaker.stats()
    assert (stats.window_calls, stats.window_failed, stats.window_slow) == (0, 0, 0)
    calls(breaker, now_ns, "fail", "fail", "fail")
    assert breaker.state(now_ns) == "closed", "the minimum counts anew"


@pytest.mark.parametrize(("verdict", "why"), [("fail", "failing"), ("hang", "failing"), ("slow", "slow")])
def test_half_open_opens_again_as_soon_as_it_is_decided(verdict: Verdict, why: str) -> None:
    breaker, now_ns = half_open()
    calls(breaker, now_ns, "ok", verdict)
    assert breaker.state(now_ns) == "half_open"
    calls(breaker, now_ns, verdict)
    assert whys(breaker) == [why]
    breaker, now_ns = half_open()
    calls(breaker, now_ns, verdict, verdict)
    assert whys(breaker) == [why], "the third can change nothing"


def test_results_of_an_earlier_epoch_are_recorded_nowhere() -> None:
    breaker = Breaker(PLAIN)
    early = [breaker.acquire(0) for _ in range(12)]
    calls(breaker, 0, *["fail"] * 4)
    for permit in early[:4]:
        breaker.release(0, permit or 0, "ok")
    assert breaker.stats().window_calls == 0
    now_ns = S_NS
    assert breaker.state(now_ns) == "half_open"
    for permit in early[4:8]:
        breaker.release(now_ns, permit or 0, "fail")
    assert breaker.state(now_ns) == "half_open" and breaker.stats().window_calls == 0
    calls(breaker, now_ns, "ok", "ok", "ok")
    for permit in early[8:]:
        breaker.release(now_ns, permit or 0, "fail")
    assert breaker.state(now_ns) == "closed" and breaker.stats().late == 12
    breaker.check()


def test_the_open_time_doubles_up_to_the_cap_and_starts_over_after_closing() -> None:
    breaker, now_ns = tripped(), 0
    lengths = []
    for _ in range(6):
        due_ns = breaker.next_wake_ns()
        assert due_ns is not None
        lengths.append((due_ns - now_ns) // MS_NS)
        now_ns = due_ns
        calls(breaker, now_ns, "fail", "fail")
    assert lengths == [1_000, 2_000, 4_000, 6_000, 6_000, 6_000]
    now_ns += 6 * S_NS
    calls(breaker, now_ns, "ok", "ok", "ok")
    calls(breaker, now_ns, *["fail"] * 4)
    assert breaker.retry_after_ns(now_ns) == S_NS


def test_two_hundred_openings_in_a_row_keep_to_the_cap() -> None:
    breaker = tripped()
    for _ in range(200):
        now_ns = breaker.next_wake_ns()
        assert now_ns is not None
        calls(breaker, now_ns, "fail", "fail")
    assert breaker.retry_after_ns(now_ns) == 6 * S_NS


def test_jitter_is_taken_in_turn_and_only_shortens() -> None:
    breaker, now_ns = Breaker(but(open_max_ms=1_000), [0, 100_000, 500_000]), 0
    calls(breaker, 0, *["fail"] * 4)
    lengths = []
    for _ in range(4):
        lengths.append(breaker.retry_after_ns(now_ns) // MS_NS)
        now_ns += lengths[-1] * MS_NS
        calls(breaker, now_ns, "fail", "fail")
    assert lengths == [1_000, 900, 500, 1_000]
    for wrong in (-1, 1_000_000):
        with pytest.raises(AssertionError, match="jitter"):
            Breaker(PLAIN, [wrong])


def test_who_waits_as_told_is_let_through() -> None:
    breaker = tripped()
    assert breaker.acquire(breaker.retry_after_ns(0)) is not None


def test_off_lets_everything_through_and_remembers_nothing() -> None:
    breaker = Breaker(but(enabled=False))
    calls(breaker, 0, *["fail", "slow", "hang"] * 100, took_ms=5_000)
    assert (breaker.state(0), breaker.retry_after_ns(0), breaker.next_wake_ns()) == ("closed", 0, None)
    assert breaker.transitions() == []
    permit = breaker.acquire(0)
    stats = breaker.stats()
    assert (stats.open_permits, stats.failed, stats.window_calls, stats.late) == (1, 0, 0, 0)
    breaker.release(0, permit or 0, "ok")
    breaker.release(0, permit or 0, "ok")
    assert breaker.stats().unknown == 1
    breaker.check()


def test_a_clock_that_steps_back_stands_still() -> None:
    breaker = tripped(at_ns=10 * S_NS)
    assert breaker.retry_after_ns(9 * S_NS) == 2 * S_NS
    assert breaker.state(11 * S_NS) == "half_open"
    assert breaker.state(0) == "half_open"


def test_one_failed_step_of_a_full_batch_does_not_open_the_default() -> None:
    breaker = Breaker(BreakerConfig())
    calls(breaker, S_NS, *["ok"] * 24, *["fail"] * 16)
    assert breaker.state(S_NS) == "closed"
    calls(breaker, 2 * S_NS, *["fail"] * 8)
    assert breaker.state(2 * S_NS) == "open"


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5_000), st.sampled_from(VERDICTS)), max_size=80))
def test_a_refused_caller_who_retries_as_told_gets_through_in_bounded_time(day: list[tuple[int, Verdict]]) -> None:
    """Liveness: whatever happened, with everybody else gone and every probe lost."""
    breaker, now_ns = Breaker(PLAIN), 0
    for ms, verdict in day:
        now_ns += ms * MS_NS
        permit = breaker.acquire(now_ns)
        if permit is not None and verdict != "hang":
            breaker.release(now_ns, permit, verdict)
    start_ns = now_ns
    while breaker.acquire(now_ns) is None:
        wait_ns = breaker.retry_after_ns(now_ns)
        assert wait_ns > 0
        now_ns += wait_ns
    assert now_ns - start_ns <= (2_000 + 6_000) * MS_NS

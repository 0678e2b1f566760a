"""The limiter's arithmetic against other people's, on clocks that the test moves.

Who decides alike, and how far:
- ``pyrate-limiter`` (integers, several rates at once): every decision; its wait is ours rounded up to milliseconds.
- ``throttled-py`` (GCRA in floats): every decision and wait, exactly where binary fractions are exact, else to 1 us.
- ``aiolimiter`` (a leaky bucket in floats): the same bucket by another method; every decision, likewise. Tells no wait.
- ``rush`` (GCRA in microseconds): every decision of a burst of ``limit - 1/2``. It rounds what is left, so that the
  last unit of a burst is refused, and its wait is half an emission too long. The method has no half: ours is right.
- ``limits`` (a moving window): one a window is GCRA with a burst of one. More are another promise: what its window of N
  admits, GCRA of N admits, and what that admits, a window of 2 N admits. It refuses at the very border, where a second
  request is one window after the first: GCRA admits there, so that moment is left out.

What can never pass: ours says "never" as ``redis-cell`` does, ``pyrate-limiter`` too; ``throttled-py`` and ``rush``
name a time after which it is refused again, ``aiolimiter`` raises.

Mutations caught: a burst a part too short; a unit too long; a moment that has passed charged from, or one to come
forgotten; a refusal charged; "never" with a time; swept while it owes; levels charged one by one, or all but the first;
users not limited; the shortest wait told. Not seen here, but by ``test_limiter.py``: fractions of a nanosecond, debt.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, tzinfo
from fractions import Fraction
from types import SimpleNamespace
from typing import NamedTuple, Protocol

import limits.storage.memory
import pytest
import throttled.utils
from aiolimiter import AsyncLimiter
from hypothesis import given, settings
from hypothesis import strategies as st
from limits import RateLimitItemPerSecond
from limits.strategies import MovingWindowRateLimiter
from pyrate_limiter import GCRA, Rate, RateItem, StateBucket
from rush.limiters.gcra import GenericCellRatelimiter
from rush.quota import Quota
from rush.stores.dictionary import DictionaryStore
from throttled import MemoryStore, Throttled, rate_limiter

from engine.config import LimiterConfig
from engine.policy.gcra import NANO, UNIT, Gcra, Grant
from engine.policy.limiter import Limiter
from engine.units import MS_NS, S_NS, US_NS
from tests.policy.clock import Clock

TICK_NS = S_NS // 512  # whole nanoseconds and a binary fraction of a second: exact in integers and in floats


class Answer(NamedTuple):
    """``wait_ns``: None where it is not told, or never."""

    ok: bool
    wait_ns: int | None = None


class Peer(Protocol):
    """One key of somebody's limiter: so many a period, so many at once."""

    def __init__(self, clock: Clock, limit: int, period_s: int, burst: int) -> None: ...

    def take(self, cost: int) -> Answer:
        """At the clock's time."""

    def wait_of(self, wait_ns: int) -> int | None:
        """What it would tell for our wait."""


def ours(limit: int, period_s: int, burst: Fraction | int) -> Gcra[str]:
    assert limit * NANO % period_s == 0, "a rate that ours can hold"
    return Gcra(Grant(limit * NANO // period_s, int(burst * UNIT)))


class OurBucket:
    def __init__(self, clock: Clock, limit: int, period_s: int, burst: Fraction | int) -> None:
        self.clock, self.gcra = clock, ours(limit, period_s, burst)

    def wait_ns(self, cost: int, earlier_ns: int = 0) -> int | None:
        return self.gcra.wait_ns(self.clock.now_ns - earlier_ns, "k", cost * UNIT)

    def take(self, cost: int) -> Answer:
        wait_ns = self.wait_ns(cost)
        if wait_ns == 0:
            self.gcra.charge(self.clock.now_ns, "k", cost * UNIT)
        self.gcra.check(self.clock.now_ns)
        return Answer(wait_ns == 0, wait_ns)


class Pyrate:
    """Its clock is the item's."""

    def __init__(self, clock: Clock, limit: int, period_s: int, burst: int) -> None:
        self.clock = clock
        self.bucket = StateBucket([Rate(limit, period_s * 1000, burst)], GCRA())

    def take(self, cost: int) -> Answer:
        item = RateItem("k", self.clock.now_ns // MS_NS, cost)
        if self.bucket.put(item):
            return Answer(True, 0)
        wait_ms = self.bucket.waiting(item)
        assert isinstance(wait_ms, int)
        return Answer(False, None if wait_ms < 0 else wait_ms * MS_NS)

    def wait_of(self, wait_ns: int) -> int | None:
        return -(-wait_ns // MS_NS) * MS_NS


class ThrottledPy:
    """Reads the monotonic clock through its own ``utils``."""

    def __init__(self, clock: Clock, limit: int, period_s: int, burst: int) -> None:
        throttled.utils.now_mono_f = clock.s
        quota = rate_limiter.per_duration(timedelta(seconds=period_s), limit, burst)
        self.burst, self.limiter = burst, Throttled(using="gcra", quota=quota, store=MemoryStore())

    def take(self, cost: int) -> Answer:
        result = self.limiter.limit("k", cost)
        wait_ns = round(result.state.retry_after * S_NS)
        return Answer(not result.limited, None if cost > self.burst else wait_ns)

    def wait_of(self, wait_ns: int) -> int | None:
        return wait_ns


class Leaky:
    """Reads its event loop's clock."""

    def __init__(self, clock: Clock, limit: int, period_s: int, burst: int) -> None:
        self.limiter = AsyncLimiter(burst, burst * period_s / limit)
        self.limiter._event_loop = SimpleNamespace(time=clock.s, is_closed=lambda: False)

    def take(self, cost: int) -> Answer:
        if not self.limiter.has_capacity(cost):
            return Answer(False)
        with pytest.raises(StopIteration):  # nothing to wait for
            self.limiter.acquire(cost).send(None)
        return Answer(True)

    def wait_of(self, wait_ns: int) -> int | None:
        return None


class Rush:
    """Its store says what time it is."""

    def __init__(self, clock: Clock, limit: int, period_s: int, burst: int) -> None:
        class Store(DictionaryStore):
            def current_time(self, zone: tzinfo | None = UTC) -> datetime:
                return clock.date(zone)

        assert burst == limit, "it has no other"
        self.quota, self.limiter = Quota(timedelta(seconds=period_s), limit), GenericCellRatelimiter(store=Store())
        self.burst, self.half_ns = burst, period_s * S_NS // limit // 2

    def take(self, cost: int) -> Answer:
        result = self.limiter.rate_limit("k", cost, self.quota)
        wait_ns = result.retry_after // timedelta(microseconds=1) * US_NS if result.limited else 0
        return Answer(not result.limited, None if cost >= self.burst else wait_ns)

    def wait_of(self, wait_ns: int) -> int | None:
        return wait_ns + self.half_ns if wait_ns else 0


@pytest.fixture(scope="module", autouse=True)
def clocks() -> Iterator[None]:
    """Clocks that cannot be handed in are replaced where the library looks them up, and put back."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(throttled.utils, "now_mono_f", None)
        patch.setattr(limits.storage.memory, "time", None)
        idle = SimpleNamespace(start=lambda: None, is_alive=lambda: True)  # it tidies up, in a thread of its own
        patch.setattr(
            limits.storage.memory, "threading", SimpleNamespace(Timer=lambda *_: idle, RLock=threading.RLock)
        )
        yield


# ------------------------------------------------ the same decisions

QUOTAS = [(1, 1, 1), (2, 1, 2), (8, 1, 3), (4, 8, 4), (16, 1, 16), (1, 4, 5), (64, 2, 10)]  # limit, period, burst
SQUARE = [(1, 1, 1), (2, 1, 2), (4, 8, 4), (16, 1, 16), (8, 2, 8)]  # burst = limit
MILLIS = [(1, 1, 1), (2, 1, 2), (8, 1, 3), (5, 1, 5), (96, 60, 7), (50, 2, 20), (1000, 1, 10)]
LIBRARIES = {  # the peer, quotas that are exact in its arithmetic, a step of its clock, what its burst lacks
    "pyrate-limiter": (Pyrate, MILLIS, MS_NS, Fraction(0)),
    "throttled-py": (ThrottledPy, QUOTAS, TICK_NS, Fraction(0)),
    "aiolimiter": (Leaky, QUOTAS, TICK_NS, Fraction(0)),
    "rush": (Rush, SQUARE, 8 * TICK_NS, Fraction(1, 2)),  # whole microseconds
}
MOVES = st.lists(
    st.tuples(
        st.one_of(st.sampled_from(["told", "nearly"]), st.integers(0, 3), st.integers(0, 600), st.just(10**6)),
        st.one_of(st.integers(1, 3), st.integers(1, 21)),
    ),
    min_size=10, max_size=80,
)
Moves = list[tuple[int | str, int]]


@pytest.mark.parametrize("library", LIBRARIES)
@settings(max_examples=200, deadline=None)
@given(moves=MOVES, which=st.integers(0, 6))
def test_every_decision_is_the_librarys(library: str, moves: Moves, which: int) -> None:
    kind, quotas, step_ns, lacks = LIBRARIES[library]
    limit, period_s, burst = quotas[which % len(quotas)]
    clock = Clock()
    peer: Peer = kind(clock, limit, period_s, burst)
    mine, told_ns = OurBucket(clock, limit, period_s, burst - lacks), 0
    for move, cost in moves:
        if isinstance(move, int):
            clock.now_ns += move * step_ns
        else:  # to the very moment at which it may pass, or to one step before
            steps = -(-told_ns // step_ns) - (move == "nearly")
            clock.now_ns += max(0, steps) * step_ns
        got, expected = mine.take(cost), peer.take(cost)
        assert got.ok == expected.ok
        told_ns = got.wait_ns or 0
        if got.wait_ns is None:
            assert cost > burst - lacks and expected.wait_ns is None
        else:
            assert expected.wait_ns == peer.wait_of(got.wait_ns)


@pytest.mark.parametrize("library", ["throttled-py", "aiolimiter"])
@settings(max_examples=200, deadline=None)
@given(
    moves=st.lists(st.tuples(st.one_of(st.integers(0, 999), st.integers(0, 3 * S_NS)), st.integers(1, 5)), max_size=80),
    limit=st.integers(1, 1000), period_s=st.sampled_from([1, 64, 1000]), burst=st.integers(1, 50),
)
def test_every_decision_is_the_librarys_at_any_moment(
    library: str, moves: list[tuple[int, int]], limit: int, period_s: int, burst: int,
) -> None:
    """In floats a border is blurred: who comes within a microsecond of it comes three later."""
    clock = Clock()
    peer: Peer = LIBRARIES[library][0](clock, limit, period_s, burst)
    mine = OurBucket(clock, limit, period_s, burst)
    for step_ns, cost in moves:
        clock.now_ns += step_ns
        wait_ns, earlier_ns = mine.wait_ns(cost), mine.wait_ns(cost, earlier_ns=US_NS)
        if wait_ns is not None and (0 < wait_ns <= US_NS or (wait_ns == 0 and earlier_ns)):
            clock.now_ns += 3 * US_NS
        got, expected = mine.take(cost), peer.take(cost)
        assert got.ok == expected.ok
        if got.wait_ns and expected.wait_ns is not None:
            assert abs(got.wait_ns - expected.wait_ns) <= US_NS


# ------------------------------------------------ several levels


LEVELS = [Rate(4, 1000, 3), Rate(5, 2000, 4), Rate(8, 4000, 6)]  # a user's, a tenant's, everybody's


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(st.just("told"), st.integers(0, 900)), max_size=80))
def test_levels_are_charged_together_as_the_librarys_rates_are(moves: list[int | str]) -> None:
    """One user of one tenant. ``pyrate-limiter`` tells the wait of the first rate that refuses; ours is the longest."""
    bucket = StateBucket(LEVELS, GCRA())
    limiter = Limiter(
        LimiterConfig(
            user_rps=4.0, user_burst_s=0.75, rate_rps=2.5, burst=4.0, total_rps=2.0, total_burst_s=3.0,
        ),
        {},
    )
    now_ns = told_ns = 0
    for move in moves:
        now_ns += -(-told_ns // MS_NS) * MS_NS if isinstance(move, str) else move * MS_NS
        item = RateItem("k", now_ns // MS_NS)
        got, expected = limiter.take(now_ns, "t", 0, b"ann"), bucket.put(item)
        assert got.ok == expected
        told_ns = got.retry_after_ns or 0
        if not got.ok:
            theirs_ms = bucket.waiting(item)
            assert isinstance(theirs_ms, int) and theirs_ms <= -(-told_ns // MS_NS)
        assert got.ok or told_ns, "it can always pass some day"
        limiter.check()


# ------------------------------------------------ a moving window


class Window:
    """``limits``: at most so many in any stretch of so many seconds."""

    def __init__(self, clock: Clock, limit: int, period_s: int) -> None:
        limits.storage.memory.time = SimpleNamespace(time=clock.s)
        self.limiter = MovingWindowRateLimiter(limits.storage.memory.MemoryStorage())
        self.item = RateLimitItemPerSecond(limit, period_s)

    def take(self, cost: int) -> bool:
        return self.limiter.hit(self.item, "k", cost=cost)


STEPS = st.lists(st.tuples(st.integers(0, 700), st.integers(1, 3)), max_size=80)


@settings(max_examples=200, deadline=None)
@given(moves=STEPS, period_s=st.sampled_from([1, 2, 4]))
def test_one_a_window_is_a_burst_of_one(moves: list[tuple[int, int]], period_s: int) -> None:
    clock = Clock()
    mine, window = OurBucket(clock, 1, period_s, 1), Window(clock, 1, period_s)
    for ticks, _ in moves:
        clock.now_ns += ticks * TICK_NS
        if mine.wait_ns(1) == 0 and mine.wait_ns(1, earlier_ns=1):
            clock.now_ns += 1  # the border is left out
        assert mine.take(1).ok == window.take(1)


@settings(max_examples=200, deadline=None)
@given(moves=STEPS, limit=st.integers(3, 12), period_s=st.sampled_from([1, 2, 4]))
def test_what_a_window_admits_passes_and_what_passes_a_window_of_twice_as_many_admits(
    moves: list[tuple[int, int]], limit: int, period_s: int,
) -> None:
    clock = Clock()
    window, wide = Window(clock, limit, period_s), Window(clock, 2 * limit, period_s)
    behind, mine = OurBucket(clock, limit, period_s, limit), OurBucket(clock, limit, period_s, limit)
    for ticks, cost in moves:
        clock.now_ns += ticks * TICK_NS
        if window.take(cost):
            assert behind.take(cost).ok
        if mine.take(cost).ok:
            assert wide.take(cost)

"""The breaker against other people's, on clocks that the test moves, where they promise the same.

They open after so many failures in a row, ours by a share of a window: a window of n calls that needs all n of them
failed is the same rule, as a success leaves fewer than n for n calls on. One probe, an open time that does not grow,
nothing slow. What remains is the state machine: when it opens, for how long to the tick, and what a probe decides.

- ``circuitbreaker``: every decision and state, one call at a time.
- ``pybreaker``: every decision, one call at a time (it holds a lock round each). It can ask for several good probes in
  a row: the same as that many permits of which none may fail. Ours has one share for both states, so this is compared
  where one failure opens.
- ``purgatory``: every decision, calls that overlap included: what ends after it has opened changes nothing in either.
  It rests until the moment has passed, ours until it has come: its time is half a tick shorter here.

Where they differ, resilience4j's state machine decides, and ours follows it: a call that is ignored counts as good in
all three and closes a half-open breaker; ours says nothing, and gives the permit back. A late success closes an open
``circuitbreaker``; ours hears only its own epoch. Half-open lets everybody through in two of them: see the last test.
Other libraries: ``aiobreaker`` is ``pybreaker`` made for asyncio, without the lock; resilience4j itself runs on a JVM.

Mutations caught: opens one failure late; one early; good calls do not count in the window; the failures of before are
kept over a rest; rests a nanosecond longer; a good probe does not close; a failed one closes; the open time doubles
without a cap; late failures recorded; 2 N permits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import datetime, tzinfo
from types import SimpleNamespace
from typing import Protocol

import circuitbreaker
import purgatory.domain.model
import pybreaker
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from purgatory.domain.model import Context, OpenedState

from engine.config import BreakerConfig
from engine.policy.breaker import Breaker
from engine.units import S_NS
from tests.policy.clock import Clock

TICKS_PER_S = 64  # a tick is a binary fraction of a second and whole microseconds: exact in every clock
TICK_NS = S_NS // TICKS_PER_S
TICKS_PER_OPENING = 8  # 125 ms
CALLERS = 1_000


class Trouble(Exception):
    """The call failed."""


def ours(failures: int, openings: int, probes: int = 1, share: float = 1.0) -> Breaker:
    open_ms = openings * TICKS_PER_OPENING * 1000 // TICKS_PER_S
    return Breaker(
        BreakerConfig(
            window="count", window_size=failures, minimum_calls=failures, failure_share=share, slow_share=1.0,
            slow_ms=0, open_ms=open_ms, open_max_ms=open_ms, half_open_permits=probes, half_open_max_ms=10**9,
        )
    )


class Peer(Protocol):
    def call(self, failed: bool, ticks: int) -> bool:
        """A call that takes so long; whether it was let through."""


class Ours:
    def __init__(self, clock: Clock, breaker: Breaker) -> None:
        self.clock, self.breaker = clock, breaker

    def call(self, failed: bool, ticks: int) -> bool:
        permit = self.breaker.acquire(self.clock.now_ns)
        if permit is not None:
            self.breaker.release(self.clock.now_ns + ticks * TICK_NS, permit, "fail" if failed else "ok")
        self.breaker.check()
        return permit is not None


class Decorated:
    """``circuitbreaker``, and ``pybreaker``: each calls a function that the test gives."""

    def __init__(self, clock: Clock, wrap: Callable[..., Callable], refused: type[Exception]) -> None:
        self.clock, self.refused = clock, refused
        self.wrapped = wrap(self.work)
        self.was_called = False

    def work(self, failed: bool, ticks: int) -> None:
        self.was_called = True
        self.clock.now_ns += ticks * TICK_NS
        if failed:
            raise Trouble

    def call(self, failed: bool, ticks: int) -> bool:
        self.was_called, began_ns = False, self.clock.now_ns
        try:
            self.wrapped(failed, ticks)
        except (Trouble, self.refused):  # one that opens it is told so by the second
            pass
        finally:
            self.clock.now_ns = began_ns
        return self.was_called


@pytest.fixture(scope="module", autouse=True)
def clocks() -> Iterator[None]:
    """The libraries' clocks are replaced where they look them up, and put back."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(circuitbreaker, "monotonic", None)
        patch.setattr(pybreaker, "datetime", None)
        patch.setattr(purgatory.domain.model, "time", None)
        yield


def their_circuitbreaker(clock: Clock, failures: int, openings: int) -> tuple[Decorated, circuitbreaker.CircuitBreaker]:
    circuitbreaker.monotonic = clock.s
    rest_s = openings * TICKS_PER_OPENING / TICKS_PER_S
    breaker = circuitbreaker.CircuitBreaker(failures, rest_s, Trouble, name="peer")
    return Decorated(clock, breaker.decorate, circuitbreaker.CircuitBreakerError), breaker


def their_pybreaker(clock: Clock, failures: int, openings: int, probes: int = 1) -> Decorated:

    class Now(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]
            return clock.date(tz)

    pybreaker.datetime = Now
    rest_s = openings * TICKS_PER_OPENING / TICKS_PER_S
    breaker = pybreaker.CircuitBreaker(failures, rest_s, probes)
    return Decorated(clock, breaker, pybreaker.CircuitBreakerError)


def their_purgatory(clock: Clock, failures: int, openings: int) -> Context:
    purgatory.domain.model.time = SimpleNamespace(time=clock.s)
    return Context("peer", failures, (openings * TICKS_PER_OPENING - 0.5) / TICKS_PER_S)


CALLS = st.lists(
    st.tuples(
        st.one_of(st.integers(0, 2), st.integers(0, 40), st.just(10**6)),  # ticks between two calls
        st.integers(0, 9),  # of ten, how many would fail at this moment's weather
        st.integers(0, 5),  # ticks that it takes
    ),
    min_size=20, max_size=100,
)
Calls = list[tuple[int, int, int]]
RUN = settings(max_examples=200, deadline=None)
FAILURES, OPENINGS = st.integers(1, 5), st.integers(1, 3)


def compare(clock: Clock, mine: Ours, peer: Peer, calls: Calls) -> Iterator[None]:
    """One after the other; the clock stands at the end of each."""
    weather = 5
    for ticks, luck, took in calls:
        clock.now_ns += ticks * TICK_NS
        weather = (weather + luck) % 10
        failed = weather < 5
        assert mine.call(failed, took) == peer.call(failed, took)
        clock.now_ns += took * TICK_NS
        yield


@RUN
@given(calls=CALLS, failures=FAILURES, openings=OPENINGS)
def test_circuitbreaker_decides_alike(calls: Calls, failures: int, openings: int) -> None:
    clock = Clock()
    peer, breaker = their_circuitbreaker(clock, failures, openings)
    mine = Ours(clock, ours(failures, openings))
    for _ in compare(clock, mine, peer, calls):
        assert mine.breaker.state(clock.now_ns) == breaker.state


@RUN
@given(calls=CALLS, failures=FAILURES, openings=OPENINGS)
def test_pybreaker_decides_alike(calls: Calls, failures: int, openings: int) -> None:
    clock = Clock()
    for _ in compare(clock, Ours(clock, ours(failures, openings)), their_pybreaker(clock, failures, openings), calls):
        pass


@RUN
@given(calls=CALLS, probes=st.integers(1, 8), openings=OPENINGS)
def test_pybreaker_closes_after_as_many_good_probes(calls: Calls, probes: int, openings: int) -> None:
    clock = Clock()
    mine = Ours(clock, ours(1, openings, probes, share=1 / probes))
    for _ in compare(clock, mine, their_pybreaker(clock, 1, openings, probes), calls):
        pass


@RUN
@given(
    rounds=st.lists(st.tuples(st.integers(0, 30), st.lists(st.booleans(), min_size=1, max_size=6)), max_size=40),
    failures=FAILURES, openings=OPENINGS,
)
def test_purgatory_decides_alike_though_calls_overlap(
    rounds: list[tuple[int, list[bool]]], failures: int, openings: int,
) -> None:
    """All of a round begin before the first of them ends; half-open, one begins and the others come too late."""
    clock = Clock()
    theirs, mine = their_purgatory(clock, failures, openings), ours(failures, openings)
    for ticks, fates in rounds:
        clock.now_ns += ticks * TICK_NS
        alone = mine.state(clock.now_ns) != "closed"
        permits = [mine.acquire(clock.now_ns) for _ in fates[: 1 if alone else None]]
        for permit in permits:
            if permit is None:
                with pytest.raises(OpenedState):
                    theirs.handle_new_request()
            else:
                theirs.handle_new_request()
        for permit, failed in zip(permits, fates, strict=False):
            if permit is not None:
                theirs.__exit__(Trouble if failed else None, Trouble() if failed else None, None)
                mine.release(clock.now_ns, permit, "fail" if failed else "ok")
        assert theirs.state == {"open": "opened", "closed": "closed"}[mine.state(clock.now_ns)]
        mine.check()


def test_a_thousand_at_half_open_are_n_probes_here_and_a_thousand_there() -> None:
    """Why calls are compared one at a time where it is half open."""
    clock, permits = Clock(), 4
    _, breaker = their_circuitbreaker(clock, 1, 1)
    context, mine = their_purgatory(clock, 1, 1), ours(1, 1, permits)
    for one in (breaker, context):
        with pytest.raises(Trouble), one:
            raise Trouble
    Ours(clock, mine).call(True, 0)
    clock.now_ns += TICKS_PER_OPENING * TICK_NS
    let = 0
    for _ in range(CALLERS):  # all begin, none has ended
        let += not breaker.opened
        context.handle_new_request()
    assert let == CALLERS and context.state == "half-opened"
    assert sum(mine.acquire(clock.now_ns) is not None for _ in range(CALLERS)) == permits

"""Circuit breaker round one boundary, a replica or an encoder: it trips to the fallback ladder, never to silence.

Closed counts outcomes in a sliding window; open refuses for a time that doubles with every re-opening; half-open lets
exactly N probes through and judges by them. A permit comes back once. A cancelled or ignored call says nothing, and
what was admitted before the last change of state is recorded nowhere. A probe that stays away longer than the longest
wait has failed, so half-open is never stuck. A change happens when it was due, not when somebody looked: looking
changes nothing. Method: resilience4j's state machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from engine.config import BreakerConfig
from engine.units import S_NS, ms_to_ns
from engine.values import Struct

State = Literal["closed", "open", "half_open"]
Why = Literal["failing", "slow", "hung", "rested", "recovered"]
Verdict = Literal["ok", "slow", "fail", "hang", "ignored", "cancelled"]  # "ignored": refused before any work was done

TABLE: dict[tuple[State, Why], State] = {
    ("closed", "failing"): "open",
    ("closed", "slow"): "open",
    ("open", "rested"): "half_open",
    ("half_open", "failing"): "open",
    ("half_open", "slow"): "open",
    ("half_open", "hung"): "open",
    ("half_open", "recovered"): "closed",
}
MILLION = 1_000_000
CUTS = 16
GOLDEN_MILLIONTHS = 618_034  # its multiples spread evenly over the unit interval, however many there are


class Transition(Struct):
    """The state from ``at_ns`` on."""

    at_ns: int
    before: State
    after: State
    why: Why


class BreakerStats(Struct):
    """State and permits as of the last call; returned permits by what they said; the window's totals."""

    state: State
    open_permits: int  # admitted and not yet released, of whatever epoch
    probes: int  # of these, probes that half-open still waits for
    ok: int
    slow: int
    failed: int  # hangs included
    silent: int  # cancelled or ignored
    late: int  # released after the state they were admitted in, or after the longest wait
    unknown: int  # releases of permits that nobody holds
    refused: int
    opened: int
    window_calls: int
    window_failed: int
    window_slow: int


class Window:
    """The last ``size`` outcomes, or those of the last ``size`` seconds, this one included: a ring, with its totals."""

    def __init__(self, size: int, by_time: bool) -> None:
        self.calls = self.failed = self.slow = 0
        self._by_time = by_time
        self._ring = [(0, 0, 0)] * size
        self._last = -1  # number of the slot written last: a second, or an outcome

    def add(self, now_ns: int, failed: bool, slow: bool) -> None:
        """One outcome, after the slots that are over have made room."""
        ring, size = self._ring, len(self._ring)
        slot = now_ns // S_NS if self._by_time else self._last + 1
        for over in range(max(self._last, slot - size) + 1, slot + 1):
            self._count(over % size, (0, 0, 0))
        calls, failures, slows = ring[slot % size]
        self._count(slot % size, (calls + 1, failures + failed, slows + slow))
        self._last = slot

    def _count(self, index: int, new: tuple[int, int, int]) -> None:
        old, self._ring[index] = self._ring[index], new
        self.calls += new[0] - old[0]
        self.failed += new[1] - old[1]
        self.slow += new[2] - old[2]

    def check(self) -> None:
        """Invariants."""
        totals = tuple(map(sum, zip(*self._ring, strict=True)))
        assert (self.calls, self.failed, self.slow) == totals, "window: the running totals are the totals"


class Breaker:
    """One per boundary. ``jitter``: shares (in millionths) by which open times are cut, taken in turn."""

    def __init__(self, config: BreakerConfig, jitter: Sequence[int] | None = None) -> None:
        assert all(0 <= share < MILLION for share in jitter or ()), "jitter: cuts a part of the open time, never all"
        self.config = config
        self._jitter = tuple(jitter or ())
        self._failure_limit, self._slow_limit = _millionths(config.failure_share), _millionths(config.slow_share)
        self._slow_ns, self._probe_ns = ms_to_ns(config.slow_ms), ms_to_ns(config.half_open_max_ms)
        self._now_ns = 0
        self._state: State = "closed"
        self._epoch = 0  # number of transitions
        by_count = config.window == "count"
        self._minimum = min(config.minimum_calls, config.window_size) if by_count else config.minimum_calls
        self._window = self._fresh_window()
        self._until_ns = 0  # end of the open time
        self._reopened = 0  # in a row, without having been closed between
        self._out: dict[int, tuple[int, int]] = {}  # permit -> epoch, when it was given
        self._probes: dict[int, int] = {}  # permit -> when it was given, oldest first; only in half-open
        self._transitions: list[Transition] = []
        self._granted = self._returned = self._refused = self._opened = 0
        self._ok = self._slow = self._failed = self._silent = self._late = self._unknown = 0

    def acquire(self, now_ns: int) -> int | None:
        """A permit, to be released exactly once; None when the call must not be made."""
        self._advance(now_ns)
        if not self._lets_through():
            self._refused += 1
            return None
        permit = self._granted
        self._granted += 1
        self._out[permit] = (self._epoch, self._now_ns)
        if self._state == "half_open":
            self._probes[permit] = self._now_ns
        return permit

    def release(self, now_ns: int, permit: int, verdict: Verdict) -> None:
        """The call is over. A hang failed; what took longer than ``slow_ms`` was slow, whether it failed or not."""
        self._advance(now_ns)
        if permit not in self._out:
            self._unknown += 1
            return
        epoch, given_ns = self._out.pop(permit)
        self._returned += 1
        if not self.config.enabled:
            return
        if epoch != self._epoch or (self._state == "half_open" and permit not in self._probes):
            self._late += 1
            return
        self._probes.pop(permit, None)
        if verdict in ("cancelled", "ignored"):
            self._silent += 1
            return
        failed = verdict in ("fail", "hang")
        slow = verdict == "slow" or 0 < self._slow_ns < self._now_ns - given_ns
        self._failed += failed
        self._slow += slow and not failed
        self._ok += not slow and not failed
        self._window.add(self._now_ns, failed, slow)
        self._judge(self._now_ns, "failing")

    def state(self, now_ns: int) -> State:
        """What it is at ``now_ns``."""
        self._advance(now_ns)
        return self._state

    def retry_after_ns(self, now_ns: int) -> int:
        """0 when a call would be let through; else until something changes by itself, if no probe reports before."""
        self._advance(now_ns)
        due_ns = self.next_wake_ns()
        return 0 if self._lets_through() or due_ns is None else due_ns - now_ns

    def next_wake_ns(self) -> int | None:
        """The end of the open time, or of the wait for the oldest probe."""
        if self._state == "open":
            return self._until_ns
        return next(iter(self._probes.values())) + self._probe_ns if self._probes else None

    def transitions(self) -> list[Transition]:
        """Those since the last call, oldest first."""
        out, self._transitions = self._transitions, []
        return out

    def stats(self) -> BreakerStats:
        """A snapshot."""
        return BreakerStats(
            state=self._state, open_permits=len(self._out), probes=len(self._probes), ok=self._ok, slow=self._slow,
            failed=self._failed, silent=self._silent, late=self._late, unknown=self._unknown, refused=self._refused,
            opened=self._opened, window_calls=self._window.calls, window_failed=self._window.failed,
            window_slow=self._window.slow,
        )

    def check(self) -> None:
        """Invariants."""
        self._window.check()
        said = self._ok + self._slow + self._failed + self._silent + self._late
        assert self._granted == self._returned + len(self._out), "permits: each is out, or came back once"
        assert self._returned == said or not self.config.enabled, "permits: each that came back was counted once"
        assert self._probes.keys() <= self._out.keys(), "probes: each holds a permit"
        assert [*self._probes.values()] == sorted(self._probes.values()), "probes: oldest first"
        due_ns = self.next_wake_ns()
        assert due_ns is None or due_ns > self._now_ns, "due: nothing is overdue"
        if self._state == "half_open":
            assert len(self._probes) + self._window.calls <= self.config.half_open_permits, "probes: N, never more"
            assert self._window.calls < self.config.half_open_permits, "probes: judged when all are back"
        else:
            assert not self._probes, "probes: only in half-open"
        if self._state == "open":
            assert self._until_ns - self._now_ns <= ms_to_ns(self.config.open_max_ms), "open: never beyond the cap"
        assert self.config.enabled or (self._epoch, self._window.calls, self._refused) == (0, 0, 0), "off: no memory"

    def _lets_through(self) -> bool:
        if self._state == "half_open":
            return len(self._probes) + self._window.calls < self.config.half_open_permits
        return self._state == "closed"

    def _advance(self, now_ns: int) -> None:
        """Whatever was due up to now, in its order and at its moment; a clock that steps back stands still."""
        self._now_ns = max(self._now_ns, now_ns)
        while (due_ns := self.next_wake_ns()) is not None and due_ns <= self._now_ns:
            if self._state == "open":
                self._change(due_ns, "rested")
            else:
                del self._probes[next(iter(self._probes))]
                self._window.add(due_ns, failed=True, slow=False)
                self._judge(due_ns, "hung")

    def _judge(self, at_ns: int, failing: Why) -> None:
        """After an outcome. Half-open is judged as soon as the probes still out cannot change what follows."""
        window, half_open = self._window, self._state == "half_open"
        if not half_open and window.calls < self._minimum:
            return
        of = self.config.half_open_permits if half_open else window.calls
        if window.failed * MILLION >= self._failure_limit * of:
            self._change(at_ns, failing)
        elif window.slow * MILLION >= self._slow_limit * of:
            self._change(at_ns, "slow")
        elif half_open and window.calls == of:
            self._change(at_ns, "recovered")

    def _change(self, at_ns: int, why: Why) -> None:
        before, self._state = self._state, TABLE[self._state, why]
        self._transitions.append(Transition(at_ns, before, self._state, why))
        self._epoch += 1
        self._probes.clear()
        self._window = self._fresh_window()
        if self._state == "open":
            self._reopened = self._reopened + 1 if before == "half_open" else 0
            self._until_ns = at_ns + self._open_ns()
            self._opened += 1

    def _open_ns(self) -> int:
        most_ns = ms_to_ns(self.config.open_max_ms)
        open_ns = min(most_ns, ms_to_ns(self.config.open_ms) << min(self._reopened, 40))
        cut = self._jitter[self._opened % len(self._jitter)] if self._jitter else 0
        return open_ns - open_ns * cut // MILLION

    def _fresh_window(self) -> Window:
        if self._state == "half_open":
            return Window(self.config.half_open_permits, by_time=False)
        return Window(self.config.window_size, by_time=self.config.window == "time")


def _millionths(share: float) -> int:
    """Rounded down, so that two of three meet a share of 2/3."""
    return max(1, int(share * MILLION))


def spread(number: int, most: float) -> tuple[int, ...]:
    """Jitter of the ``number``-th breaker, without a die: cuts up to ``most`` of the open time that differ from its
    neighbours', so that many gateways do not probe a recovering replica in the same instant."""
    if not most:
        return ()
    return tuple(
        round((number * CUTS + turn + 1) * GOLDEN_MILLIONTHS % MILLION * most) for turn in range(CUTS)
    )

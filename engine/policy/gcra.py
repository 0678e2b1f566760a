"""The generic cell rate algorithm (ATM Forum TM 4.0; redis-cell) over whole numbers: one moment a key, nothing else.

A key's state is its theoretical arrival time: when everything that it has spent is paid back. Time is counted in units
of 10**-18 of what is limited, so that elapsed_ns times a rate in nano-units a second is exact and no bucket drifts. A
key whose moment has passed equals one never seen, and is forgotten; one that owes something never is.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Mapping
from typing import Generic, NamedTuple, TypeVar

from engine.units import S_NS, s_to_ns

NANO = 1_000_000_000
UNIT = NANO * S_NS  # one request, one token
ENDLESS = 1e15  # a rate of `inf` in a file means "no limit", and this is one
SWEPT_PER_CALL = 4  # a call adds one key at most, so looking at more than one keeps the table near its live size
SWEEP_EVERY = 16  # calls

K = TypeVar("K", bound=Hashable)


class Grant(NamedTuple):
    """``rate`` in nano-units a second, ``burst`` in 10**-18 units. A rate of 0 limits nothing."""

    rate: int
    burst: int


UNLIMITED = Grant(0, 0)


def grant(per_s: float, burst: float) -> Grant:
    """Of so many units a second, and so many at once."""
    return Grant(_nano(per_s), _nano(burst) * S_NS)


def grant_for(per_s: float, burst_s: float) -> Grant:
    """Of so many units a second, and so many seconds' worth at once; 0 limits nothing."""
    if not per_s:
        return UNLIMITED
    rate = _nano(per_s)
    return Grant(rate, rate * s_to_ns(min(burst_s, ENDLESS)))


class Gcra(Generic[K]):
    """One moment for each key that has spent something lately. Callers give a clock that never goes back."""

    def __init__(self, default: Grant, grants: Mapping[K, Grant] | None = None) -> None:
        """``grants``: of the keys that have one of their own."""
        self._default, self._grants = default, dict(grants or {})
        self._paid: OrderedDict[K, int] = OrderedDict()  # theoretical arrival times; a rotating order for the sweep
        self._calls = 0

    def wait_ns(self, now_ns: int, key: K, units: int) -> int | None:
        """How long until ``units`` (10**-18) may pass, if nobody else comes between; None = never. Changes nothing."""
        rate, burst = self._grants.get(key, self._default)
        if not rate:
            return 0
        paid = self._paid.get(key)
        if units > burst:
            return None
        if paid is None:
            return 0
        short = paid - now_ns * rate + units - burst
        return -(-short // rate) if short > 0 else 0

    def charge(self, now_ns: int, key: K, units: int) -> None:
        """Spend them, or give some back: never above a full burst, never more than one burst below nothing."""
        rate, burst = self._grants.get(key, self._default)
        if not rate:
            return
        now = now_ns * rate
        paid = self._paid.get(key, 0)
        paid = (paid if paid > now else now) + units
        self._paid[key] = min(paid, now + 2 * burst)
        self._calls += 1
        if self._calls >= SWEEP_EVERY:
            self._calls = 0
            self._sweep(now_ns)

    def sweep(self, now_ns: int) -> None:
        """Let go of some that owe nothing, if any; for calls that charge nobody."""
        self._calls += 1
        if self._calls >= SWEEP_EVERY:
            self._calls = 0
            self._sweep(now_ns)

    def _sweep(self, now_ns: int) -> None:
        paid, grants, default = self._paid, self._grants, self._default
        for _ in range(min(SWEPT_PER_CALL * SWEEP_EVERY, len(paid))):
            key, moment = paid.popitem(last=False)
            if moment > now_ns * grants.get(key, default)[0]:
                paid[key] = moment

    def keys(self) -> list[K]:
        """Those that are remembered."""
        return list(self._paid)

    def knows(self, key: K) -> bool:
        """Whether it is remembered."""
        return key in self._paid

    def __len__(self) -> int:
        return len(self._paid)

    def check(self, now_ns: int) -> None:
        """Invariants."""
        for key, paid in self._paid.items():
            rate, burst = self._grants.get(key, self._default)
            assert rate, f"who is not limited is not remembered: {key!r}"
            assert paid <= now_ns * rate + 2 * burst, f"debt is at most one burst: {key!r}"


def _nano(amount: float) -> int:
    # At least 1: a rate so small that it rounds to nothing must not turn into "unlimited" or a division by zero.
    return max(1, round(min(amount, ENDLESS) * NANO))

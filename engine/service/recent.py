"""What happened in the last minute, second by second: answers by tier, and latencies by class. From records alone.

Bounded whatever the load: a ring of seconds, and in each second latencies counted in steps of 5 %, so that a quantile
is at most 2.5 % off. A record belongs to the second in which its request ended. Reads no clock.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from math import exp, log
from typing import NamedTuple

from engine.events import RequestRecord
from engine.units import S_NS

SECONDS = 60
NOT_SERVED = "not served"
LEAST_NS = 1_000  # shorter times are one step
LOG_STEP = log(1.05)

Kind = tuple[str, str]  # "ttft" or "e2e", and the class


class Latency(NamedTuple):
    """Of ``number`` requests; nanoseconds, None where there are none."""

    number: int
    p50_ns: int | None
    p95_ns: int | None


class _Second:
    """What ended in one."""

    __slots__ = ("ends", "latencies", "number")

    def __init__(self, number: int) -> None:
        self.number = number
        self.ends: dict[tuple[str, str], int] = {}  # by tier and class
        self.latencies: dict[tuple[str, str, int], int] = {}  # by kind, class and step


class Recent:
    """The minute before a moment."""

    def __init__(self) -> None:
        self._ring: list[_Second | None] = [None] * (SECONDS + 1)  # whole seconds, and the one that goes on

    def append(self, record: RequestRecord) -> None:
        """A request has ended. One that ended more than a minute before the newest is passed over."""
        second = self._second((record.arrived_ns + record.e2e_ns) // S_NS)
        if second is None:
            return
        name, counts = record.traffic_class, second.latencies
        tier = record.tier if record.outcome == "served" and record.tier else NOT_SERVED
        second.ends[tier, name] = second.ends.get((tier, name), 0) + 1
        if record.ttft_ns is not None:
            key = "ttft", name, step_of(record.ttft_ns)
            counts[key] = counts.get(key, 0) + 1
        if tier != NOT_SERVED:
            key = "e2e", name, step_of(record.e2e_ns)
            counts[key] = counts.get(key, 0) + 1

    def per_second(self, now_ns: int, tier: str) -> tuple[int, ...]:
        """Requests that ended with this tier, or ``NOT_SERVED``, in each of the last whole seconds; oldest first."""
        counts = [0] * SECONDS
        first = now_ns // S_NS - SECONDS
        for second in self._seconds(now_ns):
            counts[second.number - first] += sum(n for (found, _), n in second.ends.items() if found == tier)
        return tuple(counts)

    def ended(self, now_ns: int, traffic_class: str) -> tuple[int, int]:
        """Of a class: how many were served, and how many were not."""
        served = lost = 0
        for second in self._seconds(now_ns):
            for (tier, name), count in second.ends.items():
                if name == traffic_class:
                    served, lost = (served, lost + count) if tier == NOT_SERVED else (served + count, lost)
        return served, lost

    def latency(self, now_ns: int, kind: Kind) -> Latency:
        """Nearest-rank quantiles."""
        steps: Counter[int] = Counter()
        for second in self._seconds(now_ns):
            for (what, name, step), count in second.latencies.items():
                if (what, name) == kind:
                    steps[step] += count
        number = steps.total()
        return Latency(number, *(_quantile(steps, number, share) for share in (0.5, 0.95)))

    def _second(self, number: int) -> _Second | None:
        at = number % len(self._ring)
        known = self._ring[at]
        if known is None or known.number < number:
            known = self._ring[at] = _Second(number)
        return known if known.number == number else None

    def _seconds(self, now_ns: int) -> Iterable[_Second]:
        now = now_ns // S_NS
        return (second for second in self._ring if second is not None and now - SECONDS <= second.number < now)


def step_of(value_ns: int) -> int:
    """Number of the step that a time falls into."""
    return int(log(value_ns / LEAST_NS) / LOG_STEP) if value_ns > LEAST_NS else 0


def _quantile(steps: Counter[int], count: int, share: float) -> int | None:
    left = -int(-share * count // 1)  # nearest rank: the smallest that this share does not exceed
    for step in sorted(steps):
        left -= steps[step]
        if left <= 0:
            return round(LEAST_NS * exp((step + 0.5) * LOG_STEP))
    return None

"""When would a request's first token come? Uncached prompt tokens ahead of it and its own, over the replica's pace.

Ahead is what the replica said it has still to compute at the same or a higher priority, and what this gateway has sent
there and the replica has not seen. Known to be missing: requests of a higher priority that are yet to come, turns among
the tenants of one priority, and the step in flight. Method: predicted TTFT of LLM gateways (queued prefill tokens over
measured prefill rate), with prefix hits and finished chunks taken out (``backlog.py``, ``pace.py``, ``router.py``).
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from engine.events import PRIORITY, Pressure
from engine.units import S_NS
from engine.values import Struct


class ForecastStats(Struct):
    """By replica: prompt tokens to compute, the unseen included, and its pace (0 = not known). Requests refused for
    what was predicted."""

    ahead_tokens: tuple[int, ...]
    tps: tuple[int, ...]
    refused: int


@dataclass(slots=True)
class _Lane:
    said: tuple[int, ...] = (0,) * len(PRIORITY)
    tps: int = 0
    unseen: OrderedDict[int, tuple[int, int]] = field(default_factory=OrderedDict)  # sid -> priority, tokens
    unseen_tokens: list[int] = field(default_factory=lambda: [0] * len(PRIORITY))


class Forecast:
    """One gateway's, of all its replicas. Owned by its Fleet."""

    def __init__(self, replicas: int) -> None:
        self._lanes = [_Lane() for _ in range(replicas)]
        self.refused = 0

    def sent(self, sid: int, replica: int, priority: int, tokens: int) -> None:
        """Submitted just now, with so many uncached prompt tokens. Sids only grow."""
        lane = self._lanes[replica]
        lane.unseen[sid] = priority, tokens
        lane.unseen_tokens[priority] += tokens

    def forget(self, sid: int, replica: int) -> None:
        """It has started or ended; a second time is a no-op."""
        lane = self._lanes[replica]
        if (entry := lane.unseen.pop(sid, None)) is not None:
            lane.unseen_tokens[entry[0]] -= entry[1]

    def hear(self, pressure: Pressure) -> None:
        """A replica's word replaces its last one."""
        lane = self._lanes[pressure.replica]
        lane.said, lane.tps = pressure.backlog_tokens or lane.said, pressure.prefill_tps
        while lane.unseen and (sid := next(iter(lane.unseen))) <= pressure.acked_sid:
            self.forget(sid, pressure.replica)

    def lose(self, replica: int) -> None:
        """It has died: nothing waits there any more, and its pace is not that of the next one's first steps."""
        lane = self._lanes[replica]
        lane.said, lane.tps = _Lane().said, 0

    def ttft_ns(self, replica: int, priority: int, tokens: int) -> int | None:
        """From now to the first token of a request with so many uncached prompt tokens; None while no pace is known."""
        lane = self._lanes[replica]
        if not lane.tps:
            return None
        ahead = sum(lane.said[: priority + 1]) + sum(lane.unseen_tokens[: priority + 1])
        return (ahead + tokens) * S_NS // lane.tps

    def idle(self, replica: int, priority: int) -> bool:
        """Nothing of this priority or above is known to be ahead there."""
        lane = self._lanes[replica]
        return not any((*lane.said[: priority + 1], *lane.unseen_tokens[: priority + 1]))

    def stats(self) -> ForecastStats:
        """A snapshot."""
        return ForecastStats(
            ahead_tokens=tuple(sum(lane.said) + sum(lane.unseen_tokens) for lane in self._lanes),
            tps=tuple(lane.tps for lane in self._lanes), refused=self.refused,
        )

    def check(self) -> None:
        """Invariants."""
        for lane in self._lanes:
            sums = [0] * len(PRIORITY)
            for priority, tokens in lane.unseen.values():
                sums[priority] += tokens
            assert lane.unseen_tokens == sums, "forecast: the running sums are the sums"
            assert list(lane.unseen) == sorted(lane.unseen), "forecast: unseen in order of sid"

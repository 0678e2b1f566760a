"""Those that no step has held yet: how many of each class, since when, and until when they may be begun."""

from __future__ import annotations

from heapq import heappop, heappush
from typing import Protocol

from engine.events import Submit


class Asked(Protocol):
    """Whoever keeps a request while it waits: a batcher's sequence, a lane's item."""

    ask: Submit


class Unseen:
    """Books over sids. Heaps keep entries of those that have gone until they come up; then they are skipped."""

    def __init__(self) -> None:
        self.classes: dict[str, dict[int, int]] = {}  # class -> sid -> sent_ns
        self._ages: dict[str, list[tuple[int, int]]] = {}  # class -> heap of (sent_ns, sid)
        self._deadlines: list[tuple[int, int, str]] = []  # heap of (start_by_ns, sid, class)

    def add(self, seq: Asked) -> None:
        """It has come, or come back."""
        ask = seq.ask
        self.classes.setdefault(ask.traffic_class, {})[ask.sid] = ask.sent_ns
        heappush(self._ages.setdefault(ask.traffic_class, []), (ask.sent_ns, ask.sid))
        heappush(self._deadlines, (ask.start_by_ns, ask.sid, ask.traffic_class))

    def seen(self, seq: Asked) -> None:
        """A step holds it, or it has ended; a second time is a no-op."""
        name = seq.ask.traffic_class
        unseen, ages = self.classes[name], self._ages[name]
        unseen.pop(seq.ask.sid, None)
        while ages and ages[0][1] not in unseen:  # here: where nobody ever waits, nobody asks for the oldest
            heappop(ages)

    def next_late(self, now_ns: int) -> list[int]:
        """The sids whose time to be begun has passed, seen ones among them; each is named once."""
        late: list[int] = []
        while self._deadlines and self._deadlines[0][0] < now_ns:
            late.append(heappop(self._deadlines)[1])
        return late

    def next_late_ns(self) -> int | None:
        """The first moment at which one of those that are still unseen is late."""
        deadlines = self._deadlines
        while deadlines and deadlines[0][1] not in self.classes[deadlines[0][2]]:
            heappop(deadlines)
        return deadlines[0][0] + 1 if deadlines else None

    def oldest_ns(self, traffic_class: str) -> int:
        """When the oldest of a class's unseen was sent; several gateways' submissions arrive out of order."""
        return self._ages[traffic_class][0][0]

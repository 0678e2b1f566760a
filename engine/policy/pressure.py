"""What a gateway knows of its replicas' queues: their last words, plus its own submissions that they have not seen.

A replica is deaf during a step, so the youngest submissions are missing from what it said last; without them a burst
would look like calm for the length of a step. Ages come from instants, so they stay true between two messages.
"""

from __future__ import annotations

from engine.events import Pressure
from engine.policy.flights import Flight


class Pressures:
    """One gateway's picture of all replicas."""

    def __init__(self) -> None:
        self._last: dict[int, Pressure] = {}
        self._unseen: dict[int, Flight] = {}  # submitted, not acknowledged; in order of sid

    def sent(self, flight: Flight) -> None:
        """Submitted just now."""
        self._unseen[flight.sid] = flight

    def forget(self, sid: int) -> None:
        """It has started or ended: no longer waiting, whatever the last message said."""
        self._unseen.pop(sid, None)

    def hear(self, pressure: Pressure) -> None:
        """A replica's word replaces its last one."""
        self._last[pressure.replica] = pressure
        while self._unseen and (sid := next(iter(self._unseen))) <= pressure.acked_sid:
            del self._unseen[sid]

    def oldest_ns(self) -> dict[str, int]:
        """Traffic class -> instant at which its oldest waiting request was submitted."""
        oldest: dict[str, int] = {}
        for pressure in self._last.values():
            for waiting in pressure.waiting:
                name = waiting.traffic_class
                oldest[name] = min(waiting.oldest_ns, oldest.get(name, waiting.oldest_ns))
        for flight in self._unseen.values():
            name = flight.traffic_class
            oldest[name] = min(flight.sent_ns, oldest.get(name, flight.sent_ns))
        return oldest

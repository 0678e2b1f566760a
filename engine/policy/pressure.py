"""What a gateway knows of its replicas' queues: their last words, plus its own submissions that they have not seen.

A replica is deaf during a step, so the youngest submissions are missing from what it said last; without them a burst
would look like calm for the length of a step. Ages come from instants, so they stay true between two messages.
"""

from __future__ import annotations

from collections import OrderedDict

from engine.events import Pressure
from engine.policy.flights import Flight


class Pressures:
    """One gateway's picture of all replicas."""

    def __init__(self) -> None:
        self._last: dict[int, Pressure] = {}
        self._unseen: dict[int, Flight] = {}  # submitted, not acknowledged
        # the same, as finds the first at once (a plain dict finds its first slowly): replica -> sids in order of sid,
        # class -> sid -> sent_ns in order of time
        self._of_replica: dict[int, OrderedDict[int, None]] = {}
        self._sent: dict[str, OrderedDict[int, int]] = {}

    def sent(self, flight: Flight) -> None:
        """Submitted just now."""
        self._unseen[flight.sid] = flight
        self._of_replica.setdefault(flight.replica, OrderedDict())[flight.sid] = None
        self._sent.setdefault(flight.traffic_class, OrderedDict())[flight.sid] = flight.sent_ns

    def forget(self, sid: int) -> None:
        """It has started or ended: no longer waiting, whatever the last message said."""
        if flight := self._unseen.pop(sid, None):
            del self._of_replica[flight.replica][sid]
            del self._sent[flight.traffic_class][sid]

    def hear(self, pressure: Pressure) -> None:
        """A replica's word replaces its last one."""
        self._last[pressure.replica] = pressure
        unseen = self._of_replica.get(pressure.replica)
        while unseen and (sid := next(iter(unseen))) <= pressure.acked_sid:
            self.forget(sid)

    def lose(self, replica: int) -> None:
        """It has died: nothing waits there any more. What it was sent ends by itself, one by one."""
        self._last.pop(replica, None)

    def oldest_ns(self) -> dict[str, int]:
        """Traffic class -> instant at which its oldest waiting request was submitted. Work: replicas times classes."""
        oldest = {name: next(iter(sent.values())) for name, sent in self._sent.items() if sent}
        for pressure in self._last.values():
            for waiting in pressure.waiting:
                name = waiting.traffic_class
                oldest[name] = min(waiting.oldest_ns, oldest.get(name, waiting.oldest_ns))
        return oldest

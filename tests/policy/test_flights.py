"""Flights against a list that is searched from its end.

Mutations it caught:
- ride on lower criticality; a key lost to an older flight's end; findable after the end, or when deserted
- deserted with its leader; the leader not first among the riders; sids from 0; attachments not counted
"""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.events import Arrive
from engine.policy.flights import Flight, Flights, Seat

FIRST_SID = 5 << 40
KEYS = [b"", b"a", b"b"]


def asked(rid: int) -> Arrive:
    return Arrive(rid, f"r{rid}", "t", "chat", 0, 5, 4)


class FlightsMachine(RuleBasedStateMachine):
    """Leaders, followers, quitters; every rider appears once in the world."""

    def __init__(self) -> None:
        super().__init__()
        self.flights = Flights(FIRST_SID)
        self.open: list[tuple[Flight, dict[int, bool]]] = []  # in order of take-off; rid -> still listens
        self.findable: dict[bytes, Flight] = {}
        self.next_rid = self.led = self.attached = 0

    @rule(key=st.sampled_from(KEYS), priority=st.integers(0, 2))
    def arrive(self, key: bytes, priority: int) -> None:
        rid, self.next_rid = self.next_rid, self.next_rid + 1
        flight = self.findable.get(key)
        if flight is not None and flight.priority > priority:
            flight = None  # nobody rides on what matters less
        assert self.flights.find(key, priority) is flight
        if flight is None:
            flight = self.flights.lead(asked(rid), key, priority, 100 + rid, Seat(rid % 3, rid))
            assert (flight.sid, flight.key, flight.priority) == (FIRST_SID + self.led, key, priority)
            assert (flight.sent_ns, flight.traffic_class, flight.started) == (100 + rid, "chat", False)
            assert (flight.replica, flight.seat) == (rid % 3, Seat(rid % 3, rid))
            self.led += 1
            self.open.append((flight, {rid: True}))
            if key:
                self.findable[key] = flight
        else:
            self.flights.join(flight, rid)
            self.attached += 1
            next(riders for f, riders in self.open if f is flight)[rid] = True

    @precondition(lambda self: self.open)
    @rule(pick=st.integers(0, 9), who=st.integers(0, 9))
    def leave(self, pick: int, who: int) -> None:
        flight, riders = self.open[pick % len(self.open)]
        listening = [rid for rid, listens in riders.items() if listens]
        if listening:
            rid = listening[who % len(listening)]
            riders[rid] = False
            deserted = len(listening) == 1
            assert self.flights.leave(flight, rid) == deserted, "deserted: with the last one, and only then"
            if deserted:
                flight.seat = None  # as the fleet does
                self.hide(flight)

    @precondition(lambda self: self.open)
    @rule(pick=st.integers(0, 9))
    def land(self, pick: int) -> None:
        flight, riders = self.open.pop(pick % len(self.open))
        assert self.flights.close(flight.sid) is flight
        assert flight.riders == riders and list(flight.riders) == list(riders), "the leader first, then as they came"
        assert self.flights.close(flight.sid) is None and self.flights.get(flight.sid) is None
        self.hide(flight)

    def hide(self, flight: Flight) -> None:
        if self.findable.get(flight.key) is flight:
            del self.findable[flight.key]

    @invariant()
    def same(self) -> None:
        self.flights.check()
        stats = self.flights.stats()
        assert (stats.flights, stats.riders) == (len(self.open), sum(len(riders) for _, riders in self.open))
        assert stats.attached == self.attached
        for key in KEYS:
            assert self.flights.find(key, 2) is self.findable.get(key)
        for flight, _ in self.open:
            assert self.flights.get(flight.sid) is flight


FlightsMachine.TestCase.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
TestFlights = FlightsMachine.TestCase


def test_without_a_key_nobody_is_found() -> None:
    flights = Flights(0)
    flights.lead(asked(0), b"", 0, 0, Seat(0, 0))
    assert flights.find(b"", 0) is None


def test_a_more_important_flight_takes_the_key_over_and_does_not_lose_it_to_the_older_ones_end() -> None:
    flights = Flights(0)
    low = flights.lead(asked(0), b"k", 2, 0, Seat(0, 0))
    assert flights.find(b"k", 0) is None
    high = flights.lead(asked(1), b"k", 0, 0, Seat(0, 1))
    assert flights.find(b"k", 2) is high
    flights.close(low.sid)
    assert flights.find(b"k", 2) is high
    flights.check()

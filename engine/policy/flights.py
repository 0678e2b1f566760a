"""Submissions in flight, and who rides on them: identical requests compute once (single-flight).

The first request leads; later ones with the same exact key attach and read the same tokens. A leader whose client goes
away flies on for its followers; the last rider to leave aborts. Nobody rides on a flight of lower criticality, which
could be shed or preempted under a more important passenger. A flight with a ``job`` is the gateway's own: it needs no
rider until the job is given up. One that was called off ends for those who are aboard, but is found by nobody any more.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from engine.events import Arrive, Ended, Submit
from engine.policy.jobs import Job
from engine.policy.rules import Key
from engine.values import Struct

BACKGROUND = "background"  # the class of what is computed for no client


class Seat(NamedTuple):
    """A place on a replica, and its breaker's permit."""

    replica: int
    permit: int


@dataclass(slots=True, eq=False)
class Flight:
    """One Submit. Mutable, owned by Flights."""

    sid: int
    replica: int
    seat: Seat | None  # None once it was given back
    key: bytes
    priority: int
    traffic_class: str
    sent_ns: int
    ask: Arrive  # the leader's
    tags: tuple[str, ...] = ()  # what its answer will depend on
    since: int = 0  # what was called off before has no bearing on it
    question: Key | None = None  # others find it by the likeness of theirs
    job: Job | None = None
    riders: dict[int, bool] = field(default_factory=dict)  # rid -> its client still listens; the leader comes first
    started: bool = False  # the first token is out

    def cut_short(self, asked: Arrive, ended: Ended) -> bool:
        """Whether a cap of now has ended an answer that ``asked`` wanted longer: it is nobody's answer later on."""
        return ended.reason == "length" and self.ask.max_tokens < asked.max_tokens

    def ticket(self, start_by_ns: int) -> Submit:
        """What the replica is told: the leader's request."""
        ask = self.ask
        return Submit(
            sid=self.sid, rid=ask.rid, tenant=ask.tenant, traffic_class=self.traffic_class, priority=self.priority,
            sent_ns=self.sent_ns, start_by_ns=start_by_ns, prompt_tokens=ask.prompt_tokens, max_tokens=ask.max_tokens,
            blocks=ask.blocks, pinned_blocks=ask.pinned_blocks, replica=self.replica,
        )


class FlightStats(Struct):
    """Flights and riders now; attachments since the start."""

    flights: int
    riders: int
    attached: int


class Flights:
    """All open submissions of one gateway."""

    def __init__(self, first_sid: int) -> None:
        self._next_sid = first_sid
        self._open: dict[int, Flight] = {}
        self._by_key: dict[bytes, Flight] = {}
        self._by_question: dict[Key, Flight] = {}
        self._attached = 0

    def lead(
        self, ask: Arrive, key: bytes, priority: int, now_ns: int, seat: Seat, since: int = 0,
        tags: tuple[str, ...] = (), question: Key | None = None, job: Job | None = None,
    ) -> Flight:
        """A new submission. Others can find it when it has a key, or a question."""
        riders = {} if job else {ask.rid: True}
        flight = Flight(
            self._next_sid, seat.replica, seat, key, priority, BACKGROUND if job else ask.traffic_class, now_ns, ask,
            tags, since, question, job, riders,
        )
        self._next_sid += 1
        self._open[flight.sid] = flight
        if key:
            self._by_key[key] = flight
        if question:
            self._by_question[question] = flight
        return flight

    def awaited(self, question: Key) -> bool:
        """Does a flight compute the answer to this question?"""
        return question in self._by_question

    def asks(self, question: Key, priority: int) -> Flight | None:
        """A flight that computes the answer to this question, and may be joined."""
        flight = self._by_question.get(question)
        return flight if flight is not None and flight.priority <= priority else None

    def find(self, key: bytes, priority: int) -> Flight | None:
        """A flight that may be joined."""
        flight = self._by_key.get(key) if key else None
        return flight if flight is not None and flight.priority <= priority else None

    def join(self, flight: Flight, rid: int) -> None:
        """One more rider."""
        flight.riders[rid] = True
        self._attached += 1

    def leave(self, flight: Flight, rid: int) -> bool:
        """This rider's client is gone. True when nobody listens any more: the computation may stop."""
        flight.riders[rid] = False
        deserted = flight.job is None and not any(flight.riders.values())
        if deserted:
            self.hide(flight)  # nobody may join what is about to be aborted
        return deserted

    def give_up(self, flight: Flight) -> bool:
        """The job has waited long enough. True when nobody else listens: the computation may stop."""
        flight.job = None
        deserted = not any(flight.riders.values())
        if deserted:
            self.hide(flight)
        return deserted

    def get(self, sid: int) -> Flight | None:
        """The open submission ``sid``."""
        return self._open.get(sid)

    def seated(self) -> list[Flight]:
        """Open submissions that still hold their seat."""
        return [flight for flight in self._open.values() if flight.seat is not None]

    def close(self, sid: int) -> Flight | None:
        """It has ended."""
        flight = self._open.pop(sid, None)
        if flight is not None:
            self.hide(flight)
        return flight

    def open(self) -> list[Flight]:
        """All, oldest first."""
        return list(self._open.values())

    def hide(self, flight: Flight) -> None:
        """Nobody new is to find it."""
        if self._by_key.get(flight.key) is flight:
            del self._by_key[flight.key]
        if flight.question is not None and self._by_question.get(flight.question) is flight:
            del self._by_question[flight.question]

    def stats(self) -> FlightStats:
        """A snapshot."""
        return FlightStats(len(self._open), sum(len(f.riders) for f in self._open.values()), self._attached)

    def check(self) -> None:
        """Invariants."""
        for key, flight in self._by_key.items():
            assert flight.key == key and self._open.get(flight.sid) is flight, "index: only open flights are found"
            assert flight.job or any(flight.riders.values()), "index: only flights that somebody listens to are found"
        for question, flight in self._by_question.items():
            assert flight.question == question and self._open.get(flight.sid) is flight, "index: open flights only"
        for flight in self._open.values():
            heard = flight.job or any(flight.riders.values())
            assert heard or flight.seat is None, "seats: only of flights that somebody waits for"

"""One request's way from identity to answer, as a pure machine.

``_journey`` is the product: it reads top to bottom like the diagram in the README. It yields an action when it has to
wait for an event, and puts all others into the machine's outbox. Cancel and deadline are thrown into it. Every Arrive
gets exactly one Answer or Reject unless its client leaves first, and always one Record. Knows no text, no sockets, no
clock; what it decides is the same live and in the twin.
"""

from __future__ import annotations

from engine.config import ClassConfig, GatewayConfig
from engine.events import (
    SID_BITS,
    Abort,
    Arrive,
    Attach,
    Cancel,
    Charge,
    Drain,
    DropVector,
    Ended,
    FirstToken,
    GatewayAction,
    GatewayEvent,
    Invalidate,
    KvEvents,
    LevelRecord,
    Placed,
    Pressure,
    Record,
    Remember,
    ReplicaBack,
    ReplicaLost,
    Similar,
    StoreVector,
    Submit,
    Tier,
    Wake,
)
from engine.policy import account
from engine.policy.answers import Answers
from engine.policy.background import Background
from engine.policy.boundaries import Boundaries
from engine.policy.fleet import ELSEWHERE, GOOD, HOPELESS, Fleet
from engine.policy.flights import Flight, Flights, Seat
from engine.policy.limiter import Limiter
from engine.policy.overload import Overload
from engine.policy.patience import Patience
from engine.policy.replies import Replies, code_of
from engine.policy.similar import SimilarTier
from engine.policy.tags import meant
from engine.policy.trip import GatewayStats, Gone, Journey, Late, Reply, Ride, Trip, Wait
from engine.units import S_NS, ms_to_ns


class Gateway:
    """A ``Machine`` over ``GatewayEvent`` and ``GatewayAction``."""

    def __init__(self, config: GatewayConfig) -> None:
        self.config = config
        self.limiter = Limiter(config.limiter, config.tenants, config.classes)
        self.flights = Flights(config.index << SID_BITS)
        self.answers = Answers(config, self.flights.awaited)
        self.fleet = Fleet(config)
        self.overload = Overload(config.overload, config.classes, config.retry)
        self._now_ns = 0
        self._outbox: list[GatewayAction] = []
        self._replies = Replies(config, self._outbox)
        self.background = Background(config, self.flights, self.fleet, self.answers, self.overload, self._outbox)
        self.similar = SimilarTier(
            config, lambda: self._now_ns, self.answers, self.flights, self.overload, self._replies, self.background
        )
        self._boundaries = Boundaries(self.similar.encoder, self.fleet.breakers)
        self._journeys: dict[int, Journey] = {}
        self._trips: dict[int, Trip] = {}
        self.patience = Patience()
        self._draining = False
        self._arrived = self._ended = 0

    def handle(self, now_ns: int, event: GatewayEvent) -> list[GatewayAction]:
        """One event in, what follows from it out."""
        self._now_ns = now_ns
        match event:
            case Arrive():
                self._observe()
                self._arrive(event)
            case Similar(rid=rid):
                self._resume(rid, event)
            case Placed():
                self.background.placed(now_ns, event)
            case Invalidate():
                self._invalidate(event)
            case Charge():
                self._outbox.append(account.charge(self.limiter, now_ns, event, self._replies.later))
            case Remember():
                self._outbox.extend(self.answers.remember(now_ns, event))
            case FirstToken():
                self._first_token(event)
            case Ended():
                self._flight_ended(event)
            case Pressure():
                self.fleet.hear(event)
                self._observe()
            case KvEvents():
                self.fleet.hear_kv(event)
            case ReplicaLost(replica=replica, for_good=for_good):
                self.fleet.lose(replica, for_good)
                self._observe()
            case ReplicaBack(replica=replica):
                self.fleet.back(replica)
                for rid in self.patience.rescue():
                    self._resume(rid, event)
            case Cancel(rid=rid):
                self._resume(rid, Gone())
            case Wake():
                self._expire()
                self._observe()
            case Drain():
                self._draining = True
                self.background.stop(now_ns)
        self.background.turn(now_ns)
        self._outbox.extend(self._boundaries.moved())
        out = list(self._outbox)
        self._outbox.clear()
        return out

    def next_wake_ns(self) -> int | None:
        """The nearest deadline, of a request or a job, or the end of the overload window."""
        moments = (self.patience.next_ns(), self.overload.next_wake_ns(), self.background.next_ns())
        named = [ns for ns in moments if ns is not None]
        return min(named) if named else None

    # ------------------------------------------------------------ the way of one request

    def _journey(self, trip: Trip) -> Journey:
        ask, cls = trip.ask, trip.cls
        verdict = account.reserve(self.limiter, self._now_ns, trip)
        if not verdict.ok:
            return self._reject(trip, account.code_of(verdict), verdict.retry_after_ns)
        if self._draining:
            return self._reject(trip, "draining", S_NS)
        asked = rode = False
        while True:
            if entry := self.answers.same(self._now_ns, trip.key, self._makes_do(cls)):
                if self._replies.same(self._now_ns, trip, entry):
                    self.background.refresh(self._now_ns, trip)
                return None
            if flight := self._twin_of(trip):
                ended = yield from self._follow(trip, flight)
                if trip.over or ended.reason in HOPELESS or self._is_lost(trip, ended):
                    return self._finish(trip, ended, "coalesced")
                continue  # the leader was stopped for reasons of its own: take its place
            if not asked and self.similar.may_help(trip):
                asked = True
                trip.similar = yield from self.similar.look(trip)
                continue  # meanwhile the same question may have been answered, or somebody took off with it
            if self.similar.answers(trip, self._makes_do(cls)):
                return None
            if flight := trip.ride:
                ended = yield from self._follow(trip, flight)
                if trip.over or ended.reason in GOOD or trip.first_ns is not None or self._is_lost(trip, ended):
                    return self._finish(trip, ended, "coalesced")
                trip.ride = trip.cosine_millionths = None
                rode = ended.reason in ELSEWHERE  # its leader is computed anew: look for that, once a replica is there
                asked = not rode or self.fleet.away
                continue  # another question's failure is not this one's
            if self.overload.sheds(ask, cls.priority, self._now_ns, drawn=trip.drawn):
                return self._last_resort(trip, "overloaded", self.overload.calm_ns())
            trip.drawn = True
            if late_ns := self.fleet.late_ns(self._now_ns, ask, cls):
                return self._last_resort(trip, "overloaded", max(S_NS, late_ns))
            seat = self.fleet.take(self._now_ns, ask, trip.replica if trip.retried else None)
            if seat is None:
                if (yield from self._outlast(trip)):
                    asked = asked and not rode
                    continue
                return self._last_resort(trip, *self.fleet.refusal(self._now_ns))
            ended = yield from self._lead(trip, seat)
            if trip.over or ended.reason not in ELSEWHERE or self._is_lost(trip, ended):
                return self._finish(trip, ended, "model")

    def _is_lost(self, trip: Trip, ended: Ended) -> bool:
        """A replica died. Who has heard nothing yet is computed elsewhere, once: a request may be what killed it."""
        if ended.reason not in ELSEWHERE:
            return self._draining and ended.reason == "draining"  # cut short: nobody takes a leader's place any more
        if trip.retried or trip.first_ns is not None:
            return True
        trip.retried = True
        return False

    def _outlast(self, trip: Trip) -> Wait:
        """All replicas are away. Who was in flight when the last one died waits, while a start still makes sense.

        So no more can wait than were in flight; newcomers are told at once. True: one is back.
        """
        until_ns = trip.ask.arrived_ns + trip.cls.start_within_ns
        if not self.fleet.away or not trip.retried or trip.cls.fallback or until_ns <= self._now_ns:
            return False
        self.patience.strand(trip.ask.rid, until_ns)
        event = yield None
        return isinstance(event, ReplicaBack)

    def _makes_do(self, cls: ClassConfig) -> bool:
        """From level 1 on a sheddable class takes older and less similar answers rather than the model's time."""
        return cls.criticality == "sheddable" and self.overload.level >= 1

    def _twin_of(self, trip: Trip) -> Flight | None:
        """A flight that computes the very same."""
        flight = self.flights.find(trip.key, trip.cls.priority) if self.config.exact.single_flight else None
        return flight if flight is not None and trip.suits(flight) else None

    def _lead(self, trip: Trip, seat: Seat) -> Ride:
        """Compute it. Others may ride along; a client that leaves does not strand them."""
        ask, cls = trip.to_compute(), trip.cls
        question = (ask.hard_key, ask.text_key) if self.config.semantic.coalesce and trip.has_vector else None
        flight = self.flights.lead(
            ask, trip.key, cls.priority, self._now_ns, seat, self.answers.invalidations.number,
            self.answers.tags_of(ask), question,
        )
        if question and not self.answers.semantic.holds(*question):
            self._outbox.append(StoreVector(*question))
        trip.leads, trip.replica = True, seat.replica
        self.overload.admission.sent(cls.priority)
        if (predicted_ns := self.fleet.sent(flight, ask)) is not None:
            trip.predicted_ns = self._now_ns + predicted_ns
        ended = yield from self._ride(trip, flight, flight.ticket(ask.arrived_ns + cls.start_within_ns))
        if ended.computed_tokens:
            trip.used_tokens = ask.prompt_tokens + ended.output_tokens
        if ended.reason in GOOD and trip.key and ended.answer_id and not flight.cut_short(trip.ask, ended):
            self._outbox.extend(self.answers.keep(self._now_ns, flight, trip.has_vector, ended))
            for with_ in trip.compare:
                self.answers.compare(flight, with_, ended)
            self.background.settle(self._now_ns)
        return ended

    def _follow(self, trip: Trip, flight: Flight) -> Ride:
        """Ride on somebody else's computation."""
        self.flights.join(flight, trip.ask.rid)
        trip.leads = False  # it may have led one that a replica's death ended
        if flight.started:
            trip.first_ns = self._now_ns
        return (yield from self._ride(trip, flight, Attach(trip.ask.rid, flight.sid)))

    def _ride(self, trip: Trip, flight: Flight, ticket: Submit | Attach) -> Ride:
        """Wait for the flight's end. A rider that cannot wait any longer gets off; the last one stops the flight."""
        step: Submit | Attach | None = ticket
        while True:
            try:
                event = yield step
            except (Gone, Late) as why:
                self._get_off(trip, flight, late=isinstance(why, Late))
                step = None
                continue
            if isinstance(event, Ended):
                return event
            if isinstance(event, FirstToken) and trip.first_ns is None and not trip.over:
                trip.first_ns = self._now_ns
            step = None

    def _get_off(self, trip: Trip, flight: Flight, late: bool) -> None:
        if trip.over:
            return
        if late:
            self._replies.reject(self._now_ns, trip, "deadline_exceeded", None)
        else:
            trip.close(self._now_ns, "cancelled")
        if self.flights.leave(flight, trip.ask.rid):
            self.fleet.deserted(self._now_ns, flight, late)
            self._outbox.append(Abort(flight.sid))

    def _finish(self, trip: Trip, ended: Ended, tier: Tier) -> None:
        """What the end of a flight means for one of its riders."""
        trip.saw(ended)
        if trip.over:
            return
        if ended.reason in GOOD:
            self._replies.computed(self._now_ns, trip, tier, ended.answer_id)
            if trip.ride is not None:
                self.similar.rode(trip, trip.ride, ended)
        elif ended.reason == "draining":
            self._reject(trip, "draining", S_NS)
        else:
            self._last_resort(trip, *code_of(ended.reason))

    def _last_resort(self, trip: Trip, code: str, retry_after_ns: int | None) -> None:
        self._replies.last_resort(self._now_ns, trip, code, retry_after_ns)

    def _reject(self, trip: Trip, code: str, retry_after_ns: int | None) -> None:
        self._replies.reject(self._now_ns, trip, code, retry_after_ns)

    # ------------------------------------------------------------ running journeys

    def _arrive(self, ask: Arrive) -> None:
        assert ask.rid not in self._trips, "arrive: the driver never repeats a rid"
        cls = self.config.classes[ask.traffic_class]
        key = ask.exact_key if cls.caches != "none" else b""
        trip = Trip(ask, cls, key, level=self.overload.level, reserved_tokens=ask.prompt_tokens + ask.max_tokens)
        self._arrived += 1
        self.overload.arrived(ask)
        self._trips[ask.rid] = trip
        self._journeys[ask.rid] = self._journey(trip)
        self.patience.begin(ask.rid, ask.arrived_ns + ms_to_ns(cls.timeout_ms))
        self._advance(ask.rid, None)

    def _resume(self, rid: int, value: Reply | Gone | Late) -> None:
        if rid in self._journeys:
            self._advance(rid, value)

    def _advance(self, rid: int, value: Reply | Gone | Late | None) -> None:
        """Drive a journey to its next wait, or to its end."""
        journey, trip = self._journeys[rid], self._trips[rid]
        try:
            if value is None:
                action = next(journey)
            elif isinstance(value, Exception):
                action = journey.throw(value)
            else:
                action = journey.send(value)
        except StopIteration:
            self._close(rid, trip)
        except (Gone, Late) as why:  # it was waiting for something that needs no tidying up
            if isinstance(why, Late):
                self._reject(trip, "deadline_exceeded", None)
            else:
                trip.close(self._now_ns, "cancelled")
            self._close(rid, trip)
        else:
            if action is not None:
                self._outbox.append(action)

    def _close(self, rid: int, trip: Trip) -> None:
        del self._journeys[rid], self._trips[rid]
        self.patience.end(rid)
        self._ended += 1
        account.settle(self.limiter, self._now_ns, trip)
        self._outbox.append(Record(trip.record()))

    def _first_token(self, event: FirstToken) -> None:
        if flight := self.flights.get(event.sid):
            self.fleet.started(flight)
            if flight.job is None:
                self.overload.admission.started()
            flight.started = True
            for rid in flight.riders:
                self._resume(rid, event)

    def _flight_ended(self, event: Ended) -> None:
        if flight := self.flights.close(event.sid):
            self.fleet.landed(self._now_ns, flight, event)
            source = flight.ask.request_id if event.reason in GOOD else ""
            if flight.job is not None:
                self.background.ended(self._now_ns, flight, event)
            for rid in flight.riders:
                self._trips[rid].source = source
                self._resume(rid, event)
            if flight.question and not self.answers.found(flight.question):
                self._outbox.append(DropVector(*flight.question))

    def _invalidate(self, what: Invalidate) -> None:
        """These answers serve nobody any more, nor does anybody new wait for those that are on their way."""
        gone = self.answers.invalidate(what)
        if gone is None:
            return
        self._outbox.extend(gone)
        for flight in self.flights.open():
            if not what.answer_id and meant(what, flight.ask.tenant, flight.tags):
                self.flights.hide(flight)

    def _expire(self) -> None:
        while due := self.patience.pop_due(self._now_ns):
            rid, stranded = due
            self._resume(rid, Wake() if stranded else Late())

    def _observe(self) -> None:
        change = self.overload.observe(self._now_ns, self.fleet.pressures.oldest_ns(), self.fleet.predicted_ns())
        if change is not None:
            self._outbox.append(Record(LevelRecord(self._now_ns, change.level, change.traffic_class, change.age_ns)))

    # ------------------------------------------------------------ windows for others

    def stats(self) -> GatewayStats:
        """A snapshot."""
        return GatewayStats(
            arrived=self._arrived, ended=self._ended, in_flight=len(self._trips), level=self.overload.level,
            limiter=self.limiter.stats(), exact=self.answers.exact.stats(), semantic=self.answers.semantic.stats(),
            flights=self.flights.stats(), fleet=self.fleet.stats(), encoder=self.similar.encoder.stats(),
            overload=self.overload.stats(), jobs=self.background.jobs.stats(),
        )

    def check(self) -> None:
        """Invariants."""
        encoder = self.similar.encoder
        for part in (self.limiter, self.answers, self.flights, encoder, self.overload, self.patience, self.background):
            part.check()
        self.fleet.check(self.flights.seated())
        assert self._journeys.keys() == self._trips.keys(), "journeys: every trip has one"
        assert self._arrived == self._ended + len(self._trips), "conservation: arrived = ended + in flight"
        assert not self._outbox, "outbox: empty between events"

"""One request's way from identity to answer, as a pure machine.

``_journey`` is the product: it reads top to bottom like the diagram in the README. It yields an action when it has to
wait for an event, and puts all others into the machine's outbox. Cancel and deadline are thrown into it. Every Arrive
gets exactly one Answer or Reject unless its client leaves first, and always one Record. Knows no text, no sockets, no
clock; what it decides is the same live and in the twin.
"""

from __future__ import annotations

from engine.config import ClassConfig, GatewayConfig, LimiterConfig
from engine.events import (
    Abort,
    Answer,
    Arrive,
    Attach,
    Cancel,
    Drain,
    Ended,
    FindSimilar,
    FirstToken,
    GatewayAction,
    GatewayEvent,
    KvEvents,
    LevelRecord,
    Pressure,
    Record,
    Reject,
    ReplicaBack,
    ReplicaLost,
    Similar,
    Submit,
    Tier,
    Wake,
)
from engine.policy.answers import Answers
from engine.policy.boundaries import Boundaries
from engine.policy.breaker import Breaker, Verdict, spread
from engine.policy.exact import Entry
from engine.policy.fleet import GOOD, Fleet
from engine.policy.flights import Flight, Flights, Seat
from engine.policy.limiter import Limiter
from engine.policy.overload import Overload
from engine.policy.patience import Patience
from engine.policy.semantic import SemanticEntry, SemanticHit
from engine.policy.trip import GatewayStats, Gone, Journey, Late, Look, Reply, Ride, Trip, Wait
from engine.units import S_NS, ms_to_ns, s_to_ns

ENCODER_SAYS: dict[str, Verdict] = {"ok": "ok", "late": "slow", "failed": "fail", "unfit": "ignored"}


class Gateway:
    """A ``Machine`` over ``GatewayEvent`` and ``GatewayAction``."""

    def __init__(self, config: GatewayConfig) -> None:
        self.config = config
        self.limiter = Limiter(config.limiter, config.tenants)
        self.answers = Answers(config)
        self.flights = Flights(config.index << 40)
        self.fleet = Fleet(config)
        self.encoder = Breaker(config.encoder_breaker, spread(config.index, config.encoder_breaker.open_jitter))
        rate = config.overload.fallback_rps
        self.fallbacks = Limiter(LimiterConfig(rate_rps=rate, burst=max(1.0, rate)), {})
        self.overload = Overload(config.overload, config.classes)
        self._boundaries = Boundaries(self.encoder, self.fleet.breakers)
        self._now_ns = 0
        self._outbox: list[GatewayAction] = []
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
        self._outbox.extend(self._boundaries.moved())
        out, self._outbox = self._outbox, []
        return out

    def next_wake_ns(self) -> int | None:
        """The nearest deadline, or the end of the overload window."""
        moments = (self.patience.next_ns(), self.overload.next_wake_ns())
        return min((ns for ns in moments if ns is not None), default=None)

    # ------------------------------------------------------------ the way of one request

    def _journey(self, trip: Trip) -> Journey:
        ask, cls = trip.ask, trip.cls
        verdict = self.limiter.take(self._now_ns, ask.tenant, trip.reserved_tokens)
        if not verdict.ok:
            trip.reserved_tokens = 0
            return self._reject(trip, "rate_limited", verdict.retry_after_ns)
        if self._draining:
            return self._reject(trip, "draining", S_NS)
        similar: Similar | None = None
        asked = False
        while True:
            if entry := self.answers.same(self._now_ns, trip.key, self._makes_do(cls)):
                return self._answer_from(trip, entry)
            if flight := self.flights.find(trip.key, cls.priority):
                ended = yield from self._follow(trip, flight)
                if trip.over or ended.reason in GOOD or ended.reason == "failed" or self._is_lost(trip, ended):
                    return self._finish(trip, ended, "coalesced")
                continue  # the leader was stopped for reasons of its own: take its place
            if not asked and self._may_be_similar(trip):
                asked = True
                similar = yield from self._look(trip)
                continue  # meanwhile the same question may have been answered, or somebody took off with it
            if similar and (hit := self._near(trip, similar)):
                return self._answer_similar(trip, hit)
            if self.overload.sheds(cls.priority):
                return self._fall_back(trip, "overloaded", self.overload.calm_ns(cls.priority))
            if late_ns := self.fleet.late_ns(self._now_ns, ask, cls):
                return self._fall_back(trip, "overloaded", max(S_NS, late_ns))
            seat = self.fleet.take(self._now_ns, ask)
            if seat is None:
                if (yield from self._outlast(trip)):
                    continue
                return self._fall_back(trip, *self.fleet.refusal(self._now_ns))
            ended = yield from self._lead(trip, seat)
            if trip.over or ended.reason != "lost" or self._is_lost(trip, ended):
                return self._finish(trip, ended, "model")

    def _is_lost(self, trip: Trip, ended: Ended) -> bool:
        """A replica died. Who has heard nothing yet is computed elsewhere, once: a request may be what killed it."""
        if ended.reason != "lost":
            return False
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

    def _may_be_similar(self, trip: Trip) -> bool:
        """Classes that allow it, single questions, deterministic answers."""
        return self.config.semantic.enabled and trip.cls.caches == "semantic" and bool(trip.key and trip.ask.text_key)

    def _look(self, trip: Trip) -> Look:
        """Ask encoder and index for the nearest questions, behind a breaker; a miss when they are late or away."""
        ask = trip.ask
        permit = self.encoder.acquire(self._now_ns)
        if permit is None:
            return None
        try:
            similar = yield FindSimilar(ask.rid, ask.hard_key, ask.text_key, self.config.semantic.neighbours)
        except (Gone, Late):
            self.encoder.release(self._now_ns, permit, "cancelled")
            raise
        assert isinstance(similar, Similar), "look: only Similar answers FindSimilar"
        self.encoder.release(self._now_ns, permit, ENCODER_SAYS[similar.status])
        trip.has_vector = similar.status in ("ok", "late")
        return similar

    def _near(self, trip: Trip, similar: Similar) -> SemanticHit | None:
        return self.answers.similar(self._now_ns, trip.ask.hard_key, similar.neighbours, self._makes_do(trip.cls))

    def _lead(self, trip: Trip, seat: Seat) -> Ride:
        """Compute it. Others may ride along; a client that leaves does not strand them."""
        ask, cls = trip.ask, trip.cls
        flight = self.flights.lead(ask.rid, trip.key, cls.priority, ask.traffic_class, self._now_ns, seat)
        trip.leads, trip.replica = True, seat.replica
        if (predicted_ns := self.fleet.sent(flight, ask)) is not None:
            trip.predicted_ns = self._now_ns + predicted_ns
        ended = yield from self._ride(trip, flight, flight.ticket(ask, ask.arrived_ns + cls.start_within_ns))
        if ended.computed_tokens:
            trip.used_tokens = ask.prompt_tokens + ended.output_tokens
        if ended.reason in GOOD and trip.key and ended.answer_id:
            self._outbox.extend(self.answers.keep(self._now_ns, trip, ended))
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
            self._reject(trip, "deadline_exceeded", None)
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
            trip.tier = tier
            trip.close(self._now_ns, "served")
            source = "" if trip.leads else trip.source
            self._outbox.append(Answer(trip.ask.rid, tier, ended.answer_id, trip.level, source=source))
        elif ended.reason == "draining":
            self._reject(trip, "draining", S_NS)
        elif ended.reason == "lost":
            self._fall_back(trip, "replica_lost", S_NS)
        else:
            code = "model_failed" if ended.reason == "failed" else "deadline_exceeded"
            self._fall_back(trip, code, None)

    # ------------------------------------------------------------ the ends of a journey

    def _answer_from(self, trip: Trip, entry: Entry) -> None:
        fresh = self._now_ns - entry.stored_ns <= s_to_ns(self.config.exact.ttl_s)
        self._serve(trip, "exact" if fresh else "approximate", entry)

    def _answer_similar(self, trip: Trip, hit: SemanticHit) -> None:
        trip.cosine_millionths = hit.cosine_millionths
        self._serve(trip, "approximate" if hit.approximate else "semantic", hit.entry)

    def _serve(self, trip: Trip, tier: Tier, entry: Entry | SemanticEntry) -> None:
        """An answer that another request has had."""
        trip.tier, trip.source, trip.first_ns = tier, entry.source, self._now_ns
        trip.output_tokens, trip.answer_id = entry.output_tokens, entry.answer_id
        trip.close(self._now_ns, "served")
        age_ns = self._now_ns - entry.stored_ns
        cosine = trip.cosine_millionths
        self._outbox.append(Answer(trip.ask.rid, tier, entry.answer_id, trip.level, age_ns, entry.source, cosine))

    def _fall_back(self, trip: Trip, code: str, retry_after_ns: int | None) -> None:
        """The class's answer of last resort, where it has one and nothing was said yet; else the code."""
        may = trip.cls.fallback and trip.first_ns is None
        if not may or not self.fallbacks.take(self._now_ns, "fallback", 0).ok:
            return self._reject(trip, code, retry_after_ns)
        trip.tier, trip.first_ns, trip.answer_id = "fallback", self._now_ns, fallback_id(trip.ask.traffic_class)
        trip.error_code = code  # why it came to this
        trip.close(self._now_ns, "served")
        self._outbox.append(Answer(trip.ask.rid, "fallback", trip.answer_id, trip.level))
        return None

    def _reject(self, trip: Trip, code: str, retry_after_ns: int | None) -> None:
        trip.error_code = code
        trip.close(self._now_ns, "failed" if code in ("model_failed", "replica_lost") else "rejected")
        self._outbox.append(Reject(trip.ask.rid, code, trip.level, retry_after_ns))

    # ------------------------------------------------------------ running journeys

    def _arrive(self, ask: Arrive) -> None:
        assert ask.rid not in self._trips, "arrive: the driver never repeats a rid"
        cls = self.config.classes[ask.traffic_class]
        key = ask.exact_key if cls.caches != "none" else b""
        trip = Trip(ask, cls, key, level=self.overload.level, reserved_tokens=ask.prompt_tokens + ask.max_tokens)
        self._arrived += 1
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
        self.limiter.settle(self._now_ns, trip.ask.tenant, trip.reserved_tokens, trip.used_tokens)
        self._outbox.append(Record(trip.record()))

    def _first_token(self, event: FirstToken) -> None:
        if flight := self.flights.get(event.sid):
            self.fleet.started(flight)
            flight.started = True
            for rid in flight.riders:
                self._resume(rid, event)

    def _flight_ended(self, event: Ended) -> None:
        if flight := self.flights.close(event.sid):
            self.fleet.landed(self._now_ns, flight, event)
            source = self._trips[next(iter(flight.riders))].ask.request_id if event.reason in GOOD else ""
            for rid in flight.riders:
                self._trips[rid].source = source
                self._resume(rid, event)

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
            flights=self.flights.stats(), fleet=self.fleet.stats(), encoder=self.encoder.stats(),
            overload=self.overload.stats(),
        )

    def check(self) -> None:
        """Invariants."""
        for part in (self.limiter, self.answers, self.flights, self.encoder, self.overload, self.patience):
            part.check()
        self.fleet.check(self.flights.seated())
        assert self._journeys.keys() == self._trips.keys(), "journeys: every trip has one"
        assert self._arrived == self._ended + len(self._trips), "conservation: arrived = ended + in flight"
        assert not self._outbox, "outbox: empty between events"


def fallback_id(traffic_class: str) -> str:
    """The answer id under which a driver keeps a class's fallback text."""
    return f"fallback:{traffic_class}"

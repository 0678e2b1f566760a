"""One request's way from identity to answer, as a pure machine.

``_journey`` is the product: it reads top to bottom like the diagram in the README. It yields an action when it has to
wait for an event, and puts all others into the machine's outbox. Cancel and deadline are thrown into it. Every Arrive
gets exactly one Answer or Reject unless its client leaves first, and always one Record. Knows no text, no sockets, no
clock; what it decides is the same live and in the twin.
"""

from __future__ import annotations

from collections.abc import Generator
from heapq import heappop, heappush

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
    LevelRecord,
    Pressure,
    Record,
    Reject,
    Similar,
    Submit,
    Tier,
    Wake,
)
from engine.policy.answers import Answers
from engine.policy.breaker import Breaker, Verdict
from engine.policy.exact import Entry
from engine.policy.flights import Flight, Flights
from engine.policy.limiter import Limiter
from engine.policy.overload import LevelChange, Overload
from engine.policy.pressure import Pressures
from engine.policy.semantic import SemanticHit
from engine.policy.trip import GatewayStats, Trip
from engine.units import S_NS, ms_to_ns, s_to_ns

Reply = Similar | FirstToken | Ended
Journey = Generator[FindSimilar | Submit | Attach | None, Reply, None]
Look = Generator[FindSimilar, Reply, Similar | None]
ENCODER_SAYS: dict[str, Verdict] = {"ok": "ok", "late": "slow", "failed": "fail", "unfit": "ignored"}
Ride = Generator[Submit | Attach | None, Reply, Ended]


class _Gone(Exception):
    """Thrown into a journey: the client has left."""


class _Late(Exception):
    """Thrown into a journey: its time is up."""


class Gateway:
    """A ``Machine`` over ``GatewayEvent`` and ``GatewayAction``."""

    def __init__(self, config: GatewayConfig) -> None:
        self.config = config
        self.limiter = Limiter(config.limiter, config.tenants)
        self.answers = Answers(config)
        self.flights = Flights(config.index << 40)
        self.breaker = Breaker(config.breaker)
        self.encoder = Breaker(config.encoder_breaker)
        rate = config.overload.fallback_rps
        self.fallbacks = Limiter(LimiterConfig(rate_rps=rate, burst=max(1.0, rate)), {})
        self.overload = Overload(config.overload, config.classes)
        self.pressures = Pressures()
        self._now_ns = 0
        self._outbox: list[GatewayAction] = []
        self._journeys: dict[int, Journey] = {}
        self._trips: dict[int, Trip] = {}
        self._deadlines: list[tuple[int, int]] = []
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
                self.pressures.hear(event)
                self._observe()
            case Cancel(rid=rid):
                self._throw(rid, _Gone())
            case Wake():
                self._expire()
                self._observe()
            case Drain():
                self._draining = True
        out, self._outbox = self._outbox, []
        return out

    def next_wake_ns(self) -> int | None:
        """The nearest deadline, or the end of the overload window."""
        while self._deadlines and self._deadlines[0][1] not in self._trips:
            heappop(self._deadlines)
        level = self.overload.next_wake_ns()
        if not self._deadlines:
            return level
        return self._deadlines[0][0] if level is None else min(level, self._deadlines[0][0])

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
                if ended.reason in ("stop", "length", "failed") or trip.over:
                    return self._finish(trip, ended, "coalesced")
                continue  # the leader was stopped for reasons of its own: take its place
            if not asked and self._may_be_similar(trip):
                asked = True
                similar = yield from self._look(trip)
                continue  # meanwhile the same question may have been answered, or somebody took off with it
            if similar and (hit := self._near(trip, similar)):
                return self._answer_similar(trip, hit)
            if self._is_shed(cls):
                return self._fall_back(trip, "overloaded", self._calm_ns(cls))
            permit = self.breaker.acquire(self._now_ns)
            if permit is None:
                return self._fall_back(trip, "breaker_open", self.breaker.retry_after_ns(self._now_ns))
            ended = yield from self._lead(trip, permit)
            return self._finish(trip, ended, "model")

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
        except (_Gone, _Late):
            self.encoder.release(self._now_ns, permit, "cancelled")
            raise
        assert isinstance(similar, Similar), "look: only Similar answers FindSimilar"
        self.encoder.release(self._now_ns, permit, ENCODER_SAYS[similar.status])
        trip.has_vector = similar.status == "ok"
        return similar

    def _near(self, trip: Trip, similar: Similar) -> SemanticHit | None:
        return self.answers.similar(self._now_ns, trip.ask.hard_key, similar.neighbours, self._makes_do(trip.cls))

    def _is_shed(self, cls: ClassConfig) -> bool:
        """Level 2 keeps sheddable work from the model, level 3 standard work too; critical work never."""
        return cls.priority > 0 and self.overload.level >= 4 - cls.priority

    def _calm_ns(self, cls: ClassConfig) -> int:
        """Earliest moment at which the level can have fallen far enough for the class: an honest Retry-After."""
        down = self.overload.level - (4 - cls.priority) + 1
        return max(S_NS, down * self.config.overload.quiet_windows * self.config.overload.window_ns)

    def _lead(self, trip: Trip, permit: int) -> Ride:
        """Compute it. Others may ride along; a client that leaves does not strand them."""
        ask, cls = trip.ask, trip.cls
        flight = self.flights.lead(ask.rid, trip.key, cls.priority, ask.traffic_class, self._now_ns)
        trip.leads, trip.replica = True, 0
        self.pressures.sent(flight)
        ended = yield from self._ride(
            trip, flight,
            Submit(
                sid=flight.sid, rid=ask.rid, tenant=ask.tenant, traffic_class=ask.traffic_class, priority=cls.priority,
                sent_ns=self._now_ns, start_by_ns=ask.arrived_ns + cls.start_within_ns,
                prompt_tokens=ask.prompt_tokens, max_tokens=ask.max_tokens, blocks=ask.blocks,
                pinned_blocks=ask.pinned_blocks, replica=0,
            ),
        )
        good = ended.reason in ("stop", "length")
        said: Verdict = "ok" if good else "fail" if ended.reason == "failed" else "cancelled"
        self.breaker.release(self._now_ns, permit, said)
        if ended.computed_tokens:
            trip.used_tokens = ask.prompt_tokens + ended.output_tokens
        if good and trip.key and ended.answer_id:
            self._outbox.extend(self.answers.keep(self._now_ns, trip, ended))
        return ended

    def _follow(self, trip: Trip, flight: Flight) -> Ride:
        """Ride on somebody else's computation."""
        self.flights.join(flight, trip.ask.rid)
        if flight.started:
            trip.first_ns = self._now_ns
        return (yield from self._ride(trip, flight, Attach(trip.ask.rid, flight.sid)))

    def _ride(self, trip: Trip, flight: Flight, ticket: Submit | Attach) -> Ride:
        """Wait for the flight's end. A rider that cannot wait any longer gets off; the last one stops the flight."""
        step: Submit | Attach | None = ticket
        while True:
            try:
                event = yield step
            except (_Gone, _Late) as why:
                self._get_off(trip, flight, late=isinstance(why, _Late))
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
            self._outbox.append(Abort(flight.sid))

    def _finish(self, trip: Trip, ended: Ended, tier: Tier) -> None:
        """What the end of a flight means for one of its riders."""
        trip.saw(ended)
        if trip.over:
            return
        if ended.reason in ("stop", "length"):
            trip.tier = tier
            trip.close(self._now_ns, "served")
            source = "" if trip.leads else trip.source
            self._outbox.append(Answer(trip.ask.rid, tier, ended.answer_id, trip.level, source=source))
        elif ended.reason == "draining":
            self._reject(trip, "draining", S_NS)
        else:
            code = "model_failed" if ended.reason == "failed" else "deadline_exceeded"
            self._fall_back(trip, code, None)

    # ------------------------------------------------------------ the ends of a journey

    def _answer_from(self, trip: Trip, entry: Entry) -> None:
        age_ns = self._now_ns - entry.stored_ns
        fresh = age_ns <= s_to_ns(self.config.exact.ttl_s)
        trip.tier = "exact" if fresh else "approximate"
        trip.output_tokens, trip.answer_id, trip.first_ns = entry.output_tokens, entry.answer_id, self._now_ns
        trip.source = entry.source
        trip.close(self._now_ns, "served")
        self._outbox.append(Answer(trip.ask.rid, trip.tier, entry.answer_id, trip.level, age_ns, entry.source))

    def _answer_similar(self, trip: Trip, hit: SemanticHit) -> None:
        entry = hit.entry
        trip.tier = "approximate" if hit.approximate else "semantic"
        trip.output_tokens, trip.answer_id, trip.first_ns = entry.output_tokens, entry.answer_id, self._now_ns
        trip.source, trip.cosine_millionths = entry.source, hit.cosine_millionths
        trip.close(self._now_ns, "served")
        age_ns = self._now_ns - entry.stored_ns
        self._outbox.append(
            Answer(
                trip.ask.rid, trip.tier, entry.answer_id, trip.level, age_ns, entry.source, hit.cosine_millionths
            )
        )

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
        trip.close(self._now_ns, "failed" if code == "model_failed" else "rejected")
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
        heappush(self._deadlines, (ask.arrived_ns + ms_to_ns(cls.timeout_ms), ask.rid))
        self._advance(ask.rid, None)

    def _resume(self, rid: int, reply: Reply) -> None:
        if rid in self._journeys:
            self._advance(rid, reply)

    def _throw(self, rid: int, why: _Gone | _Late) -> None:
        if rid in self._journeys:
            self._advance(rid, why)

    def _advance(self, rid: int, value: Reply | _Gone | _Late | None) -> None:
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
        except (_Gone, _Late) as why:  # it was waiting for something that needs no tidying up
            if isinstance(why, _Late):
                self._reject(trip, "deadline_exceeded", None)
            else:
                trip.close(self._now_ns, "cancelled")
            self._close(rid, trip)
        else:
            if action is not None:
                self._outbox.append(action)

    def _close(self, rid: int, trip: Trip) -> None:
        del self._journeys[rid], self._trips[rid]
        self._ended += 1
        self.limiter.settle(self._now_ns, trip.ask.tenant, trip.reserved_tokens, trip.used_tokens)
        self._outbox.append(Record(trip.record()))

    def _first_token(self, event: FirstToken) -> None:
        if flight := self.flights.get(event.sid):
            self.pressures.forget(event.sid)
            flight.started = True
            for rid in flight.riders:
                self._resume(rid, event)

    def _flight_ended(self, event: Ended) -> None:
        if flight := self.flights.close(event.sid):
            self.pressures.forget(event.sid)
            good = event.reason in ("stop", "length")
            source = self._trips[next(iter(flight.riders))].ask.request_id if good else ""
            for rid in flight.riders:
                self._trips[rid].source = source
                self._resume(rid, event)

    def _expire(self) -> None:
        while self._deadlines and self._deadlines[0][0] <= self._now_ns:
            self._throw(heappop(self._deadlines)[1], _Late())

    def _observe(self) -> None:
        change: LevelChange | None = self.overload.observe(self._now_ns, self.pressures.oldest_ns())
        if change is not None:
            self._outbox.append(Record(LevelRecord(self._now_ns, change.level, change.traffic_class, change.age_ns)))

    # ------------------------------------------------------------ windows for others

    def stats(self) -> GatewayStats:
        """A snapshot."""
        return GatewayStats(
            arrived=self._arrived, ended=self._ended, in_flight=len(self._trips), level=self.overload.level,
            limiter=self.limiter.stats(), exact=self.answers.exact.stats(), semantic=self.answers.semantic.stats(),
            flights=self.flights.stats(), breaker=self.breaker.stats(), encoder=self.encoder.stats(),
            overload=self.overload.stats(),
        )

    def check(self) -> None:
        """Invariants."""
        for part in (self.limiter, self.answers, self.flights, self.breaker, self.encoder, self.overload):
            part.check()
        assert self._journeys.keys() == self._trips.keys(), "journeys: every trip has one"
        assert self._arrived == self._ended + len(self._trips), "conservation: arrived = ended + in flight"
        assert self.breaker.stats().open_permits == self.flights.stats().flights, "permits: one for each open flight"
        assert not self._outbox, "outbox: empty between events"


def fallback_id(traffic_class: str) -> str:
    """The answer id under which a driver keeps a class's fallback text."""
    return f"fallback:{traffic_class}"

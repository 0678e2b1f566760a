"""The gateway machine against a plain specification: dicts, no generators, one short method an event.

Every action of every event is predicted and compared; only when a dropped answer is named is left to the machine and
judged apart. On top stand promises that do not lean on the specification: one Answer or Reject for each Arrive whose
client stays, one Record for each Arrive, nothing left over, every token settled.

Mutations it caught:
- flights: ride on lower criticality; a leader who leaves takes all along; the deserted are still joined; never closed
- hand-over: none; of failures too; to those who are gone; the encoder asked again
- answers: failures cached; cached although the class says none; the wrong source; not looked for after the encoder
- stale: for all classes; at level 0; never; called exact
- similar: approximate for all; stored although late; asked for exact classes; a look's permit kept; encoder not judged
- texts: not stored; not dropped; dropped while the other cache needs them; the vector of a live question dropped
- shed: standard early; critical; nobody; no Retry-After, or too short. Fallback: after the first token; without a limit
- breaker: not asked; asked before the caches; no fallback; aborts count as failures; failures do not; a permit kept
- limiter: never settled; twice; nothing used; followers pay; those that never ran pay; a refused one gets a refund
- timeouts: not woken for; a nanosecond late; cancelled instead of 504; no Abort; got off twice
- records: none for the cancelled; two answers; level at the end; ttft of a cache answer; computed tokens of a follower
- pressure: submissions, first tokens or ends not noted; arrivals or wakes not observed
- lost: nobody waits for the only replica, for ever, or twice; newcomers wait too; a death opens the breaker
- drain ignored, or not followed by a Retry-After; riders in the order of a string hash
"""

from __future__ import annotations

import copy
import random
import sys
from dataclasses import dataclass, field

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from msgspec.structs import replace

from engine.config import (
    BreakerConfig,
    ClassConfig,
    ExactConfig,
    GatewayConfig,
    LimiterConfig,
    OverloadConfig,
    SemanticConfig,
    TenantConfig,
)
from engine.events import (
    Abort,
    Answer,
    Arrive,
    Attach,
    BreakerRecord,
    Cancel,
    Drain,
    DropAnswer,
    DropVector,
    Ended,
    EndReason,
    FindSimilar,
    FirstToken,
    GatewayAction,
    GatewayEvent,
    LevelRecord,
    Neighbour,
    Pressure,
    Record,
    Reject,
    ReplicaBack,
    ReplicaLost,
    RequestRecord,
    Similar,
    StoreAnswer,
    StoreVector,
    Submit,
    Waiting,
    Wake,
)
from engine.policy.breaker import Breaker, spread
from engine.policy.gateway import Gateway
from engine.policy.overload import Overload
from engine.policy.replies import fallback_id
from engine.policy.router import Router
from engine.units import MS_NS, S_NS
from tests.policy.worlds import digest_of, replayed_elsewhere

CLASSES = {
    "fraud": ClassConfig(criticality="critical", caches="none", slo_ttft_ms=500, timeout_ms=2_000),
    "vip": ClassConfig(criticality="critical", caches="semantic", slo_ttft_ms=500, timeout_ms=3_000),
    "chat": ClassConfig(criticality="standard", caches="semantic", slo_ttft_ms=1_000, timeout_ms=4_000),
    "help": ClassConfig(
        criticality="standard", caches="semantic", slo_ttft_ms=1_000, timeout_ms=4_000, fallback="help.txt"
    ),
    "reco": ClassConfig(
        criticality="sheddable", caches="semantic", slo_ttft_ms=1_000, timeout_ms=4_000, fallback="reco.txt"
    ),
    "tips": ClassConfig(criticality="sheddable", caches="semantic", slo_ttft_ms=1_000, timeout_ms=3_000),
    "news": ClassConfig(criticality="sheddable", caches="exact", slo_ttft_ms=1_000, timeout_ms=3_000),
}
TOKENS = {"rich": 1_000_000, "small": 1_000}  # their buckets, refilled so slowly that every token can be counted
POOR_BURST = 6
TENANTS = {
    "rich": TenantConfig(tokens_per_s=1e-6),
    "small": TenantConfig(tokens_per_s=1e-9),
    "poor": TenantConfig(burst=POOR_BURST, rate_rps=1e-9),
}
TTL_NS, KEEP_NS = 2 * S_NS, 6 * S_NS


def config(semantic: bool = True, exact: bool = True, breaker: bool = True, replicas: int = 1) -> GatewayConfig:
    return GatewayConfig(
        replicas=replicas,
        classes=CLASSES, tenants=TENANTS, limiter=LimiterConfig(token_burst_s=1e12), index=3,
        exact=ExactConfig(enabled=exact, ttl_s=2, stale_s=4),
        semantic=SemanticConfig(enabled=semantic, ttl_s=2, stale_s=4, cosine=0.95, approximate_cosine=0.85),
        overload=OverloadConfig(  # all or nothing: whom a share leaves out is the business of test_admission.py
            window_ms=250, hold_ms=1_100, degraded_share=0.4, shed_share=0.5, graded=False,
        ),
        breaker=BreakerConfig(enabled=breaker, window="count", window_size=6, minimum_calls=4, open_ms=1_000),
        encoder_breaker=BreakerConfig(
            enabled=breaker, window="count", window_size=6, minimum_calls=4, slow_share=0.5, open_ms=1_000
        ),
    )


@dataclass(eq=False)
class Flight:
    """A submission in the specification."""

    submit: Submit
    key: bytes
    source: str
    permit: int | None  # None once given back
    riders: list[Trip]
    started: bool = False
    aborted: bool = False

    @property
    def deserted(self) -> bool:
        return all(trip.outcome for trip in self.riders)


@dataclass(eq=False)
class Trip:
    """A request in the specification."""

    ask: Arrive
    level: int
    key: bytes
    asked: bool = False
    waits_for_similar: int | None = None  # the encoder's permit
    neighbours: tuple[Neighbour, ...] = ()
    has_vector: bool = False
    retried: bool = False
    leads: bool = False
    reserved: int = 0
    used: int = 0
    first_ns: int | None = None
    outcome: str = ""
    row: dict[str, object] = field(default_factory=dict)  # what its record holds beside the obvious

    @property
    def cls(self) -> ClassConfig:
        return CLASSES[self.ask.traffic_class]


class GatewayWorld:
    """Clients, encoder and replica of one gateway. They answer when the test says, in any order."""

    def __init__(self, config: GatewayConfig) -> None:
        self.config, self.machine = config, Gateway(config)
        self.now_ns = 0
        self.trips: dict[int, Trip] = {}
        self.flights: dict[int, Flight] = {}
        self.by_key: dict[bytes, Flight] = {}
        self.cache: dict[bytes, tuple[str, int, str, int]] = {}  # answer, stored, source, output tokens
        self.meant: dict[bytes, tuple[str, int, str, int]] = {}  # the same by question, for those that mean the same
        self.arrived: list[Arrive] = []
        self.stranded: dict[int, int] = {}  # rid -> until when it waits for a replica to be back
        self.buried: set[int] = set()  # replicas that nobody starts anew
        self.draining = False
        self.poor = 0
        self.balance = dict(TOKENS)
        self.want: list[GatewayAction] = []
        self.journal: list[tuple[int, GatewayEvent, list[GatewayAction]]] = []
        # what the outside world has seen
        self.heard: dict[int, Answer | Reject] = {}
        self.gone: dict[int, None] = {}  # cancelled before they had heard anything
        self.rows: dict[str, RequestRecord] = {}
        self.texts: dict[str, None] = {}  # the driver keeps these
        self.vectors: dict[bytes, None] = {}  # and these
        self.next_sid = config.index << 40
        self.fallbacks = 10**6  # answers of last resort that are left
        self.overload = Overload(config.overload, CLASSES)  # this, breakers and router have tests of their own
        cuts = config.breaker.open_jitter
        self.breakers = [
            Breaker(config.breaker, spread(config.index * config.replicas + n, cuts)) for n in range(config.replicas)
        ]
        self.encoder = Breaker(config.encoder_breaker, spread(config.index, config.encoder_breaker.open_jitter))
        self.router = Router(config.router, config.replicas, config.block_tokens)
        self.up = set(range(config.replicas))
        self.last_words: dict[int, tuple[Waiting, ...]] = {}
        self.acked_sids = dict.fromkeys(range(config.replicas), -1)

    # ------------------------------------------------------------ events

    def arrive(
        self, traffic_class: str, key: bytes = b"", tenant: str = "rich", late_ns: int = 0, prompt: int = 5
    ) -> int:
        rid = len(self.arrived)
        ask = Arrive(
            rid, f"r{rid}", tenant, traffic_class, self.now_ns - late_ns, prompt_tokens=prompt, max_tokens=4,
            exact_key=key, hard_key=b"hard", text_key=key, blocks=(b"x",), pinned_blocks=1,
        )
        self.arrived.append(ask)
        self.poor += tenant == "poor"

        def spec() -> None:
            self._observe()
            trip = Trip(ask, self.level, key if CLASSES[traffic_class].caches != "none" else b"")
            self.trips[rid] = trip
            cost = prompt + 4
            if (tenant == "poor" and self.poor > POOR_BURST) or self.balance.get(tenant, cost) < cost:
                self._reject(trip, "rate_limited", None)
                return self._close(trip)
            trip.reserved = cost
            self._pay(tenant, cost)
            if self.draining:
                self._reject(trip, "draining", S_NS)
                return self._close(trip)
            return self._way(trip)

        self._tell(ask, spec)
        return rid

    def similar(self, rid: int, status: str = "ok", **cosines: float) -> None:
        """The encoder answers; ``k1=0.97``: a question that near, whether it is still answered or not."""
        near = [Neighbour(key.encode(), round(cosine * 1e6)) for key, cosine in cosines.items() if status == "ok"]
        event = Similar(rid, tuple(sorted(near, key=lambda n: -n.cosine_millionths)), status)  # type: ignore[arg-type]

        def spec() -> None:
            trip = self.trips.get(rid)
            if trip is None or trip.waits_for_similar is None:
                return
            said = {"ok": "ok", "late": "slow", "failed": "fail", "unfit": "ignored"}[status]
            self.encoder.release(self.now_ns, trip.waits_for_similar, said)  # type: ignore[arg-type]
            trip.waits_for_similar = None
            trip.has_vector, trip.neighbours = status in ("ok", "late"), event.neighbours
            self._way(trip)

        self._tell(event, spec)

    def first_token(self, sid: int) -> None:
        def spec() -> None:
            if flight := self.flights.get(sid):
                flight.started = True
                self.router.started(sid)
                for trip in flight.riders:
                    if trip.first_ns is None and not trip.outcome:
                        trip.first_ns = self.now_ns

        self._tell(FirstToken(sid, 7, 2), spec)

    def end(self, sid: int, reason: EndReason, answer_id: str = "a", outputs: int = 3) -> None:
        ran = reason not in ("deadline", "draining", "lost", "busy", "refused")
        good = reason in ("stop", "length")
        ended = Ended(
            sid, reason, computed_tokens=3 * ran, cached_tokens=2 * ran, output_tokens=outputs * ran, queue_ns=7 * ran,
            preemptions=1 * ran, answer_id=answer_id if good else "", answer_bytes=9 if good else 0,
        )

        def spec() -> None:
            flight = self.flights.pop(sid, None)
            if flight is None:
                return
            self._hide(flight)
            failed = reason == "failed" or (reason == "lost" and flight.submit.replica in self.up)
            self._give_back(flight, "ok" if good else "fail" if failed else "cancelled")
            for trip in flight.riders:
                self._landed(trip, flight, ended)

        self._tell(ended, spec)

    def pressure(self, ages_ms: dict[str, int], acked_sid: int = -1, replica: int = 0) -> None:
        """A replica's word: how long the oldest of each class has waited."""
        waiting = tuple(Waiting(name, 1, self.now_ns - ms * MS_NS) for name, ms in ages_ms.items())

        def spec() -> None:
            if replica in self.up:
                self.last_words[replica] = waiting
                self.acked_sids[replica] = max(self.acked_sids[replica], acked_sid)
                self.router.hear(replica, 9)
            self._observe()

        self._tell(Pressure(replica, acked_sid, running=1, waiting=waiting, queued_tokens=9), spec)

    def lose(self, replica: int, for_good: bool = False) -> None:
        """It dies, and its driver says so of each of its submissions."""

        def spec() -> None:
            self.buried |= {replica} if for_good else set()
            self.up.discard(replica)
            self.last_words.pop(replica, None)
            self.router.lose(replica)
            self._observe()

        self._tell(ReplicaLost(replica, for_good), spec)
        for sid, flight in list(self.flights.items()):
            if flight.submit.replica == replica:
                self.end(sid, "lost")

    def back(self, replica: int) -> None:
        def spec() -> None:
            self.up.add(replica)
            self.buried.discard(replica)
            waiting, self.stranded = self.stranded, {}
            for rid in waiting:
                self._way(self.trips[rid])

        self._tell(ReplicaBack(replica), spec)

    def cancel(self, rid: int) -> None:
        if rid in self.trips and rid not in self.heard:
            self.gone[rid] = None

        def spec() -> None:
            trip = self.trips.get(rid)
            if trip is not None and not trip.outcome:
                trip.outcome, trip.row["e2e_ns"] = "cancelled", self.now_ns - trip.ask.arrived_ns
                self._off(trip)

        self._tell(Cancel(rid), spec)

    def drain(self) -> None:
        self._tell(Drain(), lambda: None)
        self.draining = True

    def wake(self) -> None:
        def spec() -> None:
            due = [(self._due_ns(trip), rid, False) for rid, trip in self.trips.items()]
            due += [(until_ns, rid, True) for rid, until_ns in self.stranded.items()]
            for due_ns, rid, stranded in sorted(due):
                trip = self.trips.get(rid)
                if due_ns > self.now_ns or trip is None or trip.outcome:
                    continue
                if stranded:
                    if self.stranded.pop(rid, None):
                        self._fall_back(trip, "replica_lost", S_NS)
                        self._close(trip)
                else:
                    self._reject(trip, "deadline_exceeded", None)
                    self._off(trip)
            self._observe()

        self._tell(Wake(), spec)

    def time_passes(self, ns: int) -> None:
        """With a wake whenever the machine wants one."""
        until, wakes = self.now_ns + ns, 0
        while (wake_ns := self.machine.next_wake_ns()) is not None and wake_ns <= until:
            self.now_ns = max(self.now_ns, wake_ns)
            self.wake()
            wakes += 1
            assert wakes < 10_000, "a wake changes something: it never spins"
        self.now_ns = until
        assert all(self._due_ns(t) > self.now_ns for t in self.trips.values() if not t.outcome), "timeout: on time"
        assert all(until_ns > self.now_ns for until_ns in self.stranded.values()), "stranded: not for ever"

    def finish(self) -> None:
        """Whoever was asked answers; then nothing may be left, and every token is settled."""
        if self.stranded:
            self.back(0)
        while self.trips:
            for rid in self.looking():
                self.similar(rid)
            for sid, flight in list(self.flights.items()):
                self.end(sid, "aborted" if flight.aborted else "stop")
        stats = self.machine.stats()
        assert (stats.in_flight, stats.flights.flights, stats.flights.riders) == (0, 0, 0)
        assert all(breaker.open_permits == 0 for breaker in (*stats.fleet.breakers, stats.encoder))
        assert stats.fleet.router.ahead_tokens == tuple(9 * (n in self.last_words) for n in range(len(self.breakers)))
        assert stats.arrived == stats.ended == len(self.arrived)
        assert len(self.rows) == len(self.arrived), "record: one for each Arrive"
        for ask in self.arrived:
            row = self.rows[ask.request_id]
            assert (ask.rid in self.heard) != (ask.rid in self.gone), "an answer, a refusal, or gone before either"
            assert (row.outcome == "cancelled") == (ask.rid in self.gone)
        for tenant, tokens in self.balance.items():
            for more in (0, 1):
                verdict = copy.deepcopy(self.machine.limiter).take(self.now_ns, tenant, tokens + more)
                assert verdict.ok != more, "tokens: every reservation is settled once, for what was used"

    def looking(self) -> list[int]:
        return [rid for rid, trip in self.trips.items() if trip.waits_for_similar is not None]

    # ------------------------------------------------------------ the specification

    @property
    def level(self) -> int:
        return self.overload.level

    def _observe(self) -> None:
        """The replicas' last words, and what they cannot have seen when they said them."""
        sent = [(w.traffic_class, w.oldest_ns) for words in self.last_words.values() for w in words]
        for sid, flight in self.flights.items():
            if sid > self.acked_sids[flight.submit.replica] and not flight.started and not flight.aborted:
                sent.append((flight.submit.traffic_class, flight.submit.sent_ns))
        oldest_ns = {name: min(ns for other, ns in sent if other == name) for name, _ in sent}
        if change := self.overload.observe(self.now_ns, oldest_ns):
            self.want.append(Record(LevelRecord(change.at_ns, change.level, change.traffic_class, change.age_ns)))

    def _way(self, trip: Trip) -> None:
        if trip.key and (hit := self._cached(trip)):
            tier, (answer_id, stored_ns, source, outputs) = hit
            trip.row |= {"tier": tier, "answer_id": answer_id, "output_tokens": outputs, "source": source}
            trip.first_ns = self.now_ns
            self._serve(trip, Answer(trip.ask.rid, tier, answer_id, trip.level, self.now_ns - stored_ns, source))
            self._close(trip)
        elif (flight := self.by_key.get(trip.key)) and flight.submit.priority <= trip.cls.priority:
            flight.riders.append(trip)
            if flight.started:
                trip.first_ns = self.now_ns
            self.want.append(Attach(trip.ask.rid, flight.submit.sid))
        elif self._asks(trip):
            self.want.append(FindSimilar(trip.ask.rid, b"hard", trip.key, 8))
        elif near := self._near(trip):
            tier, (answer_id, stored_ns, source, outputs), cosine = near
            trip.row |= {"tier": tier, "answer_id": answer_id, "output_tokens": outputs, "source": source}
            trip.row["cosine_millionths"], trip.first_ns = cosine, self.now_ns
            age_ns = self.now_ns - stored_ns
            self._serve(trip, Answer(trip.ask.rid, tier, answer_id, trip.level, age_ns, source, cosine))
            self._close(trip)
        elif {0: False, 1: self.level >= 3, 2: self.level >= 2}[trip.cls.priority]:
            self._fall_back(trip, "overloaded", self.overload.calm_ns())
            self._close(trip)
        elif not self.up:
            until_ns = trip.ask.arrived_ns + trip.cls.slo_ttft_ms * MS_NS
            to_come = len(self.buried) < len(self.breakers)
            if to_come and trip.retried and not trip.cls.fallback and until_ns > self.now_ns:
                self.stranded[trip.ask.rid] = until_ns
            else:
                self._fall_back(trip, "replica_lost", S_NS)
                self._close(trip)
        elif not (trusted := [n for n in sorted(self.up) if not self.breakers[n].retry_after_ns(self.now_ns)]):
            self._fall_back(trip, "breaker_open", min(self.breakers[n].retry_after_ns(self.now_ns) for n in self.up))
            self._close(trip)
        else:
            others = [n for n in trusted if not (trip.retried and n == trip.row.get("replica"))]
            self._lead(trip, self.router.choose(self.now_ns, others or trusted, trip.ask))

    def _cached(self, trip: Trip) -> tuple[str, tuple[str, int, str, int]] | None:
        entry = self.cache.get(trip.key)
        age_ns = self.now_ns - entry[1] if entry else KEEP_NS + 1
        if age_ns <= TTL_NS:
            return "exact", entry
        if age_ns <= KEEP_NS and trip.cls.criticality == "sheddable" and self.level >= 1:
            return "approximate", entry
        return None

    def _asks(self, trip: Trip) -> bool:
        """Once; not when the encoder is known to be away."""
        if trip.asked or not trip.key or trip.cls.caches != "semantic" or not self.config.semantic.enabled:
            return False
        if self.level >= 2 and trip.cls.criticality != "sheddable":
            return False
        trip.asked, trip.waits_for_similar = True, self.encoder.acquire(self.now_ns)
        return trip.waits_for_similar is not None

    def _near(self, trip: Trip) -> tuple[str, tuple[str, int, str, int], int] | None:
        neighbours, trip.neighbours = trip.neighbours, ()  # judged once
        for neighbour in neighbours:
            cosine, entry = neighbour.cosine_millionths, self.meant.get(neighbour.text_key)
            age_ns = self.now_ns - entry[1] if entry else KEEP_NS + 1
            if cosine >= 950_000 and age_ns <= TTL_NS:
                return "semantic", entry, cosine
            if cosine >= 850_000 and age_ns <= KEEP_NS and trip.cls.criticality == "sheddable" and self.level >= 1:
                return "approximate", entry, cosine
        return None

    def _lead(self, trip: Trip, replica: int) -> None:
        ask, cls = trip.ask, trip.cls
        submit = Submit(
            self.next_sid, ask.rid, ask.tenant, ask.traffic_class, cls.priority, self.now_ns,
            ask.arrived_ns + cls.slo_ttft_ms * MS_NS, ask.prompt_tokens, ask.max_tokens, ask.blocks, ask.pinned_blocks,
            replica,
        )
        permit = self.breakers[replica].acquire(self.now_ns)
        assert permit is not None
        self.router.sent(self.now_ns, submit.sid, replica, ask)
        self.next_sid += 1
        trip.leads, trip.row["replica"] = True, replica
        flight = self.flights[submit.sid] = Flight(submit, trip.key, ask.request_id, permit, [trip])
        if trip.key:
            self.by_key[trip.key] = flight
        self.want.append(submit)

    def _landed(self, trip: Trip, flight: Flight, ended: Ended) -> None:
        good = ended.reason in ("stop", "length")
        leads = trip is flight.riders[0]
        if not leads and not trip.outcome and ended.reason in ("aborted", "deadline", "draining"):
            return self._way(trip)
        if ended.reason in ("lost", "busy") and not trip.outcome and trip.first_ns is None and not trip.retried:
            trip.retried = True
            return self._way(trip)
        if leads and ended.computed_tokens:
            trip.used = trip.ask.prompt_tokens + ended.output_tokens
        if leads and good and trip.key and ended.answer_id:
            entry = (ended.answer_id, self.now_ns, trip.ask.request_id, ended.output_tokens)
            if self.config.exact.enabled:
                self.cache[trip.key] = entry
            if trip.has_vector:
                self.meant[trip.key] = entry
                self.want.append(StoreVector(b"hard", trip.key))
            if self.config.exact.enabled or trip.has_vector:
                self.want.append(StoreAnswer(ended.answer_id, ended.sid))
        trip.row |= {"answer_id": ended.answer_id, "output_tokens": ended.output_tokens}
        if leads:
            names = ("cached_tokens", "computed_tokens", "queue_ns", "preemptions")
            trip.row |= {name: getattr(ended, name) for name in names}
        if good and not leads:
            trip.row["source"] = flight.source
        if not trip.outcome:
            if good:
                tier = trip.row["tier"] = "model" if leads else "coalesced"
                source = "" if leads else flight.source
                self._serve(trip, Answer(trip.ask.rid, tier, ended.answer_id, trip.level, source=source))
            elif ended.reason == "draining":
                self._reject(trip, "draining", S_NS)
            elif ended.reason == "lost":
                self._fall_back(trip, "replica_lost", S_NS)
            elif ended.reason == "busy":
                self._fall_back(trip, "upstream_busy", S_NS)
            else:
                hopeless = ended.reason in ("failed", "refused")
                self._fall_back(trip, "model_failed" if hopeless else "deadline_exceeded", None)
        return self._close(trip)

    def _give_back(self, flight: Flight, verdict: str) -> None:
        """The permit, once."""
        if flight.permit is not None:
            self.breakers[flight.submit.replica].release(self.now_ns, flight.permit, verdict)  # type: ignore[arg-type]
            flight.permit = None
        self.router.ended(flight.submit.sid)

    def _fall_back(self, trip: Trip, code: str, retry_after_ns: int | None) -> None:
        if not trip.cls.fallback or trip.first_ns is not None or not self.fallbacks:
            return self._reject(trip, code, retry_after_ns)
        self.fallbacks -= 1
        text = fallback_id(trip.ask.traffic_class)
        trip.row |= {"tier": "fallback", "error_code": code, "answer_id": text}
        trip.first_ns = self.now_ns
        return self._serve(trip, Answer(trip.ask.rid, "fallback", text, trip.level))

    def _serve(self, trip: Trip, answer: Answer) -> None:
        trip.outcome, trip.row["e2e_ns"] = "served", self.now_ns - trip.ask.arrived_ns
        self.want.append(answer)

    def _reject(self, trip: Trip, code: str, retry_after_ns: int | None) -> None:
        trip.outcome = "failed" if code in ("model_failed", "replica_lost") else "rejected"
        trip.row |= {"error_code": code, "e2e_ns": self.now_ns - trip.ask.arrived_ns}
        self.want.append(Reject(trip.ask.rid, code, trip.level, retry_after_ns))

    def _off(self, trip: Trip) -> None:
        """Its client waits no longer. It lives on until its flight has landed."""
        if trip.waits_for_similar is not None:
            self.encoder.release(self.now_ns, trip.waits_for_similar, "cancelled")
            return self._close(trip)
        if self.stranded.pop(trip.ask.rid, None):
            return self._close(trip)
        flight = next(f for f in self.flights.values() if trip in f.riders)
        if flight.deserted:
            flight.aborted = True
            self._hide(flight)
            late = trip.outcome != "cancelled"
            self._give_back(flight, "cancelled" if not late else "slow" if flight.started else "hang")
            self.want.append(Abort(flight.submit.sid))
        return None

    def _hide(self, flight: Flight) -> None:
        if self.by_key.get(flight.key) is flight:
            del self.by_key[flight.key]

    def _close(self, trip: Trip) -> None:
        ask = trip.ask
        del self.trips[ask.rid]
        self._pay(ask.tenant, trip.used - trip.reserved)
        ttft_ns = None if trip.first_ns is None else trip.first_ns - ask.arrived_ns
        self.want.append(
            Record(
                RequestRecord(
                    ask.request_id, ask.tenant, ask.traffic_class, ask.arrived_ns, trip.outcome, trip.level,  # type: ignore[arg-type]
                    prompt_tokens=ask.prompt_tokens, ttft_ns=ttft_ns, **trip.row,  # type: ignore[arg-type]
                )
            )
        )

    def _pay(self, tenant: str, tokens: int) -> None:
        if tenant in self.balance:
            self.balance[tenant] -= tokens

    def _due_ns(self, trip: Trip) -> int:
        return trip.ask.arrived_ns + trip.cls.timeout_ms * MS_NS

    # ------------------------------------------------------------ looking on

    def _tell(self, event: GatewayEvent, spec) -> None:
        actions = self.machine.handle(self.now_ns, event)
        self.journal.append((self.now_ns, event, list(actions)))
        self.machine.check()
        self.want.clear()
        spec()
        boundaries = {"encoder": self.encoder} | {f"replica-{n}": breaker for n, breaker in enumerate(self.breakers)}
        for name, breaker in boundaries.items():
            for moved in breaker.transitions():
                self.want.append(Record(BreakerRecord(moved.at_ns, name, moved.before, moved.after, moved.why)))
        for action in actions:
            self._look(action)
        if any(isinstance(a, StoreAnswer) for a in actions):
            asked_for = {answer_id for answer_id, *_ in (*self.cache.values(), *self.meant.values())}
            assert set(self.texts) <= asked_for, "texts: none is kept for nothing"
        rest = [a for a in actions if not isinstance(a, DropAnswer | DropVector)]
        for i, (got, want) in enumerate(zip(rest, self.want, strict=False)):
            if isinstance(want, Reject) and want.code == "rate_limited":  # how long is the limiter's own test
                assert got.code == "rate_limited" and got.retry_after_ns > 0
                rest[i] = want
        assert rest == self.want
        due = [self._due_ns(trip) for trip in self.trips.values() if not trip.outcome] + [*self.stranded.values()]
        wake_ns = self.machine.next_wake_ns()
        assert not due or (wake_ns is not None and wake_ns <= min(due)), "wake: no deadline is missed"

    def _look(self, action: GatewayAction) -> None:
        """What holds however the specification is written."""
        match action:
            case Answer(rid=rid, tier=tier) | Reject(rid=rid, code=tier):
                assert rid not in self.heard and rid not in self.gone, "one Answer or Reject, to somebody who listens"
                self.heard[rid] = action
                name = self.arrived[rid].traffic_class
                if tier in ("exact", "approximate", "semantic"):
                    assert action.answer_id in self.texts, "a cached answer's text is still there"
                    assert CLASSES[name].caches in (("semantic",) if tier == "semantic" else ("exact", "semantic"))
                if tier == "approximate":
                    assert CLASSES[name].criticality == "sheddable" and self.level >= 1
                if tier in ("overloaded", "approximate", "fallback"):
                    assert CLASSES[name].criticality != "critical", "critical: the same at every level"
                assert tier != "overloaded" or action.retry_after_ns >= S_NS
                assert tier != "breaker_open" or action.retry_after_ns > 0
            case StoreAnswer(answer_id=answer_id):
                self.texts[answer_id] = None
            case DropAnswer(answer_id=answer_id):
                assert answer_id in self.texts, "dropped: only what is kept"
                del self.texts[answer_id]
                entries = [e for e in (*self.cache.values(), *self.meant.values()) if e[0] == answer_id]
                assert not any(self._young(e) for e in entries), "dropped: nothing that may still be served"
            case StoreVector(text_key=text_key):
                self.vectors[text_key] = None
            case DropVector(text_key=text_key):
                del self.vectors[text_key]
                assert not self._young(self.meant[text_key]), "dropped: nothing that may still be found"
            case Record(record=RequestRecord() as row):
                assert row.request_id not in self.rows, "record: one for each Arrive"
                self.rows[row.request_id] = row


    def _young(self, entry: tuple[str, int, str, int]) -> bool:
        return self.now_ns - entry[1] <= KEEP_NS


# ---------------------------------------------------------------- random traces

KEYS = [b"", b"k1", b"k2", b"k3"]
COSINES = [0.97, 0.95, 0.85, 0.84]


def some_end(world: GatewayWorld, flight: Flight, r: int) -> EndReason:
    if flight.aborted:
        return ("aborted", "aborted", "stop")[r % 3]  # it may have landed before it heard of it
    if flight.started:
        return "lost" if r > 33 else ("stop", "length", "failed")[r % 3]
    if r > 32:  # an upstream's, which is there all the same
        return ("lost", "busy", "refused")[r % 3]
    return ("stop", "length", "deadline", "failed", "draining", "aborted")[r % 6]


class GatewayMachine(RuleBasedStateMachine):
    """Short traces that shrink well."""

    @initialize(semantic=st.booleans(), exact=st.sampled_from([True, True, True, False]), replicas=st.integers(1, 3))
    def start(self, semantic: bool, exact: bool, replicas: int) -> None:
        self.world = GatewayWorld(config(semantic, exact, replicas=replicas))

    @rule(
        traffic_class=st.sampled_from([*CLASSES]), key=st.sampled_from(KEYS), prompt=st.integers(1, 9),
        tenant=st.sampled_from(["rich", "rich", "small", "poor"]), late_ns=st.sampled_from([0, 0, 300 * MS_NS]),
    )
    def arrive(self, **ask) -> None:
        self.world.arrive(**ask)

    @precondition(lambda self: self.world.arrived)
    @rule(
        pick=st.integers(0, 50), status=st.sampled_from(["ok", "ok", "ok", "late", "failed", "unfit"]),
        near=st.dictionaries(st.sampled_from(["k1", "k2", "k3"]), st.sampled_from(COSINES), max_size=2),
    )
    def similar(self, pick: int, status: str, near: dict[str, float]) -> None:
        if looking := self.world.looking():
            self.world.similar(looking[pick % len(looking)], status, **near)

    @precondition(lambda self: self.world.flights)
    @rule(pick=st.integers(0, 9))
    def first_token(self, pick: int) -> None:
        sids = [sid for sid, flight in self.world.flights.items() if not flight.started]
        if sids:
            self.world.first_token(sids[pick % len(sids)])

    @precondition(lambda self: self.world.flights)
    @rule(pick=st.integers(0, 9), reason=st.integers(0, 35), answer=st.sampled_from(["a", "b", ""]))
    def end(self, pick: int, reason: int, answer: str) -> None:
        sid = [*self.world.flights][pick % len(self.world.flights)]
        self.world.end(sid, some_end(self.world, self.world.flights[sid], reason), answer)

    @rule(
        ages_ms=st.dictionaries(st.sampled_from([*CLASSES]), st.sampled_from([0, 110, 260, 450, 700]), max_size=2),
        acked=st.integers(0, 3), pick=st.integers(0, 2),
    )
    def pressure(self, ages_ms: dict[str, int], acked: int, pick: int) -> None:
        self.world.pressure(ages_ms, self.world.next_sid - 1 - acked, pick % len(self.world.breakers))

    @rule(pick=st.integers(0, 2), for_good=st.booleans())
    def lose_or_back(self, pick: int, for_good: bool) -> None:
        replica = pick % len(self.world.breakers)
        if replica in self.world.up:
            self.world.lose(replica, for_good)
        else:
            self.world.back(replica)

    @rule(back=st.integers(0, 12))
    def cancel(self, back: int) -> None:
        self.world.cancel(len(self.world.arrived) - back)

    @rule(ms=st.sampled_from([0, 1, 100, 300, 1_000, 3_000]))
    def time_passes(self, ms: int) -> None:
        self.world.time_passes(ms * MS_NS)

    @rule()
    def wake_for_nothing(self) -> None:
        self.world.wake()

    @rule(sid=st.sampled_from([-1, 5, (3 << 40) + 10**6]))
    def strangers(self, sid: int) -> None:
        """Unknown ids are no-ops."""
        self.world.first_token(sid)
        self.world.end(sid, "stop")
        self.world.similar(10**6 + sid)
        self.world.cancel(10**6 + sid)

    @precondition(lambda self: len(self.world.arrived) > 15)
    @rule()
    def drain(self) -> None:
        self.world.drain()

    @invariant()
    def check(self) -> None:
        if hasattr(self, "world"):
            self.world.machine.check()

    def teardown(self) -> None:
        if hasattr(self, "world") and self.world.journal and sys.exc_info()[0] is None:
            self.world.finish()


GatewayMachine.TestCase.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
TestGateway = GatewayMachine.TestCase


def wander(world: GatewayWorld, seed: int, events: int, drain_at: int | None = None) -> None:
    """A long random trace; popular questions, storms of waiting, clients who lose patience."""
    r = random.Random(seed)
    for n in range(events):
        world.time_passes(r.choice([0, 0, 1, 40, 200, 1_500]) * MS_NS)
        looking = world.looking()
        flying = [*world.flights]
        what = r.random()
        if what < 0.4:
            world.arrive(
                r.choice([*CLASSES]), r.choice(KEYS), r.choice(["rich", "rich", "rich", "small", "poor"]),
                late_ns=r.choice([0, 0, 300 * MS_NS]), prompt=r.choice([*range(1, 9), 150]),
            )
        elif what < 0.6 and looking:
            near = {key: r.choice(COSINES) for key in r.sample(["k1", "k2", "k3"], r.choice([0, 1, 2, 3]))}
            world.similar(r.choice(looking), r.choice(["ok"] * 8 + ["late", "failed", "unfit"]), **near)
        elif what < 0.68 and flying:
            world.first_token(r.choice(flying))
        elif what < 0.82 and flying:
            sid = r.choice(flying)
            world.end(sid, some_end(world, world.flights[sid], r.randrange(36)), r.choice("abc"))
        elif what < 0.9:
            name = r.choice([*CLASSES])
            ages_ms = {name: r.choice([0, 110, 260, 450, 700])} if r.random() < 0.5 else {}
            world.pressure(ages_ms, world.next_sid - 1 - r.choice([0, 0, 1]), r.randrange(len(world.breakers)))
        elif what < 0.97 and world.arrived:
            anybody = [ask.rid for ask in world.arrived]
            world.cancel(r.choice(anybody if r.random() < 0.3 else [*world.trips] or anybody))
        elif what > 0.99:
            replica = r.randrange(len(world.breakers))
            if replica in world.up and r.random() < 0.4:
                world.lose(replica, for_good=n % 3 == 0)
            elif replica not in world.up:
                world.back(replica)
        if n == drain_at:
            world.drain()


@pytest.mark.parametrize("seed", range(6))
def test_long_random_traces(seed: int) -> None:
    settings = config(semantic=seed % 2 == 0, replicas=1 + seed % 3)
    patient = OverloadConfig(window_ms=250, hold_ms=1_100, degraded_share=0.68, shed_share=0.69, graded=False)
    if settings.semantic.enabled:  # from level 2 on most classes are not looked up
        settings = msgspec.structs.replace(settings, overload=patient)
    world = GatewayWorld(settings)
    wander(world, seed, 6_000, drain_at=5_950)
    world.finish()
    rows = [*world.rows.values()]
    tiers = {row.tier for row in rows} | {row.error_code for row in rows} | {row.outcome for row in rows}
    assert tiers >= {"exact", "approximate", "coalesced", "fallback", "model", "cancelled"}
    assert ("semantic" in tiers) == world.config.semantic.enabled
    assert tiers >= {"rate_limited", "overloaded", "draining", "deadline_exceeded", "model_failed", "breaker_open"}
    assert "replica_lost" in tiers or len(world.breakers) > 1
    assert {row.replica for row in rows} == {None, *range(len(world.breakers))}


# ---------------------------------------------------------------- scenes


def actions_of(world: GatewayWorld, kind: type) -> list:
    return [a for _, _, actions in world.journal for a in actions if isinstance(a, kind)]


def crowd(world: GatewayWorld, count: int, traffic_class: str = "chat", key: bytes = b"k") -> list[int]:
    """Identical requests, on board."""
    rids = [world.arrive(traffic_class, key) for _ in range(count)]
    for rid in rids:
        world.similar(rid)
    return rids


@pytest.mark.parametrize("semantic", [True, False])
@pytest.mark.parametrize("started", [True, False])
def test_fifty_identical_cold_requests_compute_once(semantic: bool, started: bool) -> None:
    world = GatewayWorld(config(semantic))
    rids = crowd(world, 25)
    [submit] = actions_of(world, Submit)
    if started:
        world.first_token(submit.sid)
    rids += crowd(world, 25)
    world.end(submit.sid, "stop")
    assert len(actions_of(world, Submit)) == 1
    assert [world.heard[rid].tier for rid in rids] == ["model"] + ["coalesced"] * 49
    assert world.heard[rids[49]].source == "r0"
    later = world.arrive("chat", b"k")
    assert world.heard[later].tier == "exact"
    world.finish()
    assert sum(row.computed_tokens for row in world.rows.values()) == 3


def test_an_answer_that_came_while_the_encoder_was_asked_is_taken() -> None:
    world = GatewayWorld(config())
    first, second = world.arrive("chat", b"k"), world.arrive("chat", b"k")
    world.similar(first)
    world.end(world.next_sid - 1, "stop")
    world.similar(second)
    assert world.heard[second].tier == "exact"
    world.finish()


def test_a_refused_request_gets_no_tokens_back() -> None:
    world = GatewayWorld(config())
    first, second = world.arrive("fraud", tenant="small", prompt=600), world.arrive("fraud", tenant="small", prompt=600)
    assert first not in world.heard and world.heard[second].code == "rate_limited"
    world.end(3 << 40, "stop", outputs=1)
    assert world.balance["small"] == 1_000 - 601
    world.finish()


def test_a_leader_who_leaves_does_not_strand_its_followers() -> None:
    world = GatewayWorld(config())
    leader, *followers = crowd(world, 4)
    world.cancel(leader)
    assert not actions_of(world, Abort)
    world.end(world.next_sid - 1, "length")
    assert [world.heard[rid].tier for rid in followers] == ["coalesced"] * 3
    assert world.rows["r0"].outcome == "cancelled"
    assert world.heard[world.arrive("chat", b"k")].tier == "exact", "it paid for an answer; that is kept"
    world.finish()


def test_an_encoder_that_answers_twice_is_heard_once() -> None:
    world = GatewayWorld(config())
    [rid] = crowd(world, 1)
    world.time_passes(S_NS)
    world.similar(rid)
    world.end(3 << 40, "stop")
    assert world.rows["r0"].ttft_ns is None, "no first token was seen"
    world.finish()


def test_the_last_rider_to_leave_aborts_once() -> None:
    world = GatewayWorld(config())
    rids = crowd(world, 3)
    for rid in (rids[1], rids[0], rids[2]):
        assert not actions_of(world, Abort)
        world.cancel(rid)
    world.cancel(rids[2])
    world.wake()
    assert actions_of(world, Abort) == [Abort(3 << 40)]
    newcomer = world.arrive("chat", b"k")
    world.similar(newcomer)
    assert [a.rid for a in actions_of(world, Submit)] == [rids[0], newcomer], "nobody joins what is being stopped"
    world.end(3 << 40, "aborted")
    world.finish()
    assert world.heard[newcomer].tier == "model"


@pytest.mark.parametrize("reason", ["deadline", "aborted", "draining"])
@pytest.mark.parametrize("semantic", [True, False])
def test_a_leader_that_never_ran_hands_over_to_a_follower(reason: EndReason, semantic: bool) -> None:
    world = GatewayWorld(config(semantic))
    leader, *followers = crowd(world, 4)
    world.end(3 << 40, reason)
    for rid in followers:
        world.similar(rid)
    assert [a.rid for a in actions_of(world, Submit)] == [leader, followers[0]]
    assert [a.rid for a in actions_of(world, Attach)[-2:]] == followers[1:]
    world.end((3 << 40) + 1, "stop")
    assert [world.heard[rid].tier for rid in followers] == ["model", "coalesced", "coalesced"]
    assert world.heard[leader].code == ("draining" if reason == "draining" else "deadline_exceeded")
    world.finish()


def test_a_failed_answer_reaches_all_riders_and_no_cache() -> None:
    world = GatewayWorld(config())
    plain = crowd(world, 3, "chat", b"k")
    world.end(world.next_sid - 1, "failed")
    assert [world.heard[rid].code for rid in plain] == ["model_failed"] * 3
    falls = crowd(world, 2, "help", b"k")
    assert len(actions_of(world, Submit)) == 2, "nothing was kept"
    world.end(world.next_sid - 1, "failed")
    assert [world.heard[rid].tier for rid in falls] == ["fallback"] * 2
    started = crowd(world, 2, "help", b"k")
    world.first_token(world.next_sid - 1)
    world.end(world.next_sid - 1, "failed")
    assert [world.heard[rid].code for rid in started] == ["model_failed"] * 2, "half an answer cannot be taken back"
    assert not actions_of(world, StoreAnswer)
    world.finish()


def test_an_open_breaker_refuses_whom_no_cache_or_flight_can_help() -> None:
    world = GatewayWorld(config(semantic=False))
    world.arrive("vip", b"k")
    world.end(3 << 40, "stop")
    flying = world.arrive("chat", b"f")
    for _ in range(4):
        world.arrive("fraud")
        world.end(world.next_sid - 1, "failed")
    heard = [world.heard.get(world.arrive(name, key)) for name, key in (("fraud", b""), ("help", b"x"), ("chat", b"k"))]
    assert heard[0].code == "breaker_open"
    assert 0.9 * S_NS <= heard[0].retry_after_ns <= S_NS, "the open time, less its jitter"
    assert (heard[1].tier, world.rows[f"r{heard[1].rid}"].error_code) == ("fallback", "breaker_open")
    assert heard[2].tier == "exact"
    assert world.arrive("chat", b"f") not in world.heard, "rides"
    world.end((3 << 40) + 1, "stop")
    assert world.heard[flying].tier == "model"
    world.time_passes(S_NS)
    assert [world.arrive("fraud") in world.heard for _ in range(5)] == [False] * 4 + [True], "then so many probes"
    world.finish()


def test_nobody_rides_on_a_flight_of_lower_criticality() -> None:
    world = GatewayWorld(config(semantic=False))
    for name in ("tips", "chat", "vip", "chat", "tips"):
        world.arrive(name, b"k")
    assert [a.traffic_class for a in actions_of(world, Submit)] == ["tips", "chat", "vip"]
    assert [(a.rid, a.sid - (3 << 40)) for a in actions_of(world, Attach)] == [(3, 2), (4, 2)]
    world.finish()


LEVELS_MS = {0: 0, 1: 250, 2: 450, 3: 600}  # a standard class with 1,000 ms: age of its oldest


def at_level(level: int, semantic: bool = False) -> GatewayWorld:
    world = GatewayWorld(config(semantic))
    world.pressure({"chat": LEVELS_MS[level]} if level else {})
    assert world.level == level
    return world


@pytest.mark.parametrize("level", range(4))
def test_what_is_shed_at_which_level(level: int) -> None:
    world = at_level(level)
    heard = {name: world.heard.get(world.arrive(name)) for name in CLASSES}
    assert heard["fraud"] is heard["vip"] is None, "critical goes to the model at every level"
    assert (heard["reco"].tier if heard["reco"] else None) == ("fallback" if level >= 2 else None)
    assert (heard["tips"].code if heard["tips"] else None) == ("overloaded" if level >= 2 else None)
    assert (heard["help"].tier if heard["help"] else None) == ("fallback" if level >= 3 else None)
    assert (heard["chat"].code if heard["chat"] else None) == ("overloaded" if level >= 3 else None)
    if level == 3:
        assert heard["tips"].retry_after_ns == heard["chat"].retry_after_ns == 1_100 * MS_NS, "the level holds so long"
        assert world.rows[f"r{heard['reco'].rid}"].error_code == "overloaded"
    world.finish()


def test_shed_work_may_still_ride_or_be_answered_from_the_cache() -> None:
    world = GatewayWorld(config(semantic=False))
    world.arrive("vip", b"k")
    world.pressure({"chat": 600})
    follower = world.arrive("tips", b"k")
    assert [a.rid for a in actions_of(world, Attach)] == [follower]
    world.end(3 << 40, "stop")
    assert world.heard[world.arrive("chat", b"k")].tier == "exact"
    world.finish()


def test_the_last_resort_is_no_flood_either() -> None:
    world = GatewayWorld(replace(config(), overload=OverloadConfig(fallback_rps=2.0, graded=False, hold_ms=1_100)))
    world.pressure({"chat": 600})
    world.fallbacks = 2
    heard = [world.heard[world.arrive("reco")] for _ in range(3)]
    assert [getattr(said, "tier", None) or said.code for said in heard] == ["fallback", "fallback", "overloaded"]
    assert heard[2].retry_after_ns >= S_NS
    world.finish()


def test_critical_without_caches_is_never_answered_from_one() -> None:
    world = GatewayWorld(config())
    crowd(world, 1, "vip", b"k")
    world.end(3 << 40, "stop")
    for _ in range(3):
        world.arrive("fraud", b"k")
    assert [a.traffic_class for a in actions_of(world, Submit)] == ["vip"] + ["fraud"] * 3
    assert len(actions_of(world, FindSimilar)) == 1
    world.finish()
    assert actions_of(world, StoreAnswer) == [StoreAnswer("a", 3 << 40)]


@pytest.mark.parametrize("level", [0, 1])
@pytest.mark.parametrize(
    ("age_ns", "tier"), [(TTL_NS, "exact"), (TTL_NS + 1, "old"), (KEEP_NS, "old"), (KEEP_NS + 1, "")]
)
def test_stale_answers_are_for_sheddable_classes_under_pressure(level: int, age_ns: int, tier: str) -> None:
    world = GatewayWorld(config(semantic=False))
    world.arrive("vip", b"k")
    world.end(3 << 40, "stop")
    world.time_passes(age_ns)
    world.pressure({"chat": LEVELS_MS[level]} if level else {})
    tiers = [getattr(world.heard.get(world.arrive(name, b"k")), "tier", "") for name in ("tips", "vip")]
    stale = "approximate" if tier == "old" and level else ""
    assert tiers == (["exact", "exact"] if tier == "exact" else [stale, ""])
    if stale:
        assert (world.heard[1].age_ns, world.heard[1].source) == (age_ns, "r0")
    world.finish()


def test_timeout_is_a_504_and_settles_later() -> None:
    world = GatewayWorld(config())
    alone, asks = world.arrive("fraud"), world.arrive("vip", b"k")
    world.time_passes(1_999 * MS_NS)
    assert not world.heard
    world.time_passes(MS_NS)
    assert world.heard[alone] == Reject(alone, "deadline_exceeded")
    assert actions_of(world, Abort) == [Abort(3 << 40)]
    assert not world.rows, "the record waits for the replica's word on what was used"
    assert world.balance["rich"] == TOKENS["rich"] - 9 - 9
    world.end(3 << 40, "aborted", outputs=2)
    assert world.rows["r0"].output_tokens == 2
    assert world.balance["rich"] == TOKENS["rich"] - 7 - 9
    world.time_passes(S_NS)
    assert world.heard[asks].code == "deadline_exceeded"
    world.similar(asks)
    world.finish()


def test_a_late_leader_hands_nothing_over_while_others_listen() -> None:
    world = GatewayWorld(config())
    leader = crowd(world, 1, "vip")[0]
    world.time_passes(2_500 * MS_NS)
    follower = world.arrive("chat", b"k")
    world.time_passes(S_NS)
    assert world.heard[leader].code == "deadline_exceeded" and not actions_of(world, Abort)
    world.end(3 << 40, "stop")
    assert world.heard[follower].tier == "coalesced"
    world.finish()


def test_drain_finishes_what_it_has() -> None:
    world = GatewayWorld(config())
    has = crowd(world, 2)
    world.drain()
    assert world.heard[world.arrive("fraud")].code == "draining"
    world.end(3 << 40, "stop")
    assert [world.heard[rid].tier for rid in has] == ["model", "coalesced"]
    world.finish()


# ---------------------------------------------------------------- the same events, the same actions

def test_the_same_events_give_the_same_actions_whatever_the_hash_seed() -> None:
    world = GatewayWorld(config())
    wander(world, 11, 600)
    again = Gateway(config())
    assert all(again.handle(now_ns, event) == actions for now_ns, event, actions in world.journal)
    assert {replayed_elsewhere(Gateway, config(), world.journal, seed) for seed in (1, 2)} == {digest_of(world.journal)}


# ---------------------------------------------------------------- replicas that hang, die and come back


def test_a_replica_that_never_answers_opens_its_breaker() -> None:
    """No Ended ever comes: the time-outs themselves must be the news."""
    world = GatewayWorld(config(semantic=False))
    for _ in range(4):
        world.arrive("fraud")
    world.time_passes(2_000 * MS_NS)
    assert world.machine.stats().fleet.breakers[0].state == "open"
    moved = [a.record for a in actions_of(world, Record) if isinstance(a.record, BreakerRecord)]
    assert [(m.boundary, m.before, m.after, m.why) for m in moved] == [("replica-0", "closed", "open", "failing")]
    assert world.heard[world.arrive("fraud")].code == "breaker_open"
    world.finish()


def test_what_was_given_up_no_longer_counts_as_waiting() -> None:
    world = GatewayWorld(config(semantic=False))
    world.arrive("fraud")
    world.cancel(0)
    world.time_passes(5 * S_NS)
    assert world.level == 0, "a submission that was aborted ages nobody's queue"


def test_a_lost_replicas_work_is_computed_elsewhere_once() -> None:
    world = GatewayWorld(config(semantic=False, replicas=2))
    rids = crowd(world, 3)
    world.lose(0)
    assert [flight.submit.replica for flight in world.flights.values()] == [1]
    assert not any(rid in world.heard for rid in rids), "nobody was told anything yet"
    world.back(0)
    world.lose(1)
    assert [world.heard[rid].code for rid in rids] == ["replica_lost"] * 3, "a request that kills replicas kills two"
    assert not world.flights
    world.finish()


def test_who_has_heard_the_beginning_gets_no_second_one() -> None:
    world = GatewayWorld(config(semantic=False, replicas=2))
    rid = world.arrive("help", b"k")
    world.first_token(world.next_sid - 1)
    world.lose(0)
    assert (world.heard[rid].code, world.heard[rid].retry_after_ns) == ("replica_lost", S_NS)
    assert world.rows[f"r{rid}"].outcome == "failed"


def test_nobody_waits_for_a_replica_that_is_gone_for_good() -> None:
    world = GatewayWorld(config(semantic=False, replicas=2))
    world.lose(1, for_good=True)
    first = world.arrive("chat", b"k")
    world.lose(0)
    assert first in world.stranded and first not in world.heard, "0 is to come back"
    world.back(0)
    world.lose(0, for_good=True)
    assert world.heard[first].code == "replica_lost"
    world.finish()


def test_with_no_replica_left_the_last_resort_answers() -> None:
    world = GatewayWorld(config(semantic=False))
    rid = world.arrive("help", b"k")
    world.lose(0)
    assert world.heard[rid].tier == "fallback"
    assert world.heard[world.arrive("chat", b"q")].code == "replica_lost"
    world.back(0)
    world.arrive("chat", b"q")
    world.end(world.next_sid - 1, "stop")
    assert world.heard[2].tier == "model"
    world.finish()


def test_who_was_in_flight_waits_for_the_only_replica_and_newcomers_do_not() -> None:
    world = GatewayWorld(config(semantic=False))
    leader, follower = world.arrive("chat", b"k"), world.arrive("chat", b"k")
    alone = world.arrive("fraud")
    world.lose(0)
    assert not world.heard and not world.flights
    assert world.heard[world.arrive("chat", b"q")].code == "replica_lost"
    world.time_passes(100 * MS_NS)
    world.back(0)
    assert [flight.submit.rid for flight in world.flights.values()] == [leader, alone]
    for sid in list(world.flights):
        world.end(sid, "stop")
    assert [world.heard[rid].tier for rid in (leader, follower, alone)] == ["model", "coalesced", "model"]
    world.finish()


def test_nobody_waits_longer_for_a_replica_than_a_start_makes_sense() -> None:
    world = GatewayWorld(config(semantic=False))
    rid = world.arrive("chat", b"k")
    gone = world.arrive("chat", b"q")
    world.lose(0)
    world.cancel(gone)
    start_ns = CLASSES["chat"].slo_ttft_ms * MS_NS
    world.time_passes(start_ns - 1)
    assert rid not in world.heard
    world.time_passes(1)
    assert (world.heard[rid].code, world.rows[f"r{rid}"].e2e_ns) == ("replica_lost", start_ns)
    world.back(0)
    assert not world.flights
    world.finish()


def test_it_waits_once_and_not_for_a_second_death() -> None:
    world = GatewayWorld(config(semantic=False))
    rid = world.arrive("chat", b"k")
    for _ in range(2):
        world.lose(0)
        world.back(0)
    assert world.heard[rid].code == "replica_lost"
    world.finish()


def test_a_leader_whose_replica_died_may_come_back_as_a_follower() -> None:
    world = GatewayWorld(config(semantic=False, replicas=2))
    low = world.arrive("tips", b"k")
    high = world.arrive("vip", b"k")  # nobody rides on what matters less: a flight of its own, on the other replica
    world.lose(world.flights[min(world.flights)].submit.replica)
    assert len(world.flights) == 1
    world.end(next(iter(world.flights)), "stop")
    assert (world.heard[low].tier, world.heard[low].source) == ("coalesced", f"r{high}")
    assert world.rows[f"r{low}"].computed_tokens == 0, "the leader alone computed it"
    world.finish()


def test_a_death_is_no_news_to_the_breaker_whatever_was_in_flight() -> None:
    world = GatewayWorld(config(semantic=False))
    for _ in range(8):
        world.arrive("fraud")
    world.lose(0)
    world.back(0)
    assert world.machine.stats().fleet.breakers[0].state == "closed"
    assert len(world.flights) == 8
    world.finish()


def test_an_answer_whose_vector_was_late_is_found_all_the_same() -> None:
    world = GatewayWorld(config())
    rid = world.arrive("chat", b"k1")
    world.similar(rid, "late")
    world.end(world.next_sid - 1, "stop")
    other = world.arrive("chat", b"k2")
    world.similar(other, k1=0.97)
    assert world.heard[other].tier == "semantic"

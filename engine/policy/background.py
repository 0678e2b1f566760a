"""Audits and refreshes of one gateway: begun when it is calm, at the lowest priority, one at a time, for no client.

Calm is: overload level 0, and nothing waits at any replica. What a job computes is kept like any answer. Its requests
stand under a class of their own at the replica, so that their waiting moves no overload level. A job has as long as a
request of its class: one that a replica never ends is given up, and makes room for the next.
"""

from __future__ import annotations

from engine.config import GatewayConfig
from engine.events import (
    PRIORITY,
    Abort,
    Arrive,
    BackgroundRecord,
    Ended,
    GatewayAction,
    Hold,
    Placed,
    Record,
    Release,
    Tier,
)
from engine.policy.answers import Answers
from engine.policy.fleet import GOOD, Fleet
from engine.policy.flights import BACKGROUND, Flight, Flights
from engine.policy.jobs import Job, Jobs
from engine.policy.overload import Overload
from engine.policy.rules import Key
from engine.policy.semantic import SemanticEntry
from engine.policy.trip import Trip
from engine.units import ms_to_ns


class Background:
    """Speaks through the gateway's outbox."""

    def __init__(
        self, config: GatewayConfig, flights: Flights, fleet: Fleet, answers: Answers, overload: Overload,
        outbox: list[GatewayAction],
    ) -> None:
        self.jobs = Jobs()
        self._config, self._flights, self._fleet, self._answers = config, flights, fleet, answers
        self._overload, self._outbox = overload, outbox
        self._audited: dict[int, SemanticEntry] = {}  # rid -> what served it; of jobs that wait or run
        self._running: dict[int, int] = {}  # sid -> until when it is waited for
        self._stopped = False

    def next_ns(self) -> int | None:
        """When the next job's time is up."""
        return min(self._running.values(), default=None)

    def audit(self, now_ns: int, trip: Trip, entry: SemanticEntry, tier: Tier) -> None:
        """This hit is to be computed anew and compared."""
        cosine = trip.cosine_millionths or 0
        self._audited[trip.ask.rid] = entry
        since = self._answers.invalidations.number
        self._offer(now_ns, Job("audit", trip.ask, entry.key, entry.answer_id, entry.source, tier, cosine, since))

    def refresh(self, now_ns: int, trip: Trip) -> None:
        """What it got is past its time to live: to be renewed, once."""
        if not self.jobs.renews(trip.key) and not self._renews(trip.ask):
            self._offer(now_ns, Job("refresh", trip.ask, tier="exact", source=trip.source))

    def _offer(self, now_ns: int, job: Job) -> None:
        self._outbox.insert(0, Hold(job.ask.rid))  # before the answer, with which the driver lets go of it
        if (dropped := self.jobs.offer(job)) is not None:
            self._close(now_ns, dropped, None)
        if self._stopped:
            self.stop(now_ns)

    def turn(self, now_ns: int) -> None:
        """Give up what takes too long; begin the next job, if one waits and it is calm."""
        self._give_up(now_ns)
        if not self.jobs.waits or self._overload.level:
            return None
        if any(name != BACKGROUND for name in self._fleet.pressures.oldest_ns()):
            return None
        job = self.jobs.next()
        if job is None:
            return None
        if job.kind == "refresh" and self._is_renewed(now_ns, job):
            self.jobs.take()
            self.jobs.end(job, done=False)
            return self._close(now_ns, job, None)
        seat = self._fleet.take(now_ns, job.ask)
        if seat is None:
            return None  # it waits until a replica is there
        self.jobs.take()
        cls = self._config.classes[job.ask.traffic_class]
        renews = job.kind == "refresh"
        question = self._question(job) if renews and self._config.semantic.coalesce else None
        flight = self._flights.lead(
            job.ask, job.ask.exact_key if renews else b"", PRIORITY["sheddable"], now_ns, seat,
            self._answers.invalidations.number, self._answers.tags_of(job.ask), question, job,
        )
        self._fleet.sent(flight, job.ask)
        self._running[flight.sid] = now_ns + ms_to_ns(cls.timeout_ms)
        self._outbox.append(flight.ticket(now_ns + cls.start_within_ns))
        return None

    def _question(self, job: Job) -> Key | None:
        """Its question, if similar ones are answered from it: then they get the new answer too."""
        question = job.ask.hard_key, job.ask.text_key
        return question if self._answers.semantic.holds(*question) else None

    def _give_up(self, now_ns: int) -> None:
        """Jobs whose time is up; no news to the breaker, for the lowest priority may starve at a good replica."""
        for sid in [sid for sid, until_ns in self._running.items() if until_ns <= now_ns]:
            del self._running[sid]
            flight = self._flights.get(sid)
            assert flight is not None and flight.job is not None, "give up: what runs is in flight"
            job = flight.job
            if self._flights.give_up(flight):
                self._fleet.deserted(now_ns, flight, late=False)
                self._outbox.append(Abort(sid))
            self.jobs.end(job, done=False)
            self._close(now_ns, job, None)

    def _is_renewed(self, now_ns: int, job: Job) -> bool:
        """By a client, or just being renewed by one, while the job waited."""
        return self._answers.exact.is_fresh(now_ns, job.ask.exact_key) or self._renews(job.ask)

    def _renews(self, ask: Arrive) -> bool:
        """A flight of a client's does; not one whose answer may be cut shorter, and so is not kept."""
        flight = self._flights.find(ask.exact_key, PRIORITY["sheddable"])
        return flight is not None and flight.ask.max_tokens >= ask.max_tokens

    def ended(self, now_ns: int, flight: Flight, ended: Ended) -> None:
        """A job's flight is over."""
        job = flight.job
        assert job is not None, "ended: it was a job's"
        del self._running[flight.sid]
        good = ended.reason in GOOD and bool(ended.answer_id)
        self.jobs.end(job, done=good)
        if not good:
            return self._close(now_ns, job, None)
        audits = self._config.semantic.enabled and bool(job.ask.text_key) and job.kind == "audit"
        has_vector = audits or self._question(job) is not None
        self._outbox.extend(self._answers.keep(now_ns, flight, has_vector, ended))
        if job.kind == "refresh":
            return self._close(now_ns, job, ended)
        self._answers.audit(job, self._audited[job.ask.rid], ended)
        return self.settle(now_ns)

    def placed(self, now_ns: int, event: Placed) -> None:
        """An answer's vector is known: comparisons may come out."""
        self._answers.placed(event)
        self.settle(now_ns)

    def settle(self, now_ns: int) -> None:
        """Comparisons that have come out: of audits they go into the ledger."""
        for outcome in self._answers.outcomes():
            if outcome.open.job is not None:
                self._close(now_ns, outcome.open.job, outcome.open.ended, outcome.right)

    def stop(self, now_ns: int) -> None:
        """Nothing more is begun."""
        self._stopped = True
        for job in self.jobs.clear():
            self._close(now_ns, job, None)

    def check(self) -> None:
        """Invariants."""
        self.jobs.check()
        flying = {flight.sid for flight in self._flights.open() if flight.job is not None}
        assert self._running.keys() == flying, "jobs: each that runs is in flight, and waited for until then"
        assert len(flying) == self.jobs.stats().open, "jobs: a slot for each that runs, and no other"

    def _close(self, now_ns: int, job: Job, ended: Ended | None, right: bool | None = None) -> None:
        ask = job.ask
        self._audited.pop(ask.rid, None)
        self._outbox.append(Release(ask.rid))
        self._outbox.append(
            Record(
                BackgroundRecord(
                    now_ns, job.kind, ask.request_id, ask.traffic_class, ended is not None, right, job.tier,
                    job.source, job.cosine_millionths if job.kind == "audit" else None,
                    ended.computed_tokens if ended else 0, ended.output_tokens if ended else 0,
                )
            )
        )

"""What a gateway remembers of one request while it is on its way, and the row it leaves behind."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

from msgspec.structs import replace

from engine.config import ClassConfig
from engine.events import (
    Arrive,
    Attach,
    Ended,
    FindSimilar,
    FirstToken,
    Outcome,
    ReplicaBack,
    RequestRecord,
    Similar,
    Submit,
    Tier,
    Wake,
)
from engine.policy.breaker import BreakerStats
from engine.policy.exact import ExactStats
from engine.policy.fleet import FleetStats
from engine.policy.flights import Flight, FlightStats
from engine.policy.jobs import JobStats
from engine.policy.limiter import LimiterStats
from engine.policy.overload import OverloadStats
from engine.policy.semantic import Comparison, SemanticStats
from engine.values import Struct

Reply = Similar | FirstToken | Ended | ReplicaBack | Wake  # what a journey waits for
Journey = Generator[FindSimilar | Submit | Attach | None, Reply, None]
Look = Generator[FindSimilar, Reply, Similar | None]
Ride = Generator[Submit | Attach | None, Reply, Ended]
Wait = Generator[None, Reply, bool]


class Gone(Exception):
    """Thrown into a journey: the client has left."""


class Late(Exception):
    """Thrown into a journey: its time is up."""


@dataclass(slots=True, eq=False)
class Trip:
    """Mutable, owned by one Gateway."""

    ask: Arrive
    cls: ClassConfig
    key: bytes  # exact key, or b"" where the class is not answered from caches
    level: int  # on arrival
    reserved_tokens: int
    used_tokens: int = 0
    watched: bool = False  # its user's bucket holds the reservation too
    leads: bool = False
    replica: int | None = None
    retried: bool = False  # a replica died under it, and it was sent to another
    drawn: bool = False  # its second try has been paid for
    source: str = ""
    similar: Similar | None = None  # what was found, until it was judged
    ride: Flight | None = None  # of a similar question
    compare: tuple[Comparison, ...] = ()  # what its answer is to be held against
    has_vector: bool = False  # its question has a vector, or will have one: similar questions can find its answer
    cosine_millionths: int | None = None
    tier: Tier | None = None
    outcome: Outcome | None = None
    error_code: str | None = None
    first_ns: int | None = None
    predicted_ns: int | None = None  # when its first token was expected, when it was submitted
    end_ns: int = 0
    answer_id: str = ""
    output_tokens: int = 0
    cached_tokens: int = 0
    computed_tokens: int = 0
    queue_ns: int = 0
    preemptions: int = 0

    @property
    def most_tokens(self) -> int:
        """Of its answer, were it computed: what was asked for, or what its class is left with at the level it met."""
        cap = self.cls.brownout_max_tokens
        return min(self.ask.max_tokens, cap) if cap and self.level and self.cls.priority else self.ask.max_tokens

    def suits(self, flight: Flight) -> bool:
        """Whether a computation of the same, or of a similar question, may be as long as its own would be."""
        return flight.ask.max_tokens >= self.most_tokens

    def to_compute(self) -> Arrive:
        """What is submitted: as asked, but for the length."""
        most = self.most_tokens
        return self.ask if most == self.ask.max_tokens else replace(self.ask, max_tokens=most)

    @property
    def over(self) -> bool:
        """The client has its answer, its refusal, or is gone; only bookkeeping is left."""
        return self.outcome is not None

    def close(self, now_ns: int, outcome: Outcome) -> None:
        """The client's end of it."""
        assert self.outcome is None, "a request ends once"
        self.outcome, self.end_ns = outcome, now_ns

    def saw(self, ended: Ended) -> None:
        """The end of the flight it rode on; only the leader paid for the computation."""
        self.answer_id, self.output_tokens = ended.answer_id, ended.output_tokens
        if self.leads:
            self.cached_tokens, self.computed_tokens = ended.cached_tokens, ended.computed_tokens
            self.queue_ns, self.preemptions = ended.queue_ns, ended.preemptions

    def record(self) -> RequestRecord:
        """The row in the ledger."""
        assert self.outcome is not None, "a journey ends with an outcome"
        ask = self.ask
        return RequestRecord(
            request_id=ask.request_id, tenant=ask.tenant, traffic_class=ask.traffic_class, arrived_ns=ask.arrived_ns,
            outcome=self.outcome, level=self.level, tier=self.tier, error_code=self.error_code,
            prompt_tokens=ask.prompt_tokens, cached_tokens=self.cached_tokens, computed_tokens=self.computed_tokens,
            output_tokens=self.output_tokens, queue_ns=self.queue_ns, preemptions=self.preemptions,
            predicted_ttft_ns=None if self.predicted_ns is None else self.predicted_ns - ask.arrived_ns,
            ttft_ns=None if self.first_ns is None else self.first_ns - ask.arrived_ns,
            e2e_ns=self.end_ns - ask.arrived_ns, replica=self.replica, answer_id=self.answer_id,
            cosine_millionths=self.cosine_millionths, source="" if self.leads else self.source,
        )


class GatewayStats(Struct):
    """What a plot or a metrics page wants to know."""

    arrived: int
    ended: int
    in_flight: int
    level: int
    limiter: LimiterStats
    exact: ExactStats
    semantic: SemanticStats
    flights: FlightStats
    fleet: FleetStats
    encoder: BreakerStats
    overload: OverloadStats
    jobs: JobStats

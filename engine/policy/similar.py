"""The part of a request's way on which similar questions are looked for, there or on their way, and judged.

Encoder and index are asked behind a breaker; late or away, they are a miss. From overload level 2 on only those are
looked up who make do with an approximation: the encoder has no time for the others.
"""

from __future__ import annotations

from collections.abc import Callable

from engine.config import GatewayConfig
from engine.events import Ended, FindSimilar, Similar, TextMarks, Tier
from engine.policy.answers import Answers
from engine.policy.background import Background
from engine.policy.breaker import Breaker, Verdict, spread
from engine.policy.flights import Flight, Flights
from engine.policy.overload import Overload
from engine.policy.replies import Replies
from engine.policy.rules import Key
from engine.policy.trip import Gone, Late, Look, Trip

ENCODER_SAYS: dict[str, Verdict] = {"ok": "ok", "late": "slow", "failed": "fail", "unfit": "ignored"}
BUSY_LEVEL = 2


class SimilarTier:
    """Of one gateway; ``now`` is its driver's clock as it last said."""

    def __init__(
        self, config: GatewayConfig, now: Callable[[], int], answers: Answers, flights: Flights, overload: Overload,
        replies: Replies, background: Background,
    ) -> None:
        self.encoder = Breaker(config.encoder_breaker, spread(config.index, config.encoder_breaker.open_jitter))
        self._config, self._now, self._answers, self._flights = config.semantic, now, answers, flights
        self._overload, self._replies, self._background = overload, replies, background

    def may_help(self, trip: Trip) -> bool:
        """Classes that allow it, single questions, deterministic answers."""
        if not self._config.enabled or trip.cls.caches != "semantic" or not (trip.key and trip.ask.text_key):
            return False
        return self._overload.level < BUSY_LEVEL or trip.cls.criticality == "sheddable"

    def look(self, trip: Trip) -> Look:
        """Ask for the nearest questions."""
        ask = trip.ask
        permit = self.encoder.acquire(self._now())
        if permit is None:
            return None
        try:
            similar = yield FindSimilar(ask.rid, ask.hard_key, ask.text_key, self._config.neighbours)
        except (Gone, Late):
            self.encoder.release(self._now(), permit, "cancelled")
            raise
        assert isinstance(similar, Similar), "look: only Similar answers FindSimilar"
        self.encoder.release(self._now(), permit, ENCODER_SAYS[similar.status])
        trip.has_vector = similar.status in ("ok", "late")
        return similar

    def answers(self, trip: Trip, relaxed: bool) -> bool:
        """Whether an answer was there, and given; one that is on its way becomes the trip's ride. Judged once."""
        similar, trip.similar = trip.similar, None
        if similar is None:
            return False
        found = self._answers.similar(self._now(), trip.ask, similar.neighbours, relaxed, self._flying(trip))
        trip.compare = found.compare
        if found.ride is not None:
            trip.ride = self._flights.asks(found.ride.key, trip.cls.priority)
            trip.cosine_millionths = found.ride.cosine_millionths
        if found.hit is None:
            return False
        self._replies.similar(self._now(), trip, found.hit)
        if found.hit.audit:
            tier: Tier = "approximate" if found.hit.approximate else "semantic"
            self._background.audit(self._now(), trip, found.hit.entry, tier)
        return True

    def _flying(self, trip: Trip) -> Callable[[Key], TextMarks | None]:
        """Marks of a question that is computed and that it may wait for. An answer in quarantine serves nobody yet."""

        def marks(key: Key) -> TextMarks | None:
            flight = self._flights.asks(key, trip.cls.priority)
            return flight.ask.marks if flight is not None and trip.suits(flight) else None

        return marks if self._config.coalesce and not self._config.quarantine else lambda key: None

    def rode(self, trip: Trip, flight: Flight, ended: Ended) -> None:
        """A similar question's answer served while it was made: by chance it is looked at like any hit."""
        entry = flight.question and self._answers.semantic.entry(flight.question)
        if entry and entry.answer_id == ended.answer_id and self._answers.semantic.is_audited(trip.ask):
            self._background.audit(self._now(), trip, entry, "coalesced")

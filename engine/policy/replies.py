"""The words with which a request ends: an answer from a cache, the class's last resort, or a code."""

from __future__ import annotations

from engine.cache_config import ExactConfig
from engine.config import GatewayConfig, LimiterConfig
from engine.events import Answer, EndReason, GatewayAction, Reject, Tier
from engine.policy.exact import Entry
from engine.policy.limiter import Limiter
from engine.policy.semantic import SemanticEntry, SemanticHit
from engine.policy.trip import Trip
from engine.units import S_NS, s_to_ns

WHY: dict[EndReason, tuple[str, int | None]] = {
    "failed": ("model_failed", None), "refused": ("model_failed", None), "lost": ("replica_lost", S_NS),
    "busy": ("upstream_busy", S_NS),
}
JITTERS = 4093  # a prime: what a draw's other uses read of it says nothing of this


def code_of(reason: EndReason) -> tuple[str, int | None]:
    """The code for a submission that brought no answer, and when it makes sense to come again."""
    return WHY.get(reason, ("deadline_exceeded", None))


class Replies:
    """Ends trips into the outbox of one gateway."""

    def __init__(self, config: GatewayConfig, outbox: list[GatewayAction]) -> None:
        rate = config.overload.fallback_rps
        self._fallbacks = Limiter(LimiterConfig(rate_rps=rate, burst=max(1.0, rate)), {})
        self._outbox = outbox
        self._exact: ExactConfig = config.exact
        self._jitter = round(config.retry.jitter_share * 1_000_000)
        self._jitter_least_ns = s_to_ns(config.retry.jitter_least_s) if self._jitter else 0

    def same(self, now_ns: int, trip: Trip, entry: Entry) -> bool:
        """From the exact cache. True: it is old enough to be renewed meanwhile."""
        age_ns = now_ns - entry.stored_ns
        fresh_ns = s_to_ns(self._exact.ttl_s)
        renew = fresh_ns < age_ns <= fresh_ns + s_to_ns(self._exact.revalidate_s)
        self._serve(now_ns, trip, "exact" if age_ns <= fresh_ns or renew else "approximate", entry)
        return renew

    def similar(self, now_ns: int, trip: Trip, hit: SemanticHit) -> None:
        """From the semantic cache."""
        trip.cosine_millionths = hit.cosine_millionths
        self._serve(now_ns, trip, "approximate" if hit.approximate else "semantic", hit.entry)

    def _serve(self, now_ns: int, trip: Trip, tier: Tier, entry: Entry | SemanticEntry) -> None:
        """An answer that another request has had."""
        trip.tier, trip.source, trip.first_ns = tier, entry.source, now_ns
        trip.leads = False  # it may have led a flight that brought nothing
        trip.output_tokens, trip.answer_id = entry.output_tokens, entry.answer_id
        trip.close(now_ns, "served")
        age_ns = now_ns - entry.stored_ns
        cosine = trip.cosine_millionths
        self._outbox.append(Answer(trip.ask.rid, tier, entry.answer_id, trip.level, age_ns, entry.source, cosine))

    def computed(self, now_ns: int, trip: Trip, tier: Tier, answer_id: str) -> None:
        """By the model, for it or for another."""
        trip.tier = tier
        trip.close(now_ns, "served")
        source = "" if trip.leads else trip.source
        self._outbox.append(
            Answer(trip.ask.rid, tier, answer_id, trip.level, 0, source, trip.cosine_millionths)
        )

    def last_resort(self, now_ns: int, trip: Trip, code: str, retry_after_ns: int | None) -> None:
        """The class's answer of last resort, where it has one and nothing was said yet; else the code."""
        may = trip.cls.fallback and trip.first_ns is None
        if not may or not self._fallbacks.take(now_ns, "fallback", 0).ok:
            return self.reject(now_ns, trip, code, retry_after_ns)
        trip.tier, trip.first_ns, trip.answer_id = "fallback", now_ns, fallback_id(trip.ask.traffic_class)
        trip.error_code = code  # why it came to this
        trip.close(now_ns, "served")
        self._outbox.append(Answer(trip.ask.rid, "fallback", trip.answer_id, trip.level))
        return None

    def reject(self, now_ns: int, trip: Trip, code: str, retry_after_ns: int | None) -> None:
        """A code, and when to come again."""
        retry_after_ns = self.later(retry_after_ns, trip.ask.draw)
        trip.error_code = code
        trip.close(now_ns, "failed" if code in ("model_failed", "replica_lost") else "rejected")
        self._outbox.append(Reject(trip.ask.rid, code, trip.level, retry_after_ns))

    def later(self, retry_after_ns: int | None, draw: int) -> int | None:
        """When to come again: never sooner than it makes sense, and not everybody at that moment."""
        if retry_after_ns is None:
            return None
        most_ns = max(self._jitter_least_ns, retry_after_ns * self._jitter // 1_000_000)
        return retry_after_ns + most_ns * (draw % JITTERS) // JITTERS


def fallback_id(traffic_class: str) -> str:
    """The answer id under which a driver keeps a class's fallback text."""
    return f"fallback:{traffic_class}"

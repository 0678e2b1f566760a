"""The limiter's one account of a gateway: requests on their way, and work that no machine schedules, from one balance.

A request reserves what it may take and is settled when it ended. What is answered beside the machines (embeddings) is
charged once: its cost is known before it starts. Both are refused in the same words.
"""

from __future__ import annotations

from collections.abc import Callable

from engine.events import Charge, Charged
from engine.policy.limiter import OF_SCOPE, Limiter, Verdict
from engine.policy.trip import Trip

Later = Callable[[int | None, int], int | None]  # (when to come again, a draw) -> the same, not for all at once


def reserve(limiter: Limiter, now_ns: int, trip: Trip) -> Verdict:
    """A request, with all that its answer may take. Who is refused has reserved nothing."""
    ask = trip.ask
    verdict = limiter.take(now_ns, ask.tenant, trip.reserved_tokens, ask.asker, ask.traffic_class)
    if not verdict.ok:
        trip.reserved_tokens = 0
    trip.watched = verdict.watched
    return verdict


def settle(limiter: Limiter, now_ns: int, trip: Trip) -> None:
    """It has ended: what it did not use goes back to whom it was taken from."""
    ask = trip.ask
    user = ask.asker if trip.watched else b""
    limiter.settle(now_ns, ask.tenant, trip.reserved_tokens, trip.used_tokens, user, ask.traffic_class)


def charge(limiter: Limiter, now_ns: int, asked: Charge, later: Later) -> Charged:
    """Once and for all, or not at all. It belongs to no class, so no class's cap holds for it."""
    verdict = limiter.take(now_ns, asked.tenant, asked.tokens, asked.asker)
    if verdict.ok:
        return Charged(asked.rid)
    return Charged(asked.rid, code_of(verdict), later(verdict.retry_after_ns, asked.draw))


def code_of(verdict: Verdict) -> str:
    """What a client is told of a refusal."""
    return OF_SCOPE.get(verdict.scope, "rate_limited")

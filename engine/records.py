"""What a gateway writes into the ledger: one row a request, and what else happened that a person will ask about.

Times are integer nanoseconds on the driver's clock; latencies are the gateway's own. Part of the seam: ``events.py``
names these too.
"""

from __future__ import annotations

from typing import Literal

from engine.values import Struct

Tier = Literal["exact", "coalesced", "semantic", "approximate", "fallback", "model"]
Outcome = Literal["served", "rejected", "failed", "cancelled"]


class RequestRecord(Struct):
    """One row a request. Latencies are the gateway's own, from ``arrived_ns``."""

    request_id: str
    tenant: str
    traffic_class: str
    arrived_ns: int
    outcome: Outcome
    level: int
    tier: Tier | None = None
    error_code: str | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    computed_tokens: int = 0
    output_tokens: int = 0
    queue_ns: int = 0
    ttft_ns: int | None = None
    e2e_ns: int = 0
    cosine_millionths: int | None = None
    source: str = ""  # the request that computed the answer, where another did
    predicted_ttft_ns: int | None = None  # what the gateway expected when it submitted this one
    preemptions: int = 0
    replica: int | None = None
    answer_id: str = ""


class LevelRecord(Struct):
    """The overload level moved, and the class whose waiting moved it."""

    at_ns: int
    level: int
    traffic_class: str = ""
    age_ns: int = 0


class BreakerRecord(Struct):
    """A breaker changed its state at ``at_ns``: closed, open, half_open."""

    at_ns: int
    boundary: str  # "encoder", or "replica-" and its number
    before: str
    after: str
    why: str  # failing, slow, hung, rested, recovered


class BackgroundRecord(Struct):
    """Work that no client waited for. ``audit``: a hit, computed anew and compared; ``refresh``: an answer renewed."""

    at_ns: int
    kind: Literal["audit", "refresh"]
    request_id: str  # whose hit it was
    traffic_class: str
    done: bool  # False: dropped, or it failed
    right: bool | None = None  # audit: both answers say the same; None = not known
    tier: Tier = "semantic"  # audit: of the hit
    source: str = ""
    cosine_millionths: int | None = None
    computed_tokens: int = 0
    output_tokens: int = 0


LedgerRecord = RequestRecord | LevelRecord | BreakerRecord | BackgroundRecord

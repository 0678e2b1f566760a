"""What the status page shows, as one object: the machine's own stats, the replicas' last words, and the last minute.

Names and numbers only: no tenant, no key, no text. Everything is read; nothing is decided here. Times in ms are made
from nanoseconds; a quantile is at most 2.5 % off (``recent.py``).
"""

from __future__ import annotations

from typing import get_args

import msgspec

from engine.config import Scenario
from engine.events import Tier
from engine.policy.trip import GatewayStats
from engine.service.driver import GatewayDriver
from engine.service.metrics import Metrics, shares
from engine.service.recent import NOT_SERVED, Latency
from engine.units import MS_NS, S_NS

RATE_S = 10  # a rate is the mean of so many whole seconds
LEVEL_WORDS = ("normal", "brown-out", "degraded", "shed", "emergency")


class Health(msgspec.Struct, frozen=True):
    """The answer of ``/healthz`` and ``/readyz``."""

    status: str


class TierLoad(msgspec.Struct, frozen=True):
    """Requests that ended so. ``per_second``: of the last 60 whole seconds, oldest first; ``rps``: of the last 10."""

    name: str
    rps: float
    per_second: tuple[int, ...]


class ClassState(msgspec.Struct, frozen=True):
    """One traffic class over the last minute; ``oldest_ms``: how long its oldest request waits now."""

    name: str
    criticality: str
    served: int
    not_served: int
    ttft_count: int
    ttft_p50_ms: float | None
    ttft_p95_ms: float | None
    slo_ttft_ms: int
    e2e_p50_ms: float | None
    e2e_p95_ms: float | None
    oldest_ms: float


class ReplicaState(msgspec.Struct, frozen=True):
    """A replica's last word, and its breaker. An upstream tells no blocks; one that is not up says nothing."""

    name: str
    up: bool
    running: int
    waiting: int
    free_blocks: int | None
    blocks: int | None
    breaker: str


class Status(msgspec.Struct, frozen=True):
    """How it goes at this moment. Shares are of the work that is let in, 0 to 1."""

    model: str
    up_s: float
    draining: bool
    level: int
    level_word: str
    share_standard: float
    share_sheddable: float
    in_flight: int
    retries_seen: int
    retries_refused: int
    limited: int
    encoder_breaker: str | None
    tiers: tuple[TierLoad, ...]
    classes: tuple[ClassState, ...]
    replicas: tuple[ReplicaState, ...]


class StatusMaker:
    """Makes it from what others know."""

    def __init__(
        self, scenario: Scenario, model_name: str, driver: GatewayDriver, metrics: Metrics, has_encoder: bool
    ) -> None:
        self._classes, self._model, self._driver, self._metrics = scenario.classes, model_name, driver, metrics
        self._graded, self._has_encoder = scenario.overload.graded, has_encoder
        self._upstreams = tuple(scenario.upstreams)
        self._blocks = None if scenario.upstreams else scenario.prefix.blocks
        self._since_ns = driver.now_ns()

    def look(self, draining: bool) -> Status:
        """As of now."""
        now_ns, machine = self._driver.now_ns(), self._driver.machine
        stats, oldest_ns = machine.stats(), machine.fleet.pressures.oldest_ns()
        standard, sheddable = shares(stats, self._graded)
        return Status(
            self._model, round((now_ns - self._since_ns) / S_NS, 1), draining, stats.level, LEVEL_WORDS[stats.level],
            standard, sheddable, stats.in_flight, stats.overload.retries.seen, stats.overload.retries.refused,
            stats.limiter.limited, stats.encoder.state if self._has_encoder else None,
            tuple(self._tier(now_ns, name) for name in (*get_args(Tier), NOT_SERVED)),
            tuple(self._class(now_ns, name, oldest_ns.get(name, now_ns)) for name in self._classes),
            tuple(self._replica(stats, n) for n in range(len(stats.fleet.breakers))),
        )

    def _tier(self, now_ns: int, name: str) -> TierLoad:
        per_second = self._metrics.recent.per_second(now_ns, name)
        return TierLoad(name, sum(per_second[-RATE_S:]) / RATE_S, per_second)

    def _class(self, now_ns: int, name: str, oldest_ns: int) -> ClassState:
        recent, cls = self._metrics.recent, self._classes[name]
        served, lost = recent.ended(now_ns, name)
        ttft, e2e = recent.latency(now_ns, ("ttft", name)), recent.latency(now_ns, ("e2e", name))
        return ClassState(
            name, cls.criticality, served, lost, ttft.number, *_ms(ttft), cls.slo_ttft_ms, *_ms(e2e),
            max(0, now_ns - oldest_ns) / MS_NS,
        )

    def _replica(self, stats: GatewayStats, n: int) -> ReplicaState:
        said, up = self._metrics.pressure(n), n in stats.fleet.up
        name = self._upstreams[n] if self._upstreams else f"replica-{n}"
        running, waiting = (said.running, sum(each.count for each in said.waiting)) if up else (0, 0)
        free = said.free_blocks if up and self._blocks else None
        return ReplicaState(name, up, running, waiting, free, self._blocks, stats.fleet.breakers[n].state)


def _ms(latency: Latency) -> tuple[float | None, float | None]:
    """p50 and p95, to three digits that mean something."""
    p50, p95 = (None if ns is None else float(f"{ns / MS_NS:.3g}") for ns in (latency.p50_ns, latency.p95_ns))
    return p50, p95

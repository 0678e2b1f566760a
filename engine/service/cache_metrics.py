"""What ``/metrics`` says of the response caches: sizes, hits, what was called off, and how often a hit was wrong.

The wrong share of the hits comes from audits: hits drawn by chance, computed anew when it was calm and compared. Its
interval is Clopper and Pearson's (1934), 95 %, true if audits are independent; the rule's own bound, where it has one,
is about all that asked, and holds at every moment.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from scipy.special import betaincinv

from engine.events import BackgroundRecord
from engine.policy.trip import GatewayStats

PREFIX = "doorbuster:"
AUDITED = ("semantic", "approximate", "coalesced")
VERDICTS = ("right", "wrong", "unknown")
TAIL = 0.025


class CacheMetrics:
    """Counts of one gateway since its start."""

    def __init__(self) -> None:
        self._audits: Counter[tuple[str, str]] = Counter()
        self._jobs: Counter[tuple[str, str]] = Counter()
        self._tokens = 0

    def append(self, record: BackgroundRecord) -> None:
        """A job has ended."""
        self._jobs[record.kind, "done" if record.done else "dropped"] += 1
        self._tokens += record.computed_tokens + record.output_tokens
        if record.kind == "audit" and record.done:
            verdict = "unknown" if record.right is None else "right" if record.right else "wrong"
            self._audits[record.tier, verdict] += 1

    def families(self, stats: GatewayStats) -> Iterator[Metric]:
        """Everything for the page."""
        yield from self._sizes(stats)
        yield from self._quality(stats)
        yield from self._background(stats)

    def _sizes(self, stats: GatewayStats) -> Iterator[Metric]:
        exact, semantic = stats.exact, stats.semantic
        entries = gauge("cache_entries", "Answers that are kept.", "cache")
        for name, count in (("exact", exact.entries), ("semantic", semantic.entries)):
            entries.add_metric([name], count)
        yield entries
        yield gauge("cache_bytes", "Bytes of answer text in the exact cache.", value=exact.bytes)
        yield gauge("cache_quarantined", "Entries that serve nobody but their own asker yet.",
                     value=semantic.quarantined)
        looks = counter("cache_lookups", "Lookups by what came of them.", "cache", "result")
        for cache, result, count in (
            ("exact", "hit", exact.hits), ("exact", "stale", exact.stale_hits), ("exact", "miss", exact.misses),
            ("semantic", "hit", semantic.hits), ("semantic", "approximate", semantic.approximate_hits),
            ("semantic", "ride", semantic.rides), ("semantic", "miss", semantic.misses),
        ):
            looks.add_metric([cache, result], count)
        yield looks
        gone = counter("cache_invalidations", "Entries called off before their time.", "cache")
        for name, count in (("exact", exact.invalidations), ("semantic", semantic.invalidations)):
            gone.add_metric([name], count)
        yield gone

    def _quality(self, stats: GatewayStats) -> Iterator[Metric]:
        audits = counter("wrong_hit_audits", "Hits computed anew and compared.", "tier", "verdict")
        share = gauge("wrong_hit_share", "Of the audited hits, the wrong ones; and the 95 % interval.", "tier", "end")
        for tier in AUDITED:
            for verdict in VERDICTS:
                audits.add_metric([tier, verdict], self._audits[tier, verdict])
            wrong, right = self._audits[tier, "wrong"], self._audits[tier, "right"]
            if wrong + right:
                low, high = interval(wrong, wrong + right)
                for end, value in (("value", wrong / (wrong + right)), ("low", low), ("high", high)):
                    share.add_metric([tier, end], value)
        yield from (audits, share)
        rule = stats.semantic.rule
        yield gauge("semantic_wrong_bound", "The rule's bound on the wrong share of all that asked; 1 = none.",
                     value=rule.bound_millionths / 1e6)
        if rule.threshold_millionths is not None:
            yield gauge("semantic_threshold", "Cosine from which on the rule serves.",
                         value=rule.threshold_millionths / 1e6)

    def _background(self, stats: GatewayStats) -> Iterator[Metric]:
        jobs = counter("background_jobs", "Audits and refreshes, by their end.", "kind", "end")
        for kind in ("audit", "refresh"):
            for end in ("done", "dropped"):
                jobs.add_metric([kind, end], self._jobs[kind, end])
        yield jobs
        yield gauge("background_waiting", "Jobs that wait for a calm moment.", value=stats.jobs.waiting)
        yield counter("background_tokens", "Tokens computed for no client.", value=self._tokens)


def interval(count: int, total: int) -> tuple[float, float]:
    """Both ends of the exact 95 % interval of a share; ``total`` > 0."""
    low = float(betaincinv(count, total - count + 1, TAIL)) if count else 0.0
    high = float(betaincinv(count + 1, total - count, 1 - TAIL)) if count < total else 1.0
    return low, high


def gauge(name: str, what: str, *labels: str, value: float | None = None) -> GaugeMetricFamily:
    """One value, or a family to add to by label."""
    return GaugeMetricFamily(PREFIX + name, what, value=value, labels=None if value is not None else labels)


def counter(name: str, what: str, *labels: str, value: float | None = None) -> CounterMetricFamily:
    """The same, never falling."""
    return CounterMetricFamily(PREFIX + name, what, value=value, labels=None if value is not None else labels)

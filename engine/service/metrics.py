"""``/metrics``: what happened, in Prometheus' text format, counted from facts that others have written down.

Counters and histograms follow the ledger's records, gauges the replicas' last ``Pressure`` and the gateway's stats, so
that each number can be computed again from a run's journal. vLLM's names and meanings where there is one, under
``doorbuster:``. A request counts when it has ended; nothing here is told of one on its way. Knows no HTTP and decides
nothing. Sources: Prometheus' text exposition format 0.0.4 (written by ``prometheus_client``); vLLM's metric names.
"""

from __future__ import annotations

import ipaddress
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from typing import get_args

from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.core import HistogramMetricFamily, Metric

from engine.config import Scenario
from engine.errors import STATUS_OF_CODE
from engine.events import BackgroundRecord, BreakerRecord, LedgerRecord, LevelRecord, Outcome, Pressure, Tier
from engine.model.wire import Output
from engine.policy.limiter import Scope
from engine.policy.overload import SHED
from engine.policy.trip import GatewayStats
from engine.service.cache_metrics import PREFIX, CacheMetrics, counter, gauge
from engine.service.recent import Recent
from engine.units import S_NS

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4.encode()
ADMISSION = (
    "rate_limited", "overloaded", "breaker_open", "upstream_busy", "replica_lost", "draining",
)  # said before any work was done
BREAKER_STATES = ("closed", "half_open", "open")
LOCAL_HOST = re.compile(rb"(localhost|127\.\d+\.\d+\.\d+|\[::1\])(:\d*)?", re.IGNORECASE)
FORWARDED = (b"x-forwarded-for", b"forwarded", b"x-real-ip", b"via")
BOUNDS_S = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 10.0, 20.0, 30.0, 60.0,
)  # from an answer out of a cache to the usual timeout
BOUNDS_NS = tuple(round(bound * S_NS) for bound in BOUNDS_S)


class Histogram:
    """Durations of one class."""

    __slots__ = ("counts", "sum_ns")

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS_NS) + 1)  # [i]: at most BOUNDS_NS[i] and more than the bound before; last: more
        self.sum_ns = 0

    def add(self, value_ns: int) -> None:
        """One more."""
        self.counts[bisect_left(BOUNDS_NS, value_ns)] += 1
        self.sum_ns += value_ns

    def buckets(self) -> list[tuple[str, float]]:
        """As Prometheus has them: cumulative."""
        out, total = [], 0
        for name, count in zip([*map(str, BOUNDS_S), "+Inf"], self.counts, strict=True):
            total += count
            out.append((name, float(total)))
        return out


class Metrics:
    """Counts of one gateway since its start. ``append`` is a ledger; ``hear`` wants all that replicas say."""

    def __init__(self, scenario: Scenario) -> None:
        self._classes = tuple(scenario.classes)
        self._blocks, self._prefix_on = scenario.prefix.blocks, scenario.prefix.enabled
        self._graded = scenario.overload.graded
        self._own = not scenario.upstreams  # nobody says how full another's cache is
        self._pressure = {
            index: Pressure(index, acked_sid=-1, running=0, free_blocks=self._blocks)
            for index in range(scenario.replicas)
        }  # a replica that has said nothing was never given anything
        self._ttft, self._e2e, self._queue = ({name: Histogram() for name in self._classes} for _ in range(3))
        self._missed = {(name, side): Histogram() for name in self._classes for side in ("early", "late")}
        self._tiers: Counter[tuple[str, str]] = Counter()
        self._outcomes: Counter[tuple[str, str, str]] = Counter()
        self._refused: Counter[str] = Counter()
        self._breaker_moves: Counter[tuple[str, str]] = Counter()
        self._caches = CacheMetrics()
        self.recent = Recent()
        self._level_changes = self._admitted_tokens = self._cached_tokens = 0
        self._generated_tokens = self._preemptions = 0

    # ------------------------------------------------------------ what it is told

    def hear(self, output: Output) -> None:
        """One turn of a replica."""
        for event in output.events:
            if isinstance(event, Pressure):
                self._pressure[event.replica] = event

    def append(self, record: LedgerRecord) -> None:
        """A request has ended, the level moved, or a breaker did."""
        if isinstance(record, LevelRecord):
            self._level_changes += 1
            return
        if isinstance(record, BreakerRecord):
            self._breaker_moves[record.boundary, record.after] += 1
            return
        if isinstance(record, BackgroundRecord):
            self._caches.append(record)
            return
        self.recent.append(record)
        name = record.traffic_class
        self._outcomes[record.outcome, record.error_code or "", name] += 1
        if record.tier is not None:
            self._tiers[record.tier, name] += 1
        if record.outcome == "served":
            self._e2e[name].add(record.e2e_ns)
        if record.ttft_ns is not None:
            self._ttft[name].add(record.ttft_ns)
            if record.predicted_ttft_ns is not None:
                error_ns = record.ttft_ns - record.predicted_ttft_ns
                self._missed[name, "late" if error_ns > 0 else "early"].add(abs(error_ns))
        if record.computed_tokens:  # it led a submission, and a step has held it
            self._queue[name].add(record.queue_ns)
            self._admitted_tokens += record.prompt_tokens
            self._cached_tokens += record.cached_tokens
            self._generated_tokens += record.output_tokens
            self._preemptions += record.preemptions

    def refused(self, code: str) -> None:
        """The ingress said no before the gateway heard of it."""
        self._refused[code] += 1

    def pressure(self, replica: int) -> Pressure:
        """The last word of a replica."""
        return self._pressure[replica]

    # ------------------------------------------------------------ the page

    def page(self, now_ns: int, stats: GatewayStats, oldest_ns: dict[str, int]) -> bytes:
        """``oldest_ns``: class to the instant since when its oldest request waits. A lost replica has no gauges."""
        return generate_latest(_Page(self._families(now_ns, stats, oldest_ns)))

    def _families(self, now_ns: int, stats: GatewayStats, oldest_ns: dict[str, int]) -> Iterator[Metric]:
        yield from self._replica_gauges({n: self._pressure[n] for n in stats.fleet.up})
        yield from self._gateway_gauges(now_ns, stats, oldest_ns)
        yield from self._token_counters()
        yield from self._request_counters(stats)
        yield from self._caches.families(stats)
        for name, per_class, what in (
            ("time_to_first_token_seconds", self._ttft, "From arrival to the first token, whoever gave it."),
            ("e2e_request_latency_seconds", self._e2e, "From arrival to the end of a served answer."),
            ("request_queue_time_seconds", self._queue, "From submission to the first step that held the request."),
        ):
            family = HistogramMetricFamily(PREFIX + name, what, labels=["traffic_class"])
            for traffic_class, histogram in per_class.items():
                family.add_metric([traffic_class], histogram.buckets(), histogram.sum_ns / S_NS)
            yield family
        error = HistogramMetricFamily(
            PREFIX + "ttft_prediction_error_seconds", "Between predicted and actual first token, and which side.",
            labels=["traffic_class", "side"],
        )
        for (traffic_class, side), histogram in self._missed.items():
            error.add_metric([traffic_class, side], histogram.buckets(), histogram.sum_ns / S_NS)
        yield error

    def _replica_gauges(self, pressure: dict[int, Pressure]) -> Iterator[Metric]:
        running = gauge("num_requests_running", "Requests that hold a slot.", "replica")
        waiting = gauge("num_requests_waiting", "Requests that no step has held yet.", "replica")
        usage = gauge("kv_cache_usage_perc", "Share of KV blocks in use, not counting evictable ones; 1 is all.",
                       "replica")
        for index, said in pressure.items():
            running.add_metric([str(index)], said.running)
            waiting.add_metric([str(index)], sum(per_class.count for per_class in said.waiting))
            if self._own:
                usage.add_metric([str(index)], 1 - said.free_blocks / self._blocks)
        yield from (running, waiting, usage)

    def _gateway_gauges(self, now_ns: int, stats: GatewayStats, oldest_ns: dict[str, int]) -> Iterator[Metric]:
        yield gauge("num_requests_in_gateway", "Requests on their way, riders included.", value=stats.in_flight)
        age = gauge("oldest_waiting_seconds", "Age of the oldest waiting submission: it moves the overload level.",
                     "traffic_class")
        for name in self._classes:
            age.add_metric([name], max(0, now_ns - oldest_ns.get(name, now_ns)) / S_NS)
        yield age
        yield gauge("overload_level", "0 normal, 1 brown-out, 2 degraded, 3 shed, 4 emergency.", value=stats.level)
        share = gauge("admission_share", "Of the work of this criticality, what overload control lets in; 1 is all.",
                       "criticality")
        for criticality, let_in in zip(("standard", "sheddable"), shares(stats, self._graded), strict=True):
            share.add_metric([criticality], let_in)
        yield share
        breaker = gauge("breaker_state", "0 closed, 1 half open, 2 open, when last asked.", "boundary")
        states = {f"replica-{n}": each.state for n, each in enumerate(stats.fleet.breakers)}
        for boundary, state in (states | {"encoder": stats.encoder.state}).items():
            breaker.add_metric([boundary], BREAKER_STATES.index(state))
        yield breaker
        ahead = gauge("router_ahead_tokens", "Predicted work ahead, in prompt tokens.", "replica")
        for n, tokens in enumerate(stats.fleet.router.ahead_tokens):
            ahead.add_metric([str(n)], tokens)
        yield ahead

    def _token_counters(self) -> Iterator[Metric]:
        yield counter("prompt_tokens", "Prompt tokens that replicas took in, cached ones included.",
                       value=self._admitted_tokens)
        yield counter("generation_tokens", "Tokens that replicas generated.", value=self._generated_tokens)
        queries = self._admitted_tokens if self._prefix_on else 0
        yield counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", value=queries)
        yield counter("prefix_cache_hits", "Of these, tokens found in it.", value=self._cached_tokens)
        yield counter("num_preemptions", "Preemptions of requests that have ended.", value=self._preemptions)

    def _request_counters(self, stats: GatewayStats) -> Iterator[Metric]:
        success = counter("request_success", "Requests that got an answer, of any tier.", "traffic_class")
        for name in self._classes:
            served = sum(n for (what, _, cls), n in self._outcomes.items() if what == "served" and cls == name)
            success.add_metric([name], served)
        yield success
        tiers = counter("requests_by_tier", "Requests that got an answer, by who gave it.", "tier", "traffic_class")
        for tier in get_args(Tier):
            for name in self._classes:
                tiers.add_metric([tier, name], self._tiers[tier, name])
        yield tiers
        ends = counter("requests_by_outcome", "Ended requests; a code on a served one says why it is a fallback.",
                        "outcome", "error_code", "traffic_class")
        for name in self._classes:
            for outcome in get_args(Outcome):
                codes = {code for what, code, cls in self._outcomes if (what, cls) == (outcome, name)}
                for code in sorted(codes | ({""} if outcome in ("served", "cancelled") else set())):
                    ends.add_metric([outcome, code, name], self._outcomes[outcome, code, name])
        yield ends
        rejections = counter("admission_rejections", "Requests that the gateway turned away unserved.", "reason")
        for reason in ADMISSION:
            turned = sum(n for (what, code, _), n in self._outcomes.items() if (what, code) == ("rejected", reason))
            rejections.add_metric([reason], turned)
        yield rejections
        limited = counter("limiter_rejections", "Refusals by a limit, by whose limit it was.", "scope")
        by_scope = dict(stats.limiter.by_scope)
        for scope in get_args(Scope):
            limited.add_metric([scope], by_scope.get(scope, 0))
        yield limited
        retries = stats.overload.retries
        yield counter("retries_seen", "Requests that were no first try, by the client's word.", value=retries.seen)
        yield counter("retries_refused", "Of these, refused in an overload for want of budget.", value=retries.refused)
        refusals = counter("ingress_refusals", "Requests refused before the gateway heard of them.", "reason")
        for code in STATUS_OF_CODE:
            if code in self._refused:
                refusals.add_metric([code], self._refused[code])
        yield refusals
        moves = counter("breaker_transitions", "Moves of a breaker, by the state it moved to.", "boundary", "state")
        for (boundary, state), count in sorted(self._breaker_moves.items()):
            moves.add_metric([boundary, state], count)
        yield moves
        yield counter("overload_level_changes", "Moves of the overload level.", value=self._level_changes)


def shares(stats: GatewayStats, graded: bool) -> tuple[float, float]:
    """Of standard and of sheddable work, the share that is let in: 0 to 1. Not graded, the level lets in all or none.
    """
    if not graded:
        return float(stats.level < SHED), float(stats.level < SHED - 1)
    millionths = stats.overload.share_millionths
    return min(millionths, 1_000_000) / 1e6, max(millionths - 1_000_000, 0) / 1e6


class _Page:
    """What ``generate_latest`` collects from: no registry, hence no global one."""

    def __init__(self, families: Iterator[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        return self._families


def is_local(client: tuple[str, int] | None, headers: list[tuple[bytes, bytes]]) -> bool:
    """Whether the other end of the connection is this machine itself, and speaks for nobody else.

    A page of somebody else's whose name was made to point here (DNS rebinding) asks under that name: not local.
    """
    if client is None or any(name in FORWARDED for name, _ in headers):
        return False
    if any(name == b"host" and LOCAL_HOST.fullmatch(value) is None for name, value in headers):
        return False
    try:
        address = ipaddress.ip_address(client[0])
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


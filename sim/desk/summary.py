"""One run in numbers: what summary.json holds, and the demo's verdict on a live run.

Conservation: ``offered`` = ``served`` + the sum of ``rejected``, which counts failed and cancelled requests too, under
their code. ``deflection_rate`` is the share of served requests that the model did not compute for themselves: exact,
coalesced, semantic, approximate. A fallback is no deflection but a degraded answer. Latencies are those of all served
requests, whatever tier: read a class's beside its ``degraded``.
"""

from __future__ import annotations

import msgspec
import pandas as pd

from engine.config import ClassConfig, Scenario
from engine.units import MS_NS, S_NS, ms_to_ns
from sim.desk.series import DEFLECTED, TIERS, equals, quantiles
from sim.desk.tables import demo_table
from sim.desk.wrong_hits import Rate, WrongHits, share, wrong_hits

__all__ = ["DEFLECTED", "Rate", "Summary", "Verdict", "demo_table", "good", "summarise", "verdict"]

DEGRADED = ("approximate", "fallback")
SHED = ("overloaded", "deadline_exceeded")
LEVELS = 5
NEEDED_LEVEL = 2  # the first at which sheddable work is kept from the model


class Quantiles(msgspec.Struct, frozen=True):
    """Milliseconds over ``n`` requests; p99 only where ``n`` carries it."""

    p50: float | None
    p95: float | None
    p99: float | None
    n: int


class ClassSummary(msgspec.Struct, frozen=True):
    """One traffic class. ``slo_attainment`` is of what was offered; ``None`` when nothing was."""

    offered: int
    served: int
    degraded: int
    shed: int
    slo_attainment: float | None
    ttft_ms: Quantiles
    e2e_ms: Quantiles


class Summary(msgspec.Struct, frozen=True):
    """summary.json, key by key (README, "Contracts")."""

    scenario: str
    kind: str
    seed: int
    duration_s: float
    offered: int
    served: int
    goodput_rps: float
    deflection_rate: float | None
    wrong_hit_rate: Rate
    tiers: dict[str, int]
    rejected: dict[str, int]
    classes: dict[str, ClassSummary]
    ttft_ms: Quantiles
    e2e_ms: Quantiles
    tpot_ms: Quantiles
    replicas: int
    utilisation: float | None
    level_seconds: dict[str, float]
    wrong_hits: WrongHits | None = None  # None: nothing was labelled


class Verdict(msgspec.Struct, frozen=True):
    """Did the sale show what it is to show? ``lines`` say what was seen, each beginning with "yes" or "no"."""

    ok: bool
    lines: list[str]

    @property
    def sentence(self) -> str:
        """The whole in one sentence."""
        if self.ok:
            return "The sale held: critical requests kept the model while sheddable traffic gave way."
        return "The sale did not hold: " + "; ".join(x.removeprefix("no: ") for x in self.lines if x.startswith("no"))


def summarise(
    frame: pd.DataFrame, scenario: Scenario, kind: str, seed: int, duration_s: float, levels: pd.DataFrame,
    utilisation: float | None, replicas: int = 1,
) -> Summary:
    """``frame`` and ``levels`` as ``frames.py`` makes them; ``utilisation`` is the share of time that steps ran."""
    served = frame[equals(frame["outcome"], "served")]
    tiers: dict[str, int] = {tier: int(equals(served["tier"], tier).sum()) for tier in TIERS}
    in_slo = good(frame, scenario.classes)
    others = [name for name in frame["traffic_class"].dropna().unique() if name not in scenario.classes]
    answered = served[equals(served["tier"], "model") & (served["output_tokens"] > 1).fillna(False).astype(bool)]
    per_token = (answered["e2e_ns"] - answered["ttft_ns"]) / (answered["output_tokens"] - 1)
    return Summary(
        scenario=scenario.name, kind=kind, seed=seed, duration_s=duration_s, offered=len(frame), served=len(served),
        goodput_rps=float(in_slo.sum()) / duration_s if duration_s else 0.0,
        deflection_rate=sum(tiers[t] for t in DEFLECTED) / len(served) if len(served) else None,
        wrong_hit_rate=_rate(served), tiers=tiers, rejected=reasons(frame),
        classes={name: _of_class(frame, name, in_slo) for name in (*scenario.classes, *others)},
        ttft_ms=_ms(served["ttft_ns"]), e2e_ms=_ms(served["e2e_ns"]), tpot_ms=_ms(per_token),
        replicas=replicas, utilisation=utilisation, level_seconds=_level_seconds(levels),
        wrong_hits=wrong_hits(frame),
    )


def good(frame: pd.DataFrame, classes: dict[str, ClassConfig]) -> pd.Series:
    """Mask: served, first token and end both within the class's SLO."""
    limits = {n: (ms_to_ns(c.slo_ttft_ms), ms_to_ns(c.slo_e2e_ms)) for n, c in classes.items()}
    ttft = frame["traffic_class"].map({n: first for n, (first, _) in limits.items()}).astype("Int64")
    e2e = frame["traffic_class"].map({n: end for n, (_, end) in limits.items()}).astype("Int64")
    within = (frame["ttft_ns"] <= ttft) & (frame["e2e_ns"] <= e2e)
    return equals(frame["outcome"], "served") & within.fillna(False).astype(bool)


def reasons(frame: pd.DataFrame) -> dict[str, int]:
    """How many requests were not served, by code; one without a code counts under its outcome. Most frequent first."""
    lost = frame[~equals(frame["outcome"], "served")]
    counts = lost["error_code"].fillna(lost["outcome"]).value_counts()
    return {str(code): int(n) for code, n in sorted(counts.items(), key=lambda item: (-item[1], str(item[0])))}


def verdict(frame: pd.DataFrame, levels: pd.DataFrame, scenario: Scenario) -> Verdict:
    """The demo's question to the live run: did overload come, did the sheddable give way, did the critical not?"""
    lines = [_overload_came(levels), _sheddable_gave_way(frame, scenario)]
    critical = [name for name, cls in scenario.classes.items() if cls.criticality == "critical"]
    lines += [line for name in critical for line in _critical_kept(frame[equals(frame["traffic_class"], name)], name)]
    if not critical:
        lines.append("no: the scenario has no critical class")
    return Verdict(all(line.startswith("yes") for line in lines), lines)


def _overload_came(levels: pd.DataFrame) -> str:
    top = int(levels["level"].max())
    if top < NEEDED_LEVEL:
        return f"no: the overload level never rose above {top} (level {NEEDED_LEVEL} was to be reached)"
    since = int(levels.loc[levels["level"] >= NEEDED_LEVEL, "at_ns"].iloc[0]) / S_NS
    return f"yes: the overload level reached {top}; level {NEEDED_LEVEL} after {since:.1f} s"


def _sheddable_gave_way(frame: pd.DataFrame, scenario: Scenario) -> str:
    names = [name for name, cls in scenario.classes.items() if cls.criticality == "sheddable"]
    mine = frame[frame["traffic_class"].isin(names)]
    fell = int((equals(mine["tier"], "fallback") & ~equals(mine["error_code"], "model_failed")).sum())
    shed = int(_shed(mine).sum())
    what = f"of {len(mine)} sheddable requests {fell} fell back and {shed} were shed"
    return f"yes: {what}" if fell + shed else f"no: {what}"


def _critical_kept(mine: pd.DataFrame, name: str) -> list[str]:
    if mine.empty:
        return [f"no: {name} (critical) had no request"]
    served = equals(mine["outcome"], "served")
    elsewhere = mine.loc[served & ~equals(mine["tier"], "model"), "tier"].fillna("nobody").value_counts()
    total = len(mine)
    lines = []
    if len(elsewhere):
        away = f"{elsewhere.sum()} of {total} answered by another tier than the model ({_list(elsewhere)})"
        lines.append(f"no: {name} (critical): {away}")
    if lost := reasons(mine):
        lines.append(f"no: {name} (critical): {sum(lost.values())} of {total} not served ({_list(lost)})")
    return lines or [f"yes: {name} (critical): all {total} answered by the model, none rejected"]


def _list(counts: dict[str, int] | pd.Series) -> str:
    return ", ".join(f"{key} {n}" for key, n in counts.items())


def _of_class(frame: pd.DataFrame, name: str, in_slo: pd.Series) -> ClassSummary:
    here = equals(frame["traffic_class"], name)
    mine = frame[here]
    served = mine[equals(mine["outcome"], "served")]
    return ClassSummary(
        offered=len(mine), served=len(served), degraded=int(served["tier"].isin(DEGRADED).sum()),
        shed=int(_shed(mine).sum()), slo_attainment=float(in_slo[here].mean()) if len(mine) else None,
        ttft_ms=_ms(served["ttft_ns"]), e2e_ms=_ms(served["e2e_ns"]),
    )


def _shed(frame: pd.DataFrame) -> pd.Series:
    return equals(frame["outcome"], "rejected") & frame["error_code"].isin(SHED)


def _ms(series_ns: pd.Series) -> Quantiles:
    in_ms = series_ns.astype("Float64") / MS_NS
    found = quantiles(in_ms)
    return Quantiles(found["p50"].value, found["p95"].value, found["p99"].value, int(in_ms.notna().sum()))


def _rate(served: pd.DataFrame) -> Rate:
    """Wrong among all labelled answers out of a cache, whatever tier."""
    labels = served["wrong_hit"].dropna()
    return share(int(labels.sum()), len(labels)).rate


def _level_seconds(levels: pd.DataFrame) -> dict[str, float]:
    held = levels["at_ns"].diff().shift(-1).fillna(0) / S_NS
    sums = held.groupby(levels["level"]).sum()
    top = max(LEVELS - 1, int(levels["level"].max()))
    return {str(level): float(sums.get(level, 0.0)) for level in range(top + 1)}

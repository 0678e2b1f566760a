"""How far two runs of the same arrivals agree, request by request: a live engine and its twin, or any two.

Requests are paired by id; decisions are compared exactly, latencies as ratios of a pair and as quantiles by class.
Their intervals come from a bootstrap over blocks of arrivals (circular: Politis and Romano 1992), since latencies in
one queue depend on one another. Distances between distributions are effect sizes: no p-value is given, its independence
does not hold. A third run of the same arrivals, live too, gives the floor: how far live is from live. Knows no file.

The pass marks below are written down before a run is judged; a figure that misses its mark stays where it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import msgspec
import numpy as np
import pandas as pd
from scipy import stats

from engine.config import ClassConfig
from engine.errors import UserError
from engine.units import MS_NS, S_NS
from sim.desk.bootstrap import (
    FLOOR_NS,
    Bootstrap,
    bootstrap_rule,
    quantile_intervals,
    wilson,
)
from sim.desk.comparison_words import ALL, Unit, verdict_line
from sim.desk.series import P99_FROM, TIERS, bin_s, equals, level_by_bin, p95_by_bin, rates
from sim.desk.summary import DEFLECTED, DEGRADED, SHED, Rate, good

BY_MODEL = "by the model"
METRICS = {"ttft": "ttft_ns", "e2e": "e2e_ns"}
QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}

# ---------------------------------------------------------------- the pass marks

MARKS = {
    "unpaired": 0.01, "disagreement": 0.05, "goodput": 0.03, "deflection": 0.03, "shed": 0.03,
    "e2e_p50": 0.05, "e2e_p95": 0.08, "ttft_p50": 0.08, "ttft_p95": 0.12,
}  # quantiles: by class, and over all; relative. Shares: absolute
FEWEST = {"p50": 10, "p95": 20, "p99": P99_FROM}  # fewer served in either run, and the quantile is not judged
RESOLUTION_MOST_NS = 10 * MS_NS
"""Two quantiles nearer to each other than the load generator's own p99 lateness, up to this much, count as equal: a
cached answer takes 3 ms, and 20 % of that are not the twin's to find."""

# ---------------------------------------------------------------- how it is measured

SLACK_NS = MS_NS  # the same arrival in two runs, after the runs' starts are laid over each other
STRAYS = 0.01  # share of pairs that may miss it



@dataclass(frozen=True, slots=True)
class Side:
    """One run: frame and levels of ``frames.py``. ``None`` where the run does not know (a client sees no level)."""

    frame: pd.DataFrame
    levels: pd.DataFrame | None
    utilisation: float | None
    duration_s: float


class Score(msgspec.Struct, frozen=True):
    """One figure: ``value`` says how far apart the two are (0 = not at all), in ``unit``; the rest is for reading.

    ``change`` has the sign (second run against the first), ``low`` and ``high`` are its 95 % interval. ``mark`` is what
    ``value`` may be at most, ``ok`` whether it is; both ``None`` where nothing is judged.
    """

    key: str
    section: str
    what: str
    unit: Unit
    value: float | None
    live: float | None = None
    twin: float | None = None
    change: float | None = None
    low: float | None = None
    high: float | None = None
    n: int | None = None
    mark: float | None = None
    ok: bool | None = None
    note: str = ""


class Floor(msgspec.Struct, frozen=True):
    """The same figure between two live runs, and how many times of it the judged pair is apart."""

    value: float
    times: float | None  # None where live does not differ from live


class Comparison(msgspec.Struct, frozen=True):
    """What ``compare --json`` prints; the first six keys are the contract."""

    decision_agreement: float
    errors: dict[str, float | None]  # METRIC_QUANTILE over all served; |second / first - 1|
    deflection_abs: float
    shed_abs: float
    noise_floor: dict[str, Floor]  # by the key of a score; empty without a floor run
    verdict: Literal["yes", "no"]
    lines: list[str]
    pairs: int
    only_first: int
    only_second: int
    agreement: Rate
    matrix: dict[str, dict[str, int]]  # decision of the first run, then of the second
    bootstrap: Bootstrap
    scores: list[Score]


def compare(first: Side, second: Side, classes: Mapping[str, ClassConfig], floor: Side | None = None) -> Comparison:
    """``first`` is the measure, as a rule the live run. Raises UserError where the runs had not the same arrivals."""
    pairs = pair(first.frame, second.frame)
    rule = bootstrap_rule(pairs)
    scores = list(_scores(first, second, pairs, classes, rule))
    below: dict[str, Floor] = {}
    if floor is not None:
        again = pair(first.frame, floor.frame)
        live = {s.key: s.value for s in _scores(first, floor, again, classes, None)}
        for score in scores:
            base = live.get(score.key)
            if score.value is not None and base is not None:
                below[score.key] = Floor(base, score.value / base if base else None)
    by_key = {s.key: s for s in scores}
    agreement = wilson(int((pairs["decision_a"] == pairs["decision_b"]).sum()), len(pairs))
    return Comparison(
        decision_agreement=agreement.value or 0.0,
        errors={name: by_key[f"{ALL}.{name}"].value for name in _metric_quantiles()},
        deflection_abs=by_key["deflection"].value or 0.0, shed_abs=by_key["shed"].value or 0.0, noise_floor=below,
        verdict="no" if any(s.ok is False for s in scores) else "yes",
        lines=[verdict_line(s, below.get(s.key)) for s in scores if s.ok is not None],
        pairs=len(pairs), only_first=len(first.frame) - len(pairs), only_second=len(second.frame) - len(pairs),
        agreement=agreement, matrix=_nested(confusion(pairs)), bootstrap=rule, scores=scores,
    )


# ---------------------------------------------------------------- pairs and decisions


def decisions(frame: pd.DataFrame) -> pd.Series:
    """What became of each request: the tier that answered, or the code it was turned away with."""
    lost = frame["error_code"].fillna(frame["outcome"])
    return frame["tier"].fillna("served").where(equals(frame["outcome"], "served"), lost).astype(str)


def pair(first: pd.DataFrame, second: pd.DataFrame) -> pd.DataFrame:
    """The requests of both runs in order of arrival; columns end in ``_a`` and ``_b``. Raises UserError."""
    columns = ["request_id", "traffic_class", "arrived_ns", "outcome", "tier", "ttft_ns", "e2e_ns", "replica"]
    a, b = (frame[columns].assign(decision=decisions(frame)) for frame in (first, second))
    pairs = a.merge(b, on="request_id", suffixes=("_a", "_b"), validate="one_to_one")
    if pairs.empty:
        raise UserError("the runs have no request id in common", fix="give two runs of the same workload and seed")
    shift = (pairs["arrived_ns_b"] - pairs["arrived_ns_a"]).astype("float64")
    moved = (shift - shift.median()).abs() > SLACK_NS
    other = (pairs["traffic_class_a"] != pairs["traffic_class_b"]) | moved
    if other.mean() > STRAYS:
        raise UserError(
            "the runs did not see the same arrivals",
            why=f"{int(other.sum())} of {len(pairs)} common request ids came at another time or in another class",
            fix="give runs of one scenario, profile, rate and seed",
        )
    return pairs.sort_values("arrived_ns_a", kind="stable", ignore_index=True)


def confusion(pairs: pd.DataFrame) -> pd.DataFrame:
    """Rows: decisions of the first run; columns: of the second; the same decisions in the same order on both."""
    found = {*pairs["decision_a"], *pairs["decision_b"]}
    names = [*(t for t in TIERS if t in found), *sorted(found.difference(TIERS))]
    table = pd.crosstab(pairs["decision_a"].astype(object), pairs["decision_b"].astype(object))
    return table.reindex(index=names, columns=names, fill_value=0).rename_axis(index=None, columns=None)


def ratios(pairs: pd.DataFrame, metric: str) -> pd.Series:
    """Second over first, pair by pair; missing where one of them was not served."""
    values = [_latency(pairs, METRICS[metric], s).clip(lower=FLOOR_NS) for s in ("a", "b")]
    return values[1] / values[0]


# ---------------------------------------------------------------- intervals


# ---------------------------------------------------------------- the scores


def _scores(
    first: Side, second: Side, pairs: pd.DataFrame, classes: Mapping[str, ClassConfig], rule: Bootstrap | None
) -> Iterator[Score]:
    """Every figure of the comparison, in reading order. ``rule`` None: no intervals."""
    names = [n for n in classes if (pairs["traffic_class_a"] == n).any()]
    names += [str(n) for n in pairs["traffic_class_a"].dropna().unique() if n not in classes]
    first_lateness = first.frame["lateness_ns"].astype("float64").quantile(0.99)
    resolution = 0.0 if np.isnan(first_lateness) else min(float(first_lateness), RESOLUTION_MOST_NS)
    everyone = pd.Series(True, index=pairs.index)
    groups = [(ALL, everyone), *((name, equals(pairs["traffic_class_a"], name)) for name in names)]

    lone = len(first.frame) + len(second.frame) - 2 * len(pairs)
    yield _judged("unpaired", "requests", "without a partner", "%", lone / (len(pairs) + lone), n=len(pairs) + lone)
    for name, mask in groups:
        mine = pairs[mask]
        agree = wilson(int((mine["decision_a"] == mine["decision_b"]).sum()), len(mine))
        apart = [None if x is None else 1 - x for x in (agree.value, agree.high, agree.low)]
        key = "disagreement" if name == ALL else f"disagreement.{name}"
        yield _judged(key, "decided differently", name, "%", apart[0], low=apart[1], high=apart[2], n=len(mine))
    yield from _amounts(first, second, pairs, classes)
    for name, mask in groups:
        yield from _quantile_scores(pairs, name, mask, resolution, rule)
    yield from _quantile_scores(pairs, BY_MODEL, everyone, resolution, None, only_model=True)
    same = pairs["decision_a"] == pairs["decision_b"]
    for what, chosen in (("decided alike", same), ("all served", everyone)):
        for name, mask in groups:
            yield from _paired(pairs[chosen & mask], f"{what}: {name}", f"paired.{what.split()[-1]}.{name}")
    yield from _paired(pairs[same & (pairs["decision_a"] == "model")], BY_MODEL, f"paired.alike.{BY_MODEL}")
    yield from _distances(pairs)
    yield from _curves(first, second, pairs)


def _amounts(
    first: Side, second: Side, pairs: pd.DataFrame, classes: Mapping[str, ClassConfig]
) -> Iterator[Score]:
    """Rates and shares over the paired requests; a rate is per second of the first run."""
    sides = [s.frame[s.frame["request_id"].isin(pairs["request_id"])] for s in (first, second)]
    rate = [float(good(frame, dict(classes)).sum()) / max(first.duration_s, 1e-9) for frame in sides]
    change = rate[1] / rate[0] - 1 if rate[0] else None if rate[1] else 0.0
    yield _judged("goodput", "requests", "within SLO, per second", "%", _size(change), *rate, change=change)
    for key, what, share in (
        ("deflection", "deflected, of served", _deflected), ("shed", "shed, of offered", _shed),
        ("degraded", "degraded, of offered", _degraded),
    ):
        a, b = (share(frame) for frame in sides)
        yield _judged(key, "requests", what, "pp", abs(b - a), a, b, change=b - a)
    if first.utilisation is not None and second.utilisation is not None:
        change = second.utilisation - first.utilisation
        yield _judged(
            "utilisation", "requests", "utilisation", "pp", abs(change), first.utilisation, second.utilisation,
            change=change,
        )


def _quantile_scores(
    pairs: pd.DataFrame, name: str, mask: pd.Series, resolution: float, rule: Bootstrap | None,
    only_model: bool = False,
) -> Iterator[Score]:
    for metric, column in METRICS.items():
        a, b = (_latency(pairs, column, s, only_model)[mask].to_numpy() for s in ("a", "b"))
        served = [values[~np.isnan(values)] for values in (a, b)]
        n = min(len(values) for values in served)
        at = list(QUANTILES.values())
        if rule is None:
            intervals: list[tuple[float, float] | None] = [None] * len(at)
        else:  # of the class alone, so its share of a block
            block = max(1, round(rule.block * len(a) / len(pairs)))
            intervals = quantile_intervals(a, b, at, block, rule.draws, rule.seed)
        for (point, q), interval in zip(QUANTILES.items(), intervals, strict=True):
            key, what = f"{name}.{metric}_{point}", f"{_WORDS[metric]}, {point}"
            if n == 0 or (point == "p99" and n < FEWEST[point]):
                yield Score(key, name, what, "%", None, n=n)
                continue
            x, y = (float(np.quantile(values, q)) for values in served)
            change = y / x - 1 if x else None if y else 0.0
            low, high = interval or (None, None)
            mark = MARKS.get(f"{metric}_{point}") if n >= FEWEST[point] and name != BY_MODEL else None
            near = abs(y - x) <= resolution
            ok = None if mark is None else near or _within(change, mark)
            saved = mark is not None and near and not _within(change, mark)
            note = f"{abs(y - x) / MS_NS:.1f} ms apart is less than the load generator's p99 lateness"
            yield Score(
                key, name, what, "%", _size(change), x / MS_NS, y / MS_NS, change, low, high, n, mark, ok,
                note if saved else "",
            )


def _paired(pairs: pd.DataFrame, what: str, key: str) -> Iterator[Score]:
    """|log ratio| of end to end, as factors: half of the pairs are nearer than the median, nine in ten than the p90."""
    logs = np.log(ratios(pairs, "e2e").dropna().to_numpy())
    for point, q in (("p50", 0.5), ("p90", 0.9)):
        value = float(np.exp(np.quantile(np.abs(logs), q)) - 1) if len(logs) else None
        middle = float(np.exp(np.median(logs)) - 1) if len(logs) and point == "p50" else None
        yield Score(f"{key}.{point}", "end to end, pair by pair", f"{what}, {point}", "x", value, change=middle,
                    n=len(logs))


def _distances(pairs: pd.DataFrame) -> Iterator[Score]:
    for only_model in (False, True):
        group = BY_MODEL if only_model else ALL
        for metric, column in METRICS.items():
            a, b = (_latency(pairs, column, s, only_model).dropna().to_numpy() for s in ("a", "b"))
            some = len(a) > 0 and len(b) > 0
            w1 = float(stats.wasserstein_distance(a, b) / a.mean()) if some and a.mean() else None
            what, section = _WORDS[metric], f"distance: {group}"
            yield Score(f"{group}.{metric}.ks", section, f"{what}, KS D", "", ks(a, b) if some else None, n=len(a))
            yield Score(f"{group}.{metric}.w1", section, f"{what}, W1 / mean", "", w1, n=len(a))


def ks(a: np.ndarray, b: np.ndarray) -> float:
    """Greatest distance between two empirical distributions: an effect size between 0 and 1."""
    grid = np.concatenate([a, b])
    below = [np.searchsorted(np.sort(values), grid, side="right") / len(values) for values in (a, b)]
    return float(np.abs(below[0] - below[1]).max())


def _curves(first: Side, second: Side, pairs: pd.DataFrame) -> Iterator[Score]:
    for name, (unit, table) in curves(first, second, pairs).items():
        gap = (table["second"] - table["first"]).abs().dropna()
        for how, value in (("mean", gap.mean()), ("max", gap.max())):
            found = float(value) if len(gap) else None
            yield Score(f"curve.{name}.{how}", "apart per bin of time", f"{name}, {how}", unit, found, n=len(gap))


def curves(first: Side, second: Side, pairs: pd.DataFrame) -> dict[str, tuple[Unit, pd.DataFrame]]:
    """``{name: (unit, at_s first second)}`` in bins of 1 s (``bin_s``), the second run laid over the first's start."""
    shift = int((pairs["arrived_ns_b"] - pairs["arrived_ns_a"]).astype("float64").median())
    moved = second.frame.assign(arrived_ns=second.frame["arrived_ns"] - shift)
    duration_s = max(first.duration_s, second.duration_s - shift / S_NS)
    width = bin_s(duration_s)
    per_s = [rates(frame, duration_s, width) for frame in (first.frame, moved)]
    at = per_s[0]["at_s"]

    def table(a: object, b: object) -> pd.DataFrame:
        return pd.DataFrame({"at_s": at, "first": a, "second": b})

    found: dict[str, tuple[Unit, pd.DataFrame]] = {
        name: ("/s", table(per_s[0][name], per_s[1][name])) for name in ("offered", "served")
    }
    p95 = [p95_by_bin(frame, len(at), width) for frame in (first.frame, moved)]
    found["p95 to first token"] = ("ms", table(*p95))
    if first.levels is not None and second.levels is not None:
        edges = np.append(at.to_numpy(), at.iloc[-1] + width).astype("float64")
        level = [level_by_bin(first.levels, edges, 0), level_by_bin(second.levels, edges, shift)]
        found["overload level"] = ("level", table(*level))
    return found


# ---------------------------------------------------------------- small parts

_WORDS = {"ttft": "first token", "e2e": "end to end"}


def _metric_quantiles() -> list[str]:
    return [f"{metric}_{point}" for metric in METRICS for point in QUANTILES]


def _judged(
    key: str, section: str, what: str, unit: Unit, value: float | None, live: float | None = None,
    twin: float | None = None, *, change: float | None = None, low: float | None = None, high: float | None = None,
    n: int | None = None,
) -> Score:
    """A score against its mark, if it has one; what cannot be said does not pass."""
    mark = MARKS.get(key)
    ok = None if mark is None else _within(value, mark)
    return Score(key, section, what, unit, value, live, twin, change, low, high, n, mark, ok)


def _within(value: float | None, mark: float) -> bool:
    """At its mark a figure passes, whatever the last bit of a float says; one that cannot be told does not."""
    return value is not None and abs(value) <= mark + 1e-9


def _size(value: float | None) -> float | None:
    return None if value is None else abs(value)


def _latency(pairs: pd.DataFrame, column: str, side: str, only_model: bool = False) -> pd.Series:
    """In ns, NaN where the side did not serve the request (``only_model``: not by the model)."""
    kept = equals(pairs[f"outcome_{side}"], "served")
    if only_model:
        kept &= equals(pairs[f"tier_{side}"], "model")
    return pairs[f"{column}_{side}"].astype("float64").where(kept)


def _deflected(frame: pd.DataFrame) -> float:
    served = frame[equals(frame["outcome"], "served")]
    return float(served["tier"].isin(DEFLECTED).mean()) if len(served) else 0.0


def _shed(frame: pd.DataFrame) -> float:
    return float((equals(frame["outcome"], "rejected") & frame["error_code"].isin(SHED)).mean())


def _degraded(frame: pd.DataFrame) -> float:
    return float((equals(frame["outcome"], "served") & frame["tier"].isin(DEGRADED)).mean())


def _nested(table: pd.DataFrame) -> dict[str, dict[str, int]]:
    return {
        str(row): {str(column): int(n) for column, n in table.loc[row].items() if n} for row in table.index
        if table.loc[row].any()
    }

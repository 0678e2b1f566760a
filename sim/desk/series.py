"""Numbers behind tables and figures: quantiles with intervals, rates and waiting over time, shares, stages.

Everything takes the frame of ``frames.py`` and returns a small frame or struct; figures draw these and nothing else,
so the table under a figure is what the figure shows. Quantiles are of type 7 (linear, the default of numpy and R).
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import msgspec
import numpy as np
import pandas as pd
from scipy import stats

from engine.events import Tier
from engine.units import MS_NS, S_NS

TIERS: tuple[Tier, ...] = ("exact", "coalesced", "semantic", "approximate", "fallback", "model")
DEFLECTED: tuple[Tier, ...] = ("exact", "coalesced", "semantic", "approximate")  # another request's answer
NOT_SERVED = "not served"
P99_FROM = 200  # fewer, and the p99 is the second largest value or less: noise with a name
QUEUE_BIN_NS = 250 * MS_NS
BINS_S = (1, 2, 5, 10, 30, 60, 120, 300, 600)
MOST_BINS = 240


class Quantile(msgspec.Struct, frozen=True):
    """A value and its 95 % interval; ``None`` where the data cannot say."""

    value: float | None
    low: float | None
    high: float | None


def quantiles(series: pd.Series, at: tuple[float, ...] = (0.5, 0.95, 0.99)) -> dict[str, Quantile]:
    """``{"p50": Quantile, ...}`` in the unit of ``series``; missing values do not count. p99 needs 200 of them.

    Intervals are between order statistics, by the binomial distribution of the number of values below a quantile: no
    shape is assumed, but independence is. Latencies in one queue are not independent: read them as the least width.
    """
    values = np.sort(series.dropna().to_numpy(dtype="float64"))
    n = len(values)
    out: dict[str, Quantile] = {}
    for q in at:
        if n == 0 or (q >= 0.99 and n < P99_FROM):
            out[f"p{q * 100:g}"] = Quantile(None, None, None)
            continue
        low, high = int(stats.binom.ppf(0.025, n, q)), int(stats.binom.ppf(0.975, n, q)) + 1  # ranks, from 1
        out[f"p{q * 100:g}"] = Quantile(
            float(np.quantile(values, q, method="linear")),
            float(values[low - 1]) if low >= 1 else None,
            float(values[high - 1]) if high <= n else None,
        )
    return out


def queue_age(frame: pd.DataFrame, bin_ns: int = QUEUE_BIN_NS) -> pd.DataFrame:
    """``at_ns traffic_class age_ns``: the greatest age that a waiting request of the class reached within each bin.

    A request waits from its arrival to the first step that held it (``queue_ns``), or in vain to its end. Those that
    were never submitted (answers from a cache, followers of a flight, refusals at the door) do not wait.
    """
    began, waited = _waiting(frame)
    ended = began + waited
    horizon = (frame["arrived_ns"] + frame["e2e_ns"].fillna(0)).max() if len(frame) else 0
    bins = max(1, math.ceil(int(horizon) / bin_ns))
    parts = []
    for name in sorted(frame["traffic_class"].dropna().unique()):
        mine = (frame["traffic_class"] == name).to_numpy(dtype=bool) & (waited > 0)
        s, e = began[mine], ended[mine]
        first, last = s // bin_ns, (e - 1) // bin_ns
        spans = last - first + 1
        of = np.repeat(np.arange(len(s)), spans)
        within = np.arange(len(of)) - np.repeat(np.cumsum(spans) - spans, spans)
        where = first[of] + within
        ages = np.minimum(e[of], (where + 1) * bin_ns) - s[of]
        peak = np.zeros(bins, dtype="int64")
        inside = (where >= 0) & (where < bins)
        np.maximum.at(peak, where[inside], ages[inside])
        parts.append(pd.DataFrame({"at_ns": np.arange(bins) * bin_ns, "traffic_class": name, "age_ns": peak}))
    empty = pd.DataFrame({"at_ns": [], "traffic_class": [], "age_ns": []})
    return pd.concat(parts, ignore_index=True) if parts else empty


def bin_s(duration_s: float) -> int:
    """A round bin width that keeps a timeline below ``MOST_BINS`` points."""
    return next((b for b in BINS_S if duration_s / b <= MOST_BINS), math.ceil(duration_s / MOST_BINS))


def rates(frame: pd.DataFrame, duration_s: float, width_s: int = 1) -> pd.DataFrame:
    """``at_s offered served rejected fallback``, per second; offered at arrival, the others at their end."""
    bins = max(1, math.ceil(duration_s / width_s))
    end_ns = frame["arrived_ns"] + frame["e2e_ns"].fillna(0)
    served = equals(frame["outcome"], "served")
    fallback = served & equals(frame["tier"], "fallback")

    def per_second(times_ns: pd.Series) -> np.ndarray:
        at = np.clip(times_ns.to_numpy(dtype="int64") // (width_s * S_NS), 0, bins - 1)
        return np.bincount(at, minlength=bins) / width_s

    return pd.DataFrame(
        {
            "at_s": np.arange(bins) * width_s, "offered": per_second(frame["arrived_ns"]),
            "served": per_second(end_ns[served]), "rejected": per_second(end_ns[~served]),
            "fallback": per_second(end_ns[fallback]),
        }
    )


def tier_counts(frame: pd.DataFrame, order: Iterable[str] = ()) -> pd.DataFrame:
    """Rows: classes, those of ``order`` first; columns: the six tiers, and ``not served``. A row adds up to offered."""
    kind = frame["tier"].where(equals(frame["outcome"], "served"), NOT_SERVED).fillna(NOT_SERVED)
    counts = pd.crosstab(frame["traffic_class"].astype(object), kind.astype(object))
    names = dict.fromkeys([*(name for name in order if name in counts.index), *counts.index])
    table = counts.reindex(index=list(names), columns=[*TIERS, NOT_SERVED], fill_value=0)
    return table.rename_axis(index=None, columns=None)


def slowest(frame: pd.DataFrame, n: int = 10) -> pd.DataFrame:
    """The ``n`` slowest served requests: ``request_id traffic_class tier queue_ms prefill_ms rest_ms e2e_ms``."""
    served = frame[equals(frame["outcome"], "served")].sort_values("e2e_ns", ascending=False, kind="stable").head(n)
    e2e = served["e2e_ns"].astype("float64") / MS_NS
    ttft = (served["ttft_ns"].astype("Float64").fillna(served["e2e_ns"]).astype("float64") / MS_NS).clip(upper=e2e)
    queue = (served["queue_ns"].fillna(0).astype("float64") / MS_NS).clip(upper=ttft)
    return pd.DataFrame(
        {
            "request_id": served["request_id"], "traffic_class": served["traffic_class"], "tier": served["tier"],
            "queue_ms": queue, "prefill_ms": ttft - queue, "rest_ms": e2e - ttft, "e2e_ms": e2e,
        }
    ).reset_index(drop=True)


def equals(column: pd.Series, value: str) -> pd.Series:
    """Equality as a plain mask: what is missing is not equal."""
    return (column == value).fillna(False).astype(bool)


def _waiting(frame: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """From when and how long each request waited for its first step, in ns."""
    queue = frame["queue_ns"].fillna(0)
    seen_first = frame["tier"].isna() & frame["ttft_ns"].notna()  # broken off after its first token
    held = (queue > 0) | equals(frame["tier"], "model") | seen_first
    waited = queue.where(held, frame["e2e_ns"].fillna(0)).where(frame["replica"].notna(), 0)
    return frame["arrived_ns"].to_numpy(dtype="int64"), waited.to_numpy(dtype="int64")


def turned_away(live: pd.DataFrame, twin: pd.DataFrame, classes: list[str]) -> pd.DataFrame:
    """``class what reason live twin``: rejected, failed, cancelled, or answered by the fallback, counted by reason.

    A class that lost nobody has a row that says so.
    """
    columns = ["class", "what", "reason", "live", "twin"]
    counts = {who: _lost_by_reason(frame) for who, frame in (("live", live), ("twin", twin))}
    keys = sorted({key for found in counts.values() for key in found})
    quiet = [(name, "none", "") for name in classes if name not in {key[0] for key in keys}]
    order = sorted([*keys, *quiet], key=lambda key: (classes.index(key[0]) if key[0] in classes else len(classes), key))
    rows = [(*key, counts["live"].get(key, 0), counts["twin"].get(key, 0)) for key in order]
    return pd.DataFrame(rows, columns=columns)


def _lost_by_reason(frame: pd.DataFrame) -> dict[tuple[str, str, str], int]:
    fell_back = equals(frame["tier"], "fallback")
    mine = frame[fell_back | ~equals(frame["outcome"], "served")]
    what = mine["outcome"].where(~fell_back[mine.index], "fallback")
    reason = mine["error_code"].fillna("unknown")
    counts: dict[tuple[str, str, str], int] = {}
    for key in zip(mine["traffic_class"].astype(str), what.astype(str), reason.astype(str), strict=True):
        counts[key] = counts.get(key, 0) + 1
    return counts


def p95_by_bin(frame: pd.DataFrame, bins: int, width_s: int) -> np.ndarray:
    """By the bin of arrival, in ms; NaN where nobody was served."""
    mine = frame[equals(frame["outcome"], "served") & frame["ttft_ns"].notna()]
    at = np.clip(mine["arrived_ns"].to_numpy(dtype="int64") // (width_s * S_NS), 0, bins - 1)
    found = pd.Series(mine["ttft_ns"].to_numpy(dtype="float64") / MS_NS).groupby(at).quantile(0.95)
    return found.reindex(range(bins)).to_numpy()


def level_by_bin(levels: pd.DataFrame, edges_s: np.ndarray, shift_ns: int) -> np.ndarray:
    """The mean level in each bin."""
    at = (levels["at_ns"].to_numpy() - shift_ns) / S_NS
    area = np.append(0.0, np.cumsum(np.diff(at) * levels["level"].to_numpy()[:-1]))
    return np.diff(np.interp(edges_s, at, area)) / np.diff(edges_s)

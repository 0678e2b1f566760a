"""Shares with exact intervals (Clopper and Pearson 1934). They hold for independent requests; repeats of one question
are not, nor are shuffles of the same rows: read pooled intervals as the least width."""

from __future__ import annotations

import msgspec
from scipy import stats


class Part(msgspec.Struct, frozen=True):
    """``count`` of ``total``, as a share with its two-sided 95 % interval; NaN where nothing was counted."""

    count: int
    total: int
    value: float
    low: float
    high: float


def part(count: int, total: int) -> Part:
    """A count with its interval."""
    if not total:
        return Part(count, total, float("nan"), float("nan"), float("nan"))
    interval = stats.binomtest(count, total).proportion_ci(0.95, "exact")
    return Part(count, total, count / total, float(interval.low), float(interval.high))


def upper(count: int, total: int, confidence: float = 0.95) -> float:
    """One-sided upper bound of a share; 1 where nothing was counted."""
    return 1.0 if count >= total else float(stats.beta.ppf(confidence, count + 1, total - count))

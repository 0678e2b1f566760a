"""Intervals for figures of one run, and of two runs that share their arrivals.

Wilson's interval for shares; for quantiles a bootstrap over blocks of arrivals (circular: Politis and Romano 1992),
since latencies in one queue depend on one another.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import msgspec
import numpy as np
import pandas as pd
from scipy import stats

from engine.units import MS_NS
from sim.desk.series import equals
from sim.desk.summary import Rate

DRAWS = 500
SEED = 20_100
FLOOR_NS = MS_NS // 10  # an answer from a cache may take no time at all in the twin: no ratio to that
FEWEST_PAIRS = 10  # for an interval
FEWEST_BLOCKS = 5


class Bootstrap(msgspec.Struct, frozen=True):
    """The rule: a block is twice the mean number of arrivals in a busy period, at most a fifth of all."""

    draws: int
    seed: int
    block: int
    busy_requests: float
    capped: bool  # the busy period asks for longer blocks than the run has room for: intervals are too narrow


def wilson(hits: int, n: int) -> Rate:
    """A share with Wilson's 95 % interval."""
    if n == 0:
        return Rate()
    interval = stats.binomtest(hits, n).proportion_ci(0.95, "wilson")
    return Rate(hits / n, float(interval.low), float(interval.high))


def bootstrap_rule(pairs: pd.DataFrame, draws: int = DRAWS, seed: int = SEED) -> Bootstrap:
    """From the first run's busy periods: they last while a request that needs the model is in the system."""
    n = len(pairs)
    computed = pairs["replica_a"].notna() | equals(pairs["tier_a"], "model")
    arrived = pairs["arrived_ns_a"].astype("float64")
    ends = (arrived + pairs["e2e_ns_a"].astype("float64").fillna(0)).where(computed, -np.inf).cummax()
    begins = computed & (arrived > ends.shift(fill_value=-np.inf))
    busy = n / max(1, int(begins.sum()))
    wanted, room = math.ceil(2 * busy), max(1, n // FEWEST_BLOCKS)
    return Bootstrap(draws, seed, min(wanted, room), busy, wanted > room)


def blocks(n: int, block: int, draws: int, seed: int) -> Iterator[np.ndarray]:
    """Indices of ``draws`` resamples of ``n`` things in a row: blocks with a random start, the end joined to the start.

    Common to both runs of a pair, so what the arrivals do to both cancels in the difference.
    """
    rng = np.random.default_rng(seed)
    for _ in range(draws):
        starts = rng.integers(0, n, size=-(-n // block))
        yield ((starts[:, None] + np.arange(block)) % n).ravel()[:n]


def quantile_intervals(
    first: np.ndarray, second: np.ndarray, at: list[float], block: int, draws: int = DRAWS, seed: int = SEED
) -> list[tuple[float, float] | None]:
    """95 % intervals of ``second``'s quantiles over ``first``'s, minus 1. Pairs in arrival order, NaN: not served."""
    if len(first) < FEWEST_PAIRS:
        return [None] * len(at)
    found = []
    for index in blocks(len(first), block, draws, seed):
        a, b = (values[index] for values in (first, second))
        a, b = a[~np.isnan(a)], b[~np.isnan(b)]
        if len(a) and len(b):
            found.append(np.quantile(b, at) / np.maximum(np.quantile(a, at), FLOOR_NS) - 1)
    if len(found) < draws // 2:
        return [None] * len(at)
    low, high = np.quantile(np.array(found), [0.025, 0.975], axis=0)
    return [(float(x), float(y)) for x, y in zip(low, high, strict=True)]

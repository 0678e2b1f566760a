"""How often a cache gave somebody another question's answer: of all served, of the hits, by tier, and of the traps.

wrong / all is what shoppers meet, and what the vCache paper bounds; wrong / hits is what a threshold does. Neither is
the other: a cache that is hardly ever used has a low first and may have a high second. Intervals are Clopper-Pearson's,
95 %: never too narrow, if requests are independent; repeats of one question are not, so read them as the least width.
"""

from __future__ import annotations

import msgspec
import pandas as pd
from scipy import stats

from sim.desk.series import DEFLECTED, equals


class Rate(msgspec.Struct, frozen=True):
    """A share with its 95 % interval; all ``None`` where nothing was labelled."""

    value: float | None = None
    low: float | None = None
    high: float | None = None


class Part(msgspec.Struct, frozen=True):
    """``count`` of ``total``, and that as a share."""

    count: int
    total: int
    rate: Rate


class Traps(msgspec.Struct, frozen=True):
    """Questions that look like a popular one and must not get its answer. ``wrong`` is of ``asked``."""

    asked: int
    from_cache: int
    wrong: Part


class WrongHits(msgspec.Struct, frozen=True):
    """``similar``: of the answers to another question than the one asked (those with a cosine, of whatever tier);
    a stale answer to the very same question is not among them. ``tiers``: of each tier's labelled hits."""

    served: Part
    similar: Part
    tiers: dict[str, Part]
    traps: Traps


def wrong_hits(frame: pd.DataFrame) -> WrongHits | None:
    """Counted in a frame that ``labels.py`` has been over; None when it has not."""
    if frame["trap"].isna().all():
        return None
    served = frame[equals(frame["outcome"], "served")]
    similar = served[served["tier"].isin(("semantic", "approximate", "coalesced")) & served["cosine"].notna()]
    trap = frame["trap"].fillna(False).astype(bool)
    trapped = served[trap[served.index]]
    return WrongHits(
        served=share(_wrong(served), len(served)),
        similar=share(_wrong(similar), int(similar["wrong_hit"].notna().sum())),
        tiers={tier: _of_tier(served, tier) for tier in DEFLECTED},
        traps=Traps(
            asked=int(trap.sum()), from_cache=int(trapped["tier"].isin(DEFLECTED).sum()),
            wrong=share(_wrong(trapped), int(trap.sum())),
        ),
    )


def share(count: int, total: int) -> Part:
    """A count with its interval."""
    if not total:
        return Part(count, total, Rate())
    test = stats.binomtest(count, total)
    interval = test.proportion_ci(0.95, "exact")
    return Part(count, total, Rate(float(test.statistic), float(interval.low), float(interval.high)))


def _wrong(frame: pd.DataFrame) -> int:
    return int(frame["wrong_hit"].fillna(False).sum())


def _of_tier(served: pd.DataFrame, tier: str) -> Part:
    mine = served.loc[equals(served["tier"], tier), "wrong_hit"].dropna()
    return share(int(mine.sum()), len(mine))

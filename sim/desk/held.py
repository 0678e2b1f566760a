"""What a sale at its height made of each class: counts of one sale, and several pooled.

Goodput counts what the model itself computed within both of the class's limits. Recommendations that are answered from
approximations are in time too, but no goodput of the model's. Latencies are kept one by one: a p99 is of all sales'.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
import pandas as pd

from engine.config import Scenario
from engine.events import LedgerRecord, LevelRecord, RequestRecord
from engine.units import MS_NS, S_NS, s_to_ns
from sim.twin.workload import profile_of

ALONE = "alone"  # below a live sale's folder: the engine that was asked its critical questions, with nobody else there
OFTEN_NS = 10 * S_NS


class Held(msgspec.Struct, frozen=True):
    """One sale. Shares are of the requests that arrived on the plateau; times in ms, of critical work by the model."""

    model_good: int  # computed by the model, within both limits
    model_late: int
    critical: int
    critical_good: int
    sheddable: int
    sheddable_answered: int
    offered: int
    good: int  # by whatever tier
    changes_s: list[float]  # of the level, from the start of the sale
    calm_after_s: float  # from the end of the decay to level 0 for good; below 0: before
    prompt_tokens: int = 0  # of what the model computed
    cached_tokens: int = 0  # of these, found in the prefix cache
    wait_ms: list[float] = []  # from submission to the first step, in the engine
    alone_wait_ms: list[float] = []  # the same, with nobody else there
    ttft_ms: list[float] = []
    e2e_ms: list[float] = []
    compared: int = 0  # critical answers of the whole sale, held against the same question's answer when it was alone
    same: int = 0

    @property
    def changes_in_10_s(self) -> int:
        """The most changes of the level in any ten seconds."""
        return max((sum(0 <= at - t < OFTEN_NS / S_NS for at in self.changes_s) for t in self.changes_s), default=0)


def held(
    frame: pd.DataFrame, records: Sequence[LedgerRecord], scenario: Scenario, profile: str, start_ns: int = 0,
    texts: tuple[dict[str, str], dict[str, str]] = ({}, {}), alone: Sequence[LedgerRecord] = (),
) -> Held:
    """From a run's frame and its records (``start_ns``: the sale's beginning on their clock).

    ``texts``: answers of critical requests by id of the sale, when they were alone and in the crowd. ``alone``: the
    records of those that were alone.
    """
    shape = profile_of(scenario, profile)
    begin_ns = s_to_ns(shape.base_s + shape.ramp_s)
    classes = scenario.classes
    frame = frame[frame["arrived_ns"].between(begin_ns, begin_ns + s_to_ns(shape.plateau_s), "left")]
    limits = {name: (cls.slo_ttft_ms * MS_NS, cls.slo_e2e_ms * MS_NS) for name, cls in classes.items()}
    ttft = frame["traffic_class"].map(lambda name: limits[name][0]).astype("Int64")
    e2e = frame["traffic_class"].map(lambda name: limits[name][1]).astype("Int64")
    good = ((frame["outcome"] == "served") & (frame["ttft_ns"] <= ttft) & (frame["e2e_ns"] <= e2e)).fillna(False)
    criticality = frame["traffic_class"].map(lambda name: classes[name].criticality)
    if "critical" not in set(criticality):  # where all are equal, the one that would matter most
        criticality = criticality.where(frame["traffic_class"] != next(iter(classes)), "critical")
    model, critical, sheddable = frame["tier"] == "model", criticality == "critical", criticality == "sheddable"
    if not sheddable.any():
        sheddable = frame["traffic_class"] == list(classes)[-1]
    judged = frame[critical & model]
    changes = [((r.at_ns - start_ns) / S_NS, r.level) for r in records if isinstance(r, LevelRecord)]
    changes = [(at, level) for at, level in changes if at > 0]
    before, after = texts
    return Held(
        model_good=int((model & good).sum()), model_late=int((model & ~good).sum()),
        critical=int(critical.sum()), critical_good=int((critical & good).sum()),
        sheddable=int(sheddable.sum()), sheddable_answered=int((sheddable & (frame["outcome"] == "served")).sum()),
        offered=len(frame), good=int(good.sum()),
        changes_s=[at for at, _ in changes], calm_after_s=_calm_s(changes) - shape.duration_s,
        prompt_tokens=int(frame.loc[model, "prompt_tokens"].sum()),
        cached_tokens=int(frame.loc[model, "cached_tokens"].sum()),
        wait_ms=_ms(judged["queue_ns"]),
        alone_wait_ms=[r.queue_ns / MS_NS for r in alone if isinstance(r, RequestRecord)],
        ttft_ms=_ms(judged["ttft_ns"]), e2e_ms=_ms(judged["e2e_ns"]),
        compared=len(before.keys() & after.keys()),
        same=sum(before[name] == after[name] for name in before.keys() & after.keys()),
    )


def p99(sales: Sequence[Held], field: str) -> float:
    """Of all sales' values together; NaN of none."""
    values = [ms for each in sales for ms in getattr(each, field)]
    return float(np.quantile(values, 0.99)) if values else float("nan")


def _calm_s(changes: list[tuple[float, int]]) -> float:
    """When the level came to 0 for good. Infinite: it never did."""
    if not changes:
        return 0.0
    at, level = changes[-1]
    return at if level == 0 else float("inf")


def _ms(series: pd.Series) -> list[float]:
    return [float(ns) / MS_NS for ns in series.dropna()]

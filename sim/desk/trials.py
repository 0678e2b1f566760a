"""Several settings on the same sales: which one keeps more requests within their SLO, and is that more than chance?

Every setting meets the same seeds (common random numbers), so two settings are compared sale by sale: the interval is
Student's, over the paired differences. Knows summaries, not how a sale is played.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import msgspec
import numpy as np
import pandas as pd
from scipy import stats

from engine.config import Scenario
from engine.errors import UserError
from sim.desk.summary import Summary

ALL = "all"
AS_IT_IS = "as it is"
KEPT = 0.005  # a setting may cost a critical class so much of its share within SLO, not more


class Trial(msgspec.Struct, frozen=True):
    """One setting on one sale. ``changes`` are ``section.key=value`` texts."""

    setting: str
    changes: tuple[str, ...]
    seed: int
    summary: Summary


class Choice(msgspec.Struct, frozen=True):
    """The setting that was chosen. ``gain``: share within SLO against ``AS_IT_IS``, with its 95 % interval."""

    setting: str
    changes: tuple[str, ...]
    seeds: int
    share: float
    gain: float
    low: float
    high: float

    def __str__(self) -> str:
        return (
            f"{self.setting}: {self.share:.1%} of all requests within their SLO, {100 * self.gain:+.1f} points "
            f"({100 * self.low:+.1f} to {100 * self.high:+.1f}, {self.seeds} sales)"
        )


def tidy(trials: Iterable[Trial]) -> pd.DataFrame:
    """``setting seed traffic_class within_slo``: shares of what was offered; ``traffic_class`` is ``ALL``, too."""
    rows: list[tuple[str, int, str, float]] = []
    for trial in trials:
        kept, offered = 0.0, 0
        for name, found in trial.summary.classes.items():
            if found.slo_attainment is not None:
                rows.append((trial.setting, trial.seed, name, found.slo_attainment))
                kept, offered = kept + found.slo_attainment * found.offered, offered + found.offered
        rows.append((trial.setting, trial.seed, ALL, kept / max(1, offered)))
    return pd.DataFrame(rows, columns=["setting", "seed", "traffic_class", "within_slo"])


def choose(trials: list[Trial], scenario: Scenario) -> Choice:
    """The best setting that costs no critical class anything; ``AS_IT_IS`` where no gain is more than chance.

    Raises UserError where a setting was not tried on the seeds of ``AS_IT_IS``.
    """
    shares = tidy(trials).pivot_table(index="seed", columns=["setting", "traffic_class"], values="within_slo")
    changes = {trial.setting: trial.changes for trial in trials}
    if AS_IT_IS not in changes or shares.isna().to_numpy().any():
        raise UserError("the settings were not tried on the same sales", fix=f"one of them must be {AS_IT_IS!r}")
    critical = [name for name, cls in scenario.classes.items() if cls.criticality == "critical"]
    best = Choice(AS_IT_IS, (), len(shares), float(shares[AS_IT_IS][ALL].mean()), 0.0, 0.0, 0.0)
    for setting, texts in changes.items():
        mine, base = shares[setting], shares[AS_IT_IS]
        costs = [float((base[name] - mine[name]).mean()) for name in critical if name in mine]
        low, gain, high = _paired((mine[ALL] - base[ALL]).to_numpy())
        if low > 0 and gain > best.gain and all(cost <= KEPT for cost in costs):
            best = Choice(setting, texts, len(shares), float(mine[ALL].mean()), gain, low, high)
    return best


def _paired(differences: np.ndarray) -> tuple[float, float, float]:
    """Low, mean, high; one sale alone says nothing about chance."""
    n, mean = len(differences), float(differences.mean())
    if n < 2:
        return -math.inf, mean, math.inf
    reach = float(stats.t.ppf(0.975, n - 1) * differences.std(ddof=1) / math.sqrt(n))
    return mean - reach, mean, mean + reach

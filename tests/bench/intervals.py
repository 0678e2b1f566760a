"""A ratio with an interval, from pairs that were measured next to each other."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

DRAWS = 4_000


class Ratio(NamedTuple):
    """Median of the pairs' ratios and a 95 % interval of it."""

    middle: float
    low: float
    high: float
    pairs: int

    def __str__(self) -> str:
        return f"{self.middle:.4f} (95 %: {self.low:.4f} to {self.high:.4f}, {self.pairs} pairs)"


def paired_ratio(values: list[float], baselines: list[float]) -> Ratio:
    """``value / baseline`` pair by pair; percentile bootstrap of the median over the pairs, fixed seed."""
    ratios = np.array(values) / np.array(baselines)
    drawn = np.random.default_rng(1).choice(ratios, (DRAWS, len(ratios)))
    low, high = np.quantile(np.median(drawn, axis=1), (0.025, 0.975))
    return Ratio(float(np.median(ratios)), float(low), float(high), len(ratios))

"""What a bench reports: a figure and its baseline from the same run."""

from __future__ import annotations

from typing import NamedTuple


class Figure(NamedTuple):
    """One JSON line. ``ratio`` is ``value / baseline_value``; whether more is better, the unit says."""

    value: float
    unit: str
    baseline: str
    baseline_value: float

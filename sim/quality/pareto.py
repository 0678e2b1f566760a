"""One picture: deflection against wrong / all, of every rule, the cache filling from empty."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from sim.quality.certified import BOUNDS, Point
from sim.quality.contest import Row

DARK, ORANGE, GREEN, BLUE, QUIET, RED = "#222222", "#E8710A", "#117733", "#1F5FBF", "#666666", "#C81E1E"
COLOURS = {"fixed": DARK, "calibrated": ORANGE, "adaptive": BLUE, "conformal": BLUE}  # others': green
STYLE: Any = {
    "font.size": 9, "axes.titlesize": 10, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": QUIET, "axes.axisbelow": True,
    "axes.grid": True, "grid.color": "#E6E6E6", "grid.linewidth": 0.6, "lines.linewidth": 1.4,
}  # fmt: skip
LEAST_PERCENT = 0.008  # nothing is plotted left of it
LEFT = (
    "calibrated, 0.25 %", "calibrated, 0.25 % + vetoes", "calibrated, 1.0 %", "adaptive, 1 %",
    "GPTCache's rule, cosine 0.60",
)  # names on this side of their points
LINE_PERCENT = 2.7  # of deflection: two names on one side are so far apart


def pareto(rows: Sequence[Row], curves: Mapping[str, Sequence[Point]], finding: str) -> Figure:
    """``rows``: points of one setting, with 95 % intervals; ``curves``: a rule at many thresholds, by name."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.4, 5.0), layout="constrained")
        axis = figure.subplots()
        for name, points in curves.items():
            kept = [point for point in points if point.wrong]
            axis.plot(
                [100 * point.wrong / point.asked for point in kept], [100 * point.deflected for point in kept],
                color=COLOURS.get(name.split()[0], GREEN), alpha=0.45, zorder=2,
            )  # fmt: skip
        for bound in BOUNDS:
            axis.axvline(100 * bound, color=RED, ls="--", lw=0.8, zorder=1)
        free = {True: -LINE_PERCENT, False: -LINE_PERCENT}  # by side: above the last name
        for row in sorted(rows, key=lambda row: row.deflected.value):
            colour = COLOURS.get(row.rule.split()[0].strip(","), GREEN)
            x, y = 100 * max(row.wrong_of_all.value, LEAST_PERCENT / 100), 100 * row.deflected.value
            spread = [[x - max(100 * row.wrong_of_all.low, LEAST_PERCENT)], [100 * row.wrong_of_all.high - x]]
            filled = "answers unknown" not in row.rule
            axis.errorbar(
                x, y, xerr=spread, fmt="o", ms=4.5, color=colour, lw=1, mfc=colour if filled else "white", zorder=3
            )
            left = row.rule in LEFT
            free[left] = max(y, free[left] + LINE_PERCENT)
            axis.annotate(
                row.rule, (x - spread[0][0] if left else x + spread[1][0], free[left]), xytext=(-4 if left else 4, 0),
                textcoords="offset points", ha="right" if left else "left", va="center", fontsize=7, color=colour,
            )  # fmt: skip
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
        axis.set_ylim(0, 100)
        axis.set_xlim(LEAST_PERCENT, 100)
        axis.set_xlabel("wrong, of all requests (log scale; bars: 95 % intervals; dashed: bounds of 0.25 % and 1.0 %)")
        axis.set_ylabel("deflected, of all requests")
        axis.set_title(finding)
        return figure

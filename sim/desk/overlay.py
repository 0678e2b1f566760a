"""Figures over several runs or settings: latencies laid over each other, and who was kept within the SLO by setting.

Two kinds of run keep their meaning by the line: live solid, twin dashed; colours tell the runs apart (Tol's "bright",
for any colour vision), the first one dark. Each figure takes tidy data and returns a ``Figure``.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from engine.config import Scenario
from engine.errors import UserError
from engine.units import MS_NS
from sim.desk.look import LIVE, LOST, QUIET, TWIN, WIDTH_IN, headed, log_times, plain, slo_line, styled
from sim.desk.report import TWIN_KINDS, RunView
from sim.desk.series import equals, quantiles
from sim.desk.trials import ALL, AS_IT_IS, Choice

COLOURS = (LIVE, "#4477AA", "#EE6677", "#228833", "#CCBB44", "#AA3377", "#66CCEE", "#777777")
POINTS = 400
FLOOR_MS = 0.1  # an answer from a cache may take no time at all in the twin; a log axis has no place for that
ROOM = 0.12  # of an axis, left and right of its marks


@styled
def latencies(runs: Mapping[str, RunView]) -> Figure:
    """Share of served requests below a latency, a line a run: a row a class, first token left, the end right.

    Raises UserError above eight runs: nobody tells nine lines apart.
    """
    if len(runs) > len(COLOURS):
        raise UserError(f"{len(runs)} runs in one figure", why=f"more than {len(COLOURS)} cannot be told apart")
    classes = next(iter(runs.values())).scenario.classes
    look = {
        name: (colour, "--" if view.summary.kind in TWIN_KINDS else "-")
        for (name, view), colour in zip(runs.items(), COLOURS, strict=False)
    }
    figure = Figure(figsize=(WIDTH_IN, 1.4 + 0.2 * len(runs) + 1.25 * len(classes)), layout="constrained")
    axes = figure.subplots(len(classes), 2, sharex="col", sharey=True, squeeze=False)
    for row, (name, cls) in zip(axes, classes.items(), strict=True):
        limits = (cls.slo_ttft_ms, cls.slo_e2e_ms)
        for axis, column, what, slo_ms in zip(row, ("ttft_ns", "e2e_ns"), ("first token", "end"), limits, strict=True):
            for run, view in reversed(list(runs.items())):
                values = _served_ms(view, name, column)
                colour, line = look[run]
                if len(values):
                    ranks = np.unique(np.linspace(1, len(values), min(len(values), POINTS)).round().astype(int))
                    x = np.maximum(values[ranks - 1], FLOOR_MS)
                    shares = np.append(0, ranks / len(values))
                    axis.step(np.append(x[0], x), shares, where="post", color=colour, ls=line)
            slo_line(axis.axvline, slo_ms)
            axis.annotate("SLO", (slo_ms, 0), xytext=(2, 2), textcoords="offset points", color="#C81E1E", fontsize=8)
            axis.set_title(f"{plain(name, 26)} to {what}", fontsize=8)
            log_times(axis)
            axis.set(ylim=(0, 1.02), yticks=(0, 0.5, 1), yticklabels=("0 %", "50 %", "100 %"))
    slos_ms = np.max([(c.slo_ttft_ms, c.slo_e2e_ms) for c in classes.values()], 0)
    for axis, slo_ms in zip(axes[-1], slos_ms, strict=True):
        axis.set_xlim(right=max(axis.get_xlim()[1], 2 * slo_ms))  # room for the last "SLO"
    axes[-1][0].set_xlabel("time from arrival to the first token")
    axes[-1][1].set_xlabel("time from arrival to the last token")
    figure.supylabel("share of served requests", fontsize=9)
    handles = [Line2D([], [], color=colour, ls=line) for colour, line in look.values()]
    figure.legend(handles, [plain(name, 88) for name in look], loc="outside lower left", handlelength=2.2)
    return headed(figure, latency_finding(runs), [])


@styled
def settings(shares: pd.DataFrame, scenario: Scenario, choice: Choice) -> Figure:
    """``trials.tidy``'s frame: a row a setting, a column a class; small dots are sales, large ones their means.

    The dotted line is ``AS_IT_IS``; the setting that was chosen is orange, the others grey.
    """
    names = list(dict.fromkeys(shares["setting"]))
    columns = [ALL, *(name for name in scenario.classes if name in set(shares["traffic_class"]))]
    figure = Figure(figsize=(WIDTH_IN, 1.5 + 0.3 * len(names)), layout="constrained")
    axes = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for axis, column in zip(axes, columns, strict=True):
        mine = shares[shares["traffic_class"] == column]
        percent = mine["within_slo"] * 100
        axis.axvline(percent[mine["setting"] == AS_IT_IS].mean(), color=QUIET, ls=":", lw=1)
        for y, name in enumerate(names):
            found = percent[mine["setting"] == name]
            colour = TWIN if name == choice.setting else LOST
            axis.plot(found, [y] * len(found), ".", color=colour, ms=4, alpha=0.6, mew=0)
            axis.plot(found.mean(), y, "o", color=colour, ms=7, mew=0)
        low, high = float(percent.min()), float(percent.max())
        reach = max(high - low, 4.0)
        axis.set(xlim=(low - ROOM * reach, min(high, 100) + ROOM * reach), ylim=(len(names) - 0.5, -0.5))
        axis.locator_params(axis="x", nbins=3, integer=True)
        kind = "all requests" if column == ALL else scenario.classes[column].criticality
        axis.set_title(kind if column == ALL else f"{plain(column, 18)}\n{kind}", fontsize=8)
        axis.tick_params(axis="y", length=0)
    axes[0].set_yticks(range(len(names)), [plain(name, 36) for name in names])
    figure.supxlabel("% of the offered requests served within their SLO", fontsize=9)
    return headed(figure, settings_finding(choice), [])


def settings_finding(choice: Choice) -> str:
    """The title, in words."""
    if choice.setting == AS_IT_IS:
        return f"No setting keeps more requests within their SLO than {choice.share:.0%}, beyond chance"
    return f"{plain(choice)[:1].upper()}{plain(str(choice), 200)[1:]}"


def latency_finding(runs: Mapping[str, RunView]) -> str:
    """The runs between which the end of the served differs most, class by class."""
    found: list[tuple[float, str]] = []
    for name in next(iter(runs.values())).scenario.classes:
        p95 = {run: quantiles(pd.Series(_served_ms(view, name, "e2e_ns")))["p95"].value for run, view in runs.items()}
        known = {run: ms for run, ms in p95.items() if ms}
        if len(known) > 1:
            low, high = min(known, key=known.__getitem__), max(known, key=known.__getitem__)
            least, most = known[low] / 1000, known[high] / 1000
            words = f"from {least:.2f} s ({plain(low, 30)}) to {most:.2f} s ({plain(high, 30)})"
            found.append((known[high] / known[low], f"{plain(name)} differs most: p95 to the end {words}"))
    return max(found)[1] if found else "No class was served in two of the runs"


def _served_ms(view: RunView, name: str, column: str) -> np.ndarray:
    mine = view.frame[equals(view.frame["traffic_class"], name) & equals(view.frame["outcome"], "served")]
    return np.sort(mine[column].dropna().to_numpy(dtype="float64")) / MS_NS

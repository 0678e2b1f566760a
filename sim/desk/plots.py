"""The figures. Each takes tidy frames (``frames.py``), either run may be missing, and returns a matplotlib ``Figure``.

A title is the finding, computed from the data. Words stand beside what they name; a key stands only over bars that are
too narrow for words. Nothing touches pyplot's state, so figures need no closing. The look is ``look.py``'s.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeAlias

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from engine.config import ClassConfig, Scenario
from engine.units import MS_NS, S_NS
from sim.desk.look import (
    COLOUR_OF_RUN,
    DARK_TIERS,
    LOST,
    QUIET,
    SLO,
    STAGE_COLOURS,
    STAGE_WORDS,
    TIER_COLOURS,
    WIDTH_IN,
    headed,
    log_times,
    plain,
    slo_line,
    style,
    styled,
)
from sim.desk.series import bin_s, equals, quantiles, queue_age, rates, slowest, tier_counts
from sim.desk.tables import percent

__all__ = ["latency_ecdf", "style", "tiers_by_class", "timeline", "waterfall"]

FLOOR_MS = 0.1  # an answer from a cache may take no time at all in the twin; a log axis has no place for that
ECDF_POINTS = 400
LABEL_FROM_PERCENT = 7  # a narrower bar has no room for its number

Frame: TypeAlias = pd.DataFrame
Runs: TypeAlias = dict[str, pd.DataFrame]  # "live" before "twin"


@styled
def timeline(
    live: Frame | None, twin: Frame | None, live_levels: Frame | None, twin_levels: Frame | None,
    classes: Mapping[str, ClassConfig],
) -> Figure:
    """Load, overload level, age of the queue by class, and what was turned away, over one axis in seconds."""
    runs, levels = _runs(live, twin), _runs(live_levels, twin_levels)
    duration_s = max(frame["at_ns"].max() for frame in levels.values()) / S_NS
    width_s = bin_s(duration_s)
    per_s = {who: rates(frame, duration_s, width_s) for who, frame in runs.items()}
    ages = {who: queue_age(frame) for who, frame in runs.items()}
    heights = [1.3, 0.75, *[0.85] * len(classes), 1.0]
    figure = Figure(figsize=(WIDTH_IN, 0.9 + sum(heights)), layout="constrained")
    axes = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    load, level, *queues, lost = axes
    first = next(iter(per_s.values()))

    _steps(load, first["at_s"], first["offered"], width_s, QUIET, lw=1, ls=":")
    for who in reversed(runs):
        _steps(load, per_s[who]["at_s"], per_s[who]["served"], width_s, COLOUR_OF_RUN[who])
        level.step(levels[who]["at_ns"] / S_NS, levels[who]["level"], where="post", color=COLOUR_OF_RUN[who])
        total = per_s[who]["rejected"] + per_s[who]["fallback"]
        _steps(lost, per_s[who]["at_s"], total, width_s, COLOUR_OF_RUN[who], lw=1.1)
    load.set(title="offered (dotted) and served", ylabel="requests/s")
    level.set(title="overload level", ylabel="level")
    for axis, (name, cls) in zip(queues, classes.items(), strict=True):
        slo_s = cls.slo_ttft_ms / 1000
        for who in reversed(runs):
            mine = ages[who][ages[who]["traffic_class"] == name]
            axis.plot(mine["at_ns"] / S_NS, mine["age_ns"] / S_NS, color=COLOUR_OF_RUN[who])
        slo_line(axis.axhline, slo_s)
        axis.annotate("SLO", (1, slo_s), xycoords=("axes fraction", "data"), xytext=(3, 0), va="center",
                      textcoords="offset points", color=SLO, fontsize=8)
        axis.set(title=f"age of the oldest waiting: {plain(name)} ({cls.criticality})", ylabel="s")
    x, rejected = _stairs(first["at_s"], first["rejected"], width_s)
    fallback = _stairs(first["at_s"], first["fallback"], width_s)[1]
    lost.fill_between(x, rejected, step="post", color=LOST, alpha=0.6, lw=0)
    lost.fill_between(x, rejected, rejected + fallback, step="post", color=TIER_COLOURS["fallback"], alpha=0.6, lw=0)
    lost.set(title=f"{next(iter(runs))}: not served (grey) and fallbacks (purple); lines: sum", ylabel="requests/s")
    for axis in axes:
        axis.set_xlim(0, duration_s)
        axis.set_ylim(bottom=0)
        axis.yaxis.set_major_locator(MaxNLocator(3))
    top = max(3, *(int(frame["level"].max()) for frame in levels.values()))
    level.set(ylim=(-0.15, top + 0.3), yticks=range(top + 1))
    lost.set_ylim(top=max(1, lost.get_ylim()[1]))  # nothing lost is a flat line, not an axis of hundredths
    lost.set_xlabel("seconds since the start")
    figure.align_ylabels(axes)
    return headed(figure, _timeline_finding(runs, per_s, levels), list(runs))


@styled
def latency_ecdf(live: Frame | None, twin: Frame | None, scenario: Scenario) -> Figure:
    """Share of served requests below a latency: a row a class, time to first token left, end to end right."""
    runs, classes = _runs(live, twin), list(scenario.classes.values())
    figure = Figure(figsize=(WIDTH_IN, 1.1 + 1.25 * len(classes)), layout="constrained")
    axes = figure.subplots(len(classes), 2, sharex="col", sharey=True, squeeze=False)
    for row, (name, cls) in zip(axes, scenario.classes.items(), strict=True):
        limits = (cls.slo_ttft_ms, cls.slo_e2e_ms)
        for axis, column, what, slo_ms in zip(row, ("ttft_ns", "e2e_ns"), ("first token", "end"), limits, strict=True):
            values = {who: _served_ms(frame, name, column) for who, frame in runs.items()}
            for who in reversed(runs):
                axis.step(*_ecdf(values[who]), where="post", color=COLOUR_OF_RUN[who])
            slo_line(axis.axvline, slo_ms)
            axis.annotate("SLO", (slo_ms, 0), xytext=(2, 2), textcoords="offset points", color=SLO, fontsize=8)
            counts = ", ".join(f"{who} {len(found)}" for who, found in values.items())
            axis.set_title(f"{plain(name, 26)} to {what} (n: {counts})", fontsize=8)
            log_times(axis)
            axis.set(ylim=(0, 1.02), yticks=(0, 0.5, 1), yticklabels=("0 %", "50 %", "100 %"))
    for axis, slo_ms in zip(axes[-1], np.max([(c.slo_ttft_ms, c.slo_e2e_ms) for c in classes], axis=0), strict=True):
        axis.set_xlim(right=max(axis.get_xlim()[1], 2 * slo_ms))  # room for the last "SLO"
    axes[-1][0].set_xlabel("time from arrival to the first token")
    axes[-1][1].set_xlabel("time from arrival to the last token")
    figure.supylabel("share of served requests", fontsize=9)
    return headed(figure, _latency_finding(runs, scenario), list(runs))


@styled
def tiers_by_class(live: Frame | None, twin: Frame | None, order: Iterable[str] = ()) -> Figure:
    """Who answered, as shares of what was offered: a bar a class and run, live above twin; ``order`` of classes."""
    runs = _runs(live, twin)
    counts = {who: tier_counts(frame, order) for who, frame in runs.items()}
    names = list(dict.fromkeys(name for table in counts.values() for name in table.index))
    figure = Figure(figsize=(WIDTH_IN, 1.3 + len(names) * (0.2 + 0.3 * len(runs))), layout="constrained")
    axis = figure.subplots()
    y, ticks = 0.0, []
    for name in names:
        ticks.append(y + 0.5 * (len(runs) - 1))
        for who, table in counts.items():
            if name in table.index:
                _bar(axis, y, table.loc[name])
            axis.annotate(who, (0, y), xytext=(-3, 0), textcoords="offset points", ha="right", va="center",
                          fontsize=8, color=COLOUR_OF_RUN[who], weight="bold")
            y += 1
        y += 0.6
    axis.set_yticks(ticks, [plain(name, 26) for name in names])
    axis.tick_params(axis="y", length=0, pad=30)
    axis.set(xlim=(0, 100), ylim=(y - 1.0, -0.6), xlabel="% of the class's requests")
    axis.grid(axis="y", visible=False)
    axis.spines["left"].set_visible(False)
    present = [tier for tier in TIER_COLOURS if any(table[tier].sum() for table in counts.values())]
    axis.legend([Patch(color=TIER_COLOURS[tier]) for tier in present], present, ncols=len(present), loc="lower left",
                bbox_to_anchor=(-0.01, 1), borderpad=0.2)
    return headed(figure, _tier_finding(counts), [])


@styled
def waterfall(live: Frame, n: int = 10) -> Figure:
    """The slowest served requests, stage by stage."""
    rows = slowest(live, n)
    figure = Figure(figsize=(WIDTH_IN, 1.2 + 0.28 * max(len(rows), 1)), layout="constrained")
    axis = figure.subplots()
    if rows.empty:
        axis.set_axis_off()
        return headed(figure, "No request was served", [])
    stages = rows[["queue_ms", "prefill_ms", "rest_ms"]].set_axis(list(STAGE_COLOURS), axis=1)
    left, y = np.zeros(len(rows)), np.arange(len(rows))
    for stage, colour in STAGE_COLOURS.items():
        width = stages[stage].to_numpy() / 1000
        axis.barh(y, width, left=left, color=colour, height=0.72, label=STAGE_WORDS[stage])
        left = left + width
    labels = [f"{plain(r.request_id, 18)}  {plain(r.traffic_class, 16)}, {plain(r.tier)}" for r in rows.itertuples()]
    axis.set_yticks(y, labels)
    axis.set(xlim=(0, 1.1 * left.max() or 1), ylim=(len(rows) - 0.4, -0.6), xlabel="seconds since arrival")
    axis.grid(axis="y", visible=False)
    for at, end in zip(y, left, strict=True):
        axis.annotate(f"{end:.2f} s", (end, at), xytext=(3, 0), textcoords="offset points", va="center", fontsize=8)
    axis.legend(ncols=3, loc="lower left", bbox_to_anchor=(-0.01, 1), borderpad=0.2)
    shares = stages.sum() / max(rows["e2e_ms"].sum(), 1e-9)
    span = f"{left.min():.2f} to {left.max():.2f} s"
    most = f"{percent(shares.max(), '.0f')} of it in {shares.idxmax()}"
    return headed(figure, f"The {len(rows)} slowest served requests took {span}, {most}", [])


def _runs(live: Frame | None, twin: Frame | None) -> Runs:
    return {who: frame for who, frame in (("live", live), ("twin", twin)) if frame is not None}


def _stairs(at: pd.Series, values: pd.Series, width: float) -> tuple[np.ndarray, np.ndarray]:
    """Bins as points of a step line that reaches the end of its last bin."""
    x, y = at.to_numpy(dtype="float64"), values.to_numpy(dtype="float64")
    return np.append(x, x[-1] + width), np.append(y, y[-1])


def _steps(
    axis: Axes, at: pd.Series, values: pd.Series, width: float, colour: str, lw: float = 1.4, ls: str = "-"
) -> None:
    axis.step(*_stairs(at, values, width), where="post", color=colour, lw=lw, ls=ls)


def _ecdf(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sorted values against their rank; thinned evenly where there are more than a figure can show."""
    n = len(values)
    if n == 0:
        return np.array([]), np.array([])
    ranks = np.unique(np.linspace(1, n, min(n, ECDF_POINTS)).round().astype(int))
    x = np.maximum(values[ranks - 1], FLOOR_MS)
    return np.append(x[0], x), np.append(0, ranks / n)


def _served_ms(frame: Frame, name: str, column: str) -> np.ndarray:
    mine = frame[equals(frame["traffic_class"], name) & equals(frame["outcome"], "served")]
    return np.sort(mine[column].dropna().to_numpy(dtype="float64")) / MS_NS


def _bar(axis: Axes, y: float, counts: pd.Series) -> None:
    left, total = 0.0, max(int(counts.sum()), 1)
    for tier, n in counts.items():
        width = 100 * n / total
        if width:
            axis.barh(y, width, left=left, height=0.86, color=TIER_COLOURS[str(tier)])
        if width >= LABEL_FROM_PERCENT:
            ink = "white" if tier in DARK_TIERS else "#111111"
            axis.text(left + width / 2, y, f"{width:.0f} %", ha="center", va="center", fontsize=7, color=ink)
        left += width


def _timeline_finding(runs: Runs, per_s: Runs, levels: Runs) -> str:
    words = []
    for who, frame in runs.items():
        away = float((~equals(frame["outcome"], "served") | equals(frame["tier"], "fallback")).mean())
        words.append(f"{who} reached level {int(levels[who]['level'].max())} and turned away {percent(away, '.0f')}")
    peak = next(iter(per_s.values()))["offered"].max()
    return f"At a peak of {peak:.0f} requests per second, {'; '.join(words)} (fallbacks counted)"


def _latency_finding(runs: Runs, scenario: Scenario) -> str:
    """Of the class that came nearest to its TTFT SLO in the first run."""
    found: list[tuple[float, str]] = []
    for name, cls in scenario.classes.items():
        p95_ms = [quantiles(pd.Series(_served_ms(frame, name, "ttft_ns")))["p95"].value for frame in runs.values()]
        if p95_ms[0] is not None:
            said = ", ".join(f"{who} {ms / 1000:.2f} s" for who, ms in zip(runs, p95_ms, strict=True) if ms is not None)
            words = f"p95 to the first token: {said}, SLO {cls.slo_ttft_ms / 1000:g} s"
            found.append((p95_ms[0] / cls.slo_ttft_ms, f"{plain(name)} came nearest to its SLO; {words}"))
    return max(found)[1] if found else "No request was served"


def _tier_finding(counts: Runs) -> str:
    shares = {who: table["model"].to_numpy().sum() / max(table.to_numpy().sum(), 1) for who, table in counts.items()}
    said = " and ".join(f"{percent(share, '.0f')} of all requests ({who})" for who, share in shares.items())
    return f"The model answered {said}; the rest was reused, degraded or not served"

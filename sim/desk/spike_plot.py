"""The same sale under several overload controls, a column each: the load's fate, critical answers, the level."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from engine.config import Scenario
from engine.units import MS_NS, S_NS, s_to_ns
from sim.desk.frames import level_frame, read_run
from sim.desk.look import LOST, QUIET, SLO, TIER_COLOURS, TIMES_MS, headed, plain, slo_line, styled
from sim.desk.series import DEFLECTED
from sim.desk.summary import good
from sim.twin.workload import profile_of

FATES = {  # bottom to top
    "by the model, in time": TIER_COLOURS["model"], "from a cache, in time": TIER_COLOURS["exact"],
    "fallback": TIER_COLOURS["fallback"], "too late": SLO, "turned away": LOST,
}
COLUMN_IN, WIDTH_S = 4.6, 1.0
AFTER_S = 12.0  # the level comes back to 0 after the sale


def fate(frame: pd.DataFrame, scenario: Scenario) -> pd.Series:
    """Which of ``FATES`` each request met."""
    served, in_time = frame["outcome"] == "served", good(frame, scenario.classes)
    names = list(FATES)
    conditions = [~served, ~in_time, frame["tier"] == "model", frame["tier"].isin(DEFLECTED)]
    return pd.Series(np.select(
        [each.fillna(False).to_numpy(dtype="bool") for each in conditions], [names[4], names[3], *names[:2]], names[2],
    ), index=frame.index)


@styled
def side_by_side(folders: Mapping[str, Path], scenario: Scenario, profile: str) -> Figure:
    """``folders``: the name of each control and the run folder of its sale."""
    runs = {name: read_run(folder) for name, folder in folders.items()}
    shape = profile_of(scenario, profile)
    figure = Figure(figsize=(COLUMN_IN * len(runs), 6.6), layout="constrained")
    axes = figure.subplots(3, len(runs), sharex=True, sharey="row", squeeze=False, height_ratios=[2.2, 1.5, 0.8])
    end_ns = s_to_ns(shape.duration_s + AFTER_S)
    critical, cls = next(iter(scenario.classes.items()))
    words = []
    for column, (name, run) in enumerate(runs.items()):
        load, paid, level = axes[:, column]
        frame = run.frame[run.frame["arrived_ns"] >= 0]
        _stack(load, frame, fate(frame, scenario), shape.duration_s)
        load.set_title(plain(name, 60), weight="bold")
        mine = frame[frame["traffic_class"] == critical]
        answered = mine[mine["outcome"] == "served"]
        lost = mine[mine["outcome"] != "served"]
        paid.semilogy(answered["arrived_ns"] / S_NS, answered["e2e_ns"] / MS_NS, ".", ms=4, color=TIER_COLOURS["model"])
        paid.semilogy(lost["arrived_ns"] / S_NS, [scenario.classes[critical].timeout_ms] * len(lost), "x", ms=4,
                      color=LOST)
        slo_line(paid.axhline, cls.slo_e2e_ms)
        steps = level_frame(run.records, end_ns, run.start_ns)
        level.step(steps["at_ns"] / S_NS, steps["level"], where="post", color=QUIET)
        level.fill_between(steps["at_ns"] / S_NS, steps["level"], step="post", color=QUIET, alpha=0.25, lw=0)
        in_time = int((fate(mine, scenario) == "by the model, in time").sum())
        words.append(f"{plain(name, 60)}: {in_time} of {len(mine)} in time")
    axes[0, 0].set_ylabel("requests/s")
    axes[1, 0].set_ylabel(f"{plain(critical)}\nwhole answer")
    axes[1, 0].yaxis.set_major_formatter(FuncFormatter(lambda ms, _: TIMES_MS.get(ms, "")))
    axes[1, 0].annotate("SLO", (1, cls.slo_e2e_ms), color=SLO, fontsize=8, va="bottom", xytext=(2, 1),
                        textcoords="offset points")
    axes[2, 0].set(ylabel="level", ylim=(-0.2, 4.3), yticks=range(5))
    for axis in axes[2]:
        axis.set_xlabel("seconds since the start of the sale")
        axis.set_xlim(0, shape.duration_s + AFTER_S)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(FATES))
    return headed(figure, f"{plain(critical)} in the same sale, {'; '.join(words)}", [])


def _stack(axis: Axes, frame: pd.DataFrame, fates: pd.Series, duration_s: float) -> None:
    edges = np.arange(0, duration_s + WIDTH_S, WIDTH_S)
    at_s = frame["arrived_ns"].to_numpy(dtype="float64") / S_NS
    heights = [np.histogram(at_s[(fates == name).to_numpy()], edges)[0] / WIDTH_S for name in FATES]
    axis.stackplot(edges[:-1], heights, labels=list(FATES), colors=list(FATES.values()), step="post", lw=0)


"""Who computed, and whom the door trusted: each replica's or upstream's share of the work, and its breaker's states.

A router shows in the shares, a breaker in the bands: the two belong over one axis, since the one moves the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from engine.config import Scenario
from engine.events import BreakerRecord, LedgerRecord
from engine.units import S_NS
from sim.desk.look import WIDTH_IN, headed, plain, styled
from sim.desk.series import bin_s, equals
from sim.desk.tables import percent

COLUMNS = ["boundary", "from_ns", "to_ns", "state"]
STATE_COLOURS = {"closed": "#D9E6D9", "half_open": "#DDCC77", "open": "#CC6677"}
WORKER_COLOURS = ("#332288", "#88CCEE", "#117733", "#DDCC77", "#AA4499", "#44AA99", "#999933", "#CC6677")
CLOSED = "closed"


def breaker_frame(records: Iterable[LedgerRecord], duration_ns: int, start_ns: int = 0) -> pd.DataFrame:
    """``boundary from_ns to_ns state``: what each breaker that ever moved was, from 0 to ``duration_ns``."""
    moves: dict[str, list[tuple[int, str, str]]] = {}
    for r in records:
        if isinstance(r, BreakerRecord):
            moves.setdefault(r.boundary, []).append((r.at_ns - start_ns, r.before, r.after))
    rows: list[tuple[str, int, int, str]] = []
    for boundary, mine in sorted(moves.items()):
        since_ns, state = 0, mine[0][1]
        for at_ns, _, after in mine:
            rows.append((boundary, since_ns, min(max(at_ns, 0), duration_ns), state))
            since_ns, state = rows[-1][2], after
        rows.append((boundary, since_ns, duration_ns, state))
    return pd.DataFrame([row for row in rows if row[2] > row[1]], columns=COLUMNS)


def names_of(scenario: Scenario) -> dict[int, str]:
    """What the replicas are called: an upstream by its section's name."""
    return dict(enumerate(scenario.upstreams)) or {n: f"replica {n}" for n in range(scenario.replicas)}


def worth_showing(scenario: Scenario, breakers: pd.DataFrame) -> bool:
    """One replica whose breaker never moved is no choice and no news."""
    return scenario.replicas > 1 or bool(len(breakers))


def table(frame: pd.DataFrame, breakers: pd.DataFrame, scenario: Scenario) -> pd.DataFrame:
    """A row a boundary: requests that went to it last, those it computed, and how its breaker spent the time."""
    rows = []
    for boundary, name in _boundaries(breakers, scenario).items():
        mine = frame[frame["replica"] == int(boundary.rpartition("-")[2])] if boundary != "encoder" else frame[:0]
        states = breakers[breakers["boundary"] == boundary]
        held_s = ((states["to_ns"] - states["from_ns"]) / S_NS).groupby(states["state"]).sum()
        rows.append({
            "boundary": name, "requests": len(mine),
            "computed": int((equals(mine["outcome"], "served") & equals(mine["tier"], "model")).sum()),
            "opened, times": int((states["state"] == "open").sum()),
            "open, s": round(float(held_s.get("open", 0.0)), 2),
            "half-open, s": round(float(held_s.get("half_open", 0.0)), 2),
        })
    return pd.DataFrame(rows)


@styled
def figure(frame: pd.DataFrame, breakers: pd.DataFrame, scenario: Scenario, duration_ns: int) -> Figure:
    """Computed requests a second by replica, stacked; under them each boundary's breaker as a band."""
    bands = _boundaries(breakers, scenario)
    drawn = Figure(figsize=(WIDTH_IN, 2.6 + 0.28 * len(bands)), layout="constrained")
    work, trust = drawn.subplots(2, 1, sharex=True, height_ratios=[2.0, 0.28 * len(bands) + 0.1])
    computed = frame[equals(frame["outcome"], "served") & equals(frame["tier"], "model")]
    width_s = bin_s(duration_ns / S_NS)
    edges = np.arange(0, duration_ns / S_NS + width_s, width_s)
    names = names_of(scenario)
    heights = [
        np.histogram(computed.loc[computed["replica"] == n, "arrived_ns"].to_numpy(dtype="float64") / S_NS, edges)[0]
        / width_s for n in names
    ]
    colours = [WORKER_COLOURS[n % len(WORKER_COLOURS)] for n in names]
    work.stackplot(edges[:-1], heights, labels=[plain(name) for name in names.values()], colors=colours, step="post",
                   lw=0)
    work.set(title="computed, by where", ylabel="requests/s", xlim=(0, duration_ns / S_NS))
    work.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=min(4, len(names)))
    _bands(trust, breakers, bands, duration_ns)
    return headed(drawn, _finding(computed, breakers, names, bands), [])


def _boundaries(breakers: pd.DataFrame, scenario: Scenario) -> dict[str, str]:
    """Every replica's, and others whose breaker moved: boundary to its name for people."""
    found = {f"replica-{n}": name for n, name in names_of(scenario).items()}
    return found | {name: name for name in breakers["boundary"].unique() if name not in found}


def _bands(axis: Axes, breakers: pd.DataFrame, bands: Mapping[str, str], duration_ns: int) -> None:
    for row, boundary in enumerate(bands):
        states = breakers[breakers["boundary"] == boundary]
        spans = states[["from_ns", "to_ns", "state"]].to_numpy().tolist() or [[0, duration_ns, CLOSED]]
        for begin_ns, end_ns, state in spans:
            axis.broken_barh([(begin_ns / S_NS, (end_ns - begin_ns) / S_NS)], (row - 0.35, 0.7), lw=0,
                             facecolors=STATE_COLOURS[state])
    axis.set_yticks(range(len(bands)), [plain(name) for name in bands.values()])
    axis.set(title="breaker", ylim=(len(bands) - 0.4, -0.6), xlabel="seconds since the start")
    axis.grid(visible=False, axis="y")
    keys = [Patch(color=colour, label=state.replace("_", "-")) for state, colour in STATE_COLOURS.items()]
    axis.legend(handles=keys, loc="lower right", bbox_to_anchor=(1, 1), ncols=3)


def _finding(
    computed: pd.DataFrame, breakers: pd.DataFrame, names: Mapping[int, str], bands: Mapping[str, str]
) -> str:
    shares = ", ".join(
        f"{plain(name)} {percent(float((computed['replica'] == n).mean()), '.0f')}" for n, name in names.items()
    ) if len(computed) else "nobody anything"
    opened = breakers[breakers["state"] == "open"]
    words = [
        f"{plain(bands[boundary])}'s breaker was open for {(mine['to_ns'] - mine['from_ns']).sum() / S_NS:.1f} s"
        for boundary, mine in opened.groupby("boundary")
    ]
    return f"Computed by {shares}; {'; '.join(words) or 'no breaker opened'}"

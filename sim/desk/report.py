"""One offline HTML file about one or two runs: verdict, environment, numbers, figures with their tables, raw summaries.

The file stands alone: figures are inline SVG with text as outlines, there is no script, nothing is fetched. Class
names, codes and request ids come from outside and are escaped everywhere. Only lays out; what is measured and drawn is
said by ``tables.py`` and ``plots.py``.
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib as mpl
import msgspec
import numpy as np
import pandas as pd
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from engine.config import Scenario
from engine.units import MS_NS, S_NS
from sim.desk import boundaries, plots
from sim.desk.look import STYLE, take_heading
from sim.desk.page import CSS, GRID, PAGE
from sim.desk.series import P99_FROM, Quantile, bin_s, equals, quantiles, queue_age, rates, slowest, tier_counts
from sim.desk.summary import Summary, Verdict
from sim.desk.tables import NONE, Line, by_class, class_rows, milliseconds, overall, wrong_rows

NAME = "report.html"
MOST_ROWS = 120
TWIN_KINDS = ("sim", "twin")
ENV = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=False)


@dataclass(frozen=True, slots=True)
class RunView:
    """One run, as the report needs it: ``frame`` and ``levels`` from ``frames.py``."""

    summary: Summary
    frame: pd.DataFrame
    levels: pd.DataFrame
    scenario: Scenario
    breakers: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=boundaries.COLUMNS))  # boundaries.py


@dataclass(frozen=True, slots=True)
class _Part:
    heading: str
    finding: str
    names: list[str]
    caption: str
    svg: Markup
    table: pd.DataFrame


def write_report(
    folder: Path, live: RunView, twin: RunView | None, verdict: Verdict | None, card: Mapping[str, str],
    extra_tables: Mapping[str, pd.DataFrame] | None = None,
) -> Path:
    """``report.html`` below ``folder``; returns its path. A lone run of kind "sim" is shown as the twin that it is.

    Raises FileExistsError: a report never overwrites a report.
    """
    path = folder / NAME
    if path.exists():
        raise FileExistsError(path)
    text = render(live, twin, verdict, card, extra_tables or {})
    with path.open("x", encoding="utf-8") as file:
        file.write(text)
    return path


def render(
    live: RunView, twin: RunView | None, verdict: Verdict | None, card: Mapping[str, str],
    extra_tables: Mapping[str, pd.DataFrame],
) -> str:
    """The page as text."""
    alone = twin is None and live.summary.kind in TWIN_KINDS
    runs = {"twin": live} if alone else {"live": live} if twin is None else {"live": live, "twin": twin}
    a, b = runs.get("live"), runs.get("twin")
    main = live.summary
    pair = (a.summary if a else None, b.summary if b else None)
    data = {name: view.summary for name, view in runs.items()}
    return ENV.from_string(PAGE).render(
        title=f"{main.scenario} {main.kind}, seed {main.seed} · doorbuster report", css=Markup(CSS),
        kicker=f"doorbuster · {main.scenario} · {main.kind} · seed {main.seed} · {main.duration_s:.0f} s",
        mood="" if verdict is None else "yes" if verdict.ok else "no",
        mark="" if verdict is None else "yes" if verdict.ok else "no",
        sentence=_numbers(main) if verdict is None else verdict.sentence,
        seen=[_marked(line) for line in verdict.lines] if verdict else [],
        card=card, columns=list(runs), p99_from=P99_FROM, grid=_grid, data=_json(data),
        overall=_sections(overall(*pair)), by_class=_sections(by_class(*pair)), glance=pd.DataFrame(class_rows(*pair)),
        figures=_parts(a, b, live.scenario),
        extra=[*_wrong_hits(*pair), *extra_tables.items()],
    )


def inline_svg(figure: Figure, prefix: str, label: str) -> Markup:
    """A figure as SVG for an HTML page: ids of its own, no metadata, no address, a label for who cannot see it."""
    out = io.StringIO()
    with mpl.rc_context(STYLE):
        figure.savefig(out, format="svg", metadata={"Date": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"|\s(width|height)="[\d.]+pt"', "", svg)
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    svg = re.sub(r"\n\s*", "\n", svg)
    return Markup(svg.replace("<svg", Markup('<svg role="img" aria-label="{}"').format(label), 1))


def _wrong_hits(live: Summary | None, twin: Summary | None) -> list[tuple[str, pd.DataFrame]]:
    """After the tiers: which of their answers were another question's."""
    rows = wrong_rows(live, twin)
    return [("Was it the right answer?", pd.DataFrame(rows))] if rows else []


def _parts(a: RunView | None, b: RunView | None, scenario: Scenario) -> list[_Part]:
    live, twin = a and a.frame, b and b.frame
    slow = a or b
    assert slow is not None
    figures = [
        ("timeline", "The sale, second by second", "The timeline in numbers",
         plots.timeline(live, twin, a and a.levels, b and b.levels, scenario.classes), _timeline_table(a, b)),
        ("latency", "How long people waited", "Quantiles with 95 % intervals",
         plots.latency_ecdf(live, twin, scenario), _latency_table(a, b)),
        ("waterfall", "The slowest of the served" + ("" if a else ", in the twin"), "The same in numbers",
         plots.waterfall(slow.frame), _rounded(slowest(slow.frame))),
        ("tiers", "Who answered", "Requests by tier and class",
         plots.tiers_by_class(live, twin, scenario.classes), _tier_table(a, b)),
    ]
    for who, view in _named(a, b):
        if boundaries.worth_showing(view.scenario, view.breakers):
            figures.append((
                f"boundaries-{who}",
                "Who computed, and whom the door trusted" + ("" if who == "live" else ", in the twin"), "By boundary",
                boundaries.figure(view.frame, view.breakers, view.scenario, int(view.levels["at_ns"].max())),
                boundaries.table(view.frame, view.breakers, view.scenario),
            ))
    parts = []
    for name, heading, caption, figure, table in figures:
        finding, names = take_heading(figure)
        parts.append(_Part(heading, finding, names, caption, inline_svg(figure, name, f"{heading}: {finding}"), table))
    return parts


def _timeline_table(a: RunView | None, b: RunView | None) -> pd.DataFrame:
    views = _named(a, b)
    duration_s = max(view.levels["at_ns"].max() for _, view in views) / S_NS
    width_s = max(bin_s(duration_s), int(np.ceil(duration_s / MOST_ROWS)))
    columns: dict[str, object] = {}
    for who, view in views:
        per_s = rates(view.frame, duration_s, width_s)
        columns.setdefault("second", per_s["at_s"])
        columns.setdefault("offered/s", per_s["offered"].round(2))
        columns[f"served/s {who}"] = per_s["served"].round(2)
        columns[f"not served/s {who}"] = per_s["rejected"].round(2)
        columns[f"fallback/s {who}"] = per_s["fallback"].round(2)
        columns[f"highest level {who}"] = _highest_level(view.levels, per_s["at_s"], width_s)
        age = queue_age(view.frame)
        oldest = age["age_ns"].groupby(age["at_ns"] // (width_s * S_NS)).max()
        columns[f"oldest waiting, s {who}"] = (per_s["at_s"] // width_s).map(oldest).fillna(0).div(S_NS).round(2)
    return pd.DataFrame(columns)


def _highest_level(levels: pd.DataFrame, at_s: pd.Series, width_s: int) -> list[int]:
    at, level = levels["at_ns"].to_numpy(), levels["level"].to_numpy()
    out = []
    for start in at_s.to_numpy() * S_NS:
        first = max(int(np.searchsorted(at, start, side="right")) - 1, 0)
        last = max(int(np.searchsorted(at, start + width_s * S_NS, side="left")), first + 1)
        out.append(int(level[first:last].max()))
    return out


def _latency_table(a: RunView | None, b: RunView | None) -> pd.DataFrame:
    rows = []
    for name in (a or b).scenario.classes:  # type: ignore[union-attr]
        for what, column in (("TTFT", "ttft_ns"), ("end to end", "e2e_ns")):
            for who, view in _named(a, b):
                mask = equals(view.frame["traffic_class"], name) & equals(view.frame["outcome"], "served")
                in_ms = view.frame.loc[mask, column].astype("Float64") / MS_NS
                row: dict[str, object] = {"class": name, "latency": what, "run": who, "n": int(in_ms.notna().sum())}
                for point, q in quantiles(in_ms).items():
                    row[point] = milliseconds(q.value)
                    row[f"{point} interval"] = _interval(q)
                rows.append(row)
    return pd.DataFrame(rows)


def _interval(q: Quantile) -> str:
    """``a to b``; too few requests leave a side open."""
    if q.low is None and q.high is None:
        return NONE
    low = "" if q.low is None else milliseconds(q.low)
    return f"{low} or more" if q.high is None else f"{low} to {milliseconds(q.high)}".strip()


def _tier_table(a: RunView | None, b: RunView | None) -> pd.DataFrame:
    counts = {who: tier_counts(view.frame, view.scenario.classes) for who, view in _named(a, b)}
    names = dict.fromkeys(name for table in counts.values() for name in table.index)
    return pd.DataFrame(
        [
            {"class": name, "run": who, **table.loc[name]}
            for name in names for who, table in counts.items() if name in table.index
        ]
    )


def _named(a: RunView | None, b: RunView | None) -> list[tuple[str, RunView]]:
    return [(who, view) for who, view in (("live", a), ("twin", b)) if view is not None]


def _rounded(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.round({name: 1 for name in frame.columns if name.endswith("_ms")})


def _grid(frame: pd.DataFrame) -> Markup:
    rows = [[_cell(value) for value in row] for row in frame.itertuples(index=False, name=None)]
    return Markup(ENV.from_string(GRID).render(heads=list(frame.columns), rows=rows))


def _cell(value: object) -> str:
    if value is None or value is pd.NA or (isinstance(value, float) and np.isnan(value)):
        return NONE
    return f"{value:g}" if isinstance(value, float | np.floating) else str(value)


def _sections(rows: list[Line]) -> list[tuple[str, list[Line]]]:
    return [(section, list(group)) for section, group in itertools.groupby(rows, lambda row: row.section)]


def _marked(line: str) -> tuple[bool, str]:
    ok, _, text = line.partition(": ")
    return ok == "yes", text


def _numbers(summary: Summary) -> str:
    return (
        f"{summary.served} of {summary.offered} requests were served, "
        f"{summary.goodput_rps:.1f} per second within their SLO"
    )


def _json(data: dict[str, Summary]) -> Markup:
    text = msgspec.json.encode(data).decode()
    return Markup(text.replace("&", r"\u0026").replace("<", r"\u003c").replace(">", r"\u003e"))

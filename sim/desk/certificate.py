"""The certificate of a comparison: its table for the terminal, its two figures, and one offline HTML file of all.

Draws and lays out what ``compare.py`` found, and judges nothing. The look and the rules are those of ``plots.py`` and
``report.py``: a title is the finding, text from outside is escaped, nothing is fetched.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from markupsafe import Markup
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from rich import box
from rich.table import Table
from rich.text import Text

from engine.units import S_NS
from sim.desk.compare import BY_MODEL, METRICS, Comparison, Score, confusion, ratios
from sim.desk.comparison_words import ALL, amount, said
from sim.desk.look import LOST, QUIET, TIER_COLOURS, TWIN, WIDTH_IN, headed, plain, styled, take_heading
from sim.desk.page import CSS, GRID, HEAD
from sim.desk.report import ENV, inline_svg
from sim.desk.series import TIERS, bin_s
from sim.desk.tables import NONE, frame_table, milliseconds

NAME = "certificate.html"
APART = LinearSegmentedColormap.from_list("apart", ["#FFFFFF", TWIN])
ALIKE = LinearSegmentedColormap.from_list("alike", ["#F4F4F4", "#9FB3C8"])
FEWEST_IN_BIN = 3  # pairs, for a median
LABEL = 25  # columns
WIDEST = 100.0  # a ratio beyond it is drawn at the edge
MS_SECTIONS = ("first token", "end to end")

PAGE = HEAD + """<body>
<header class="{{ mark }}">
<p class="kicker">{{ kicker }}</p>
<h1><span class="mark">{{ mark }}</span>{{ sentence }}</h1>
<ul class="seen">
{% for ok, line in seen %}<li><b>{{ "✓" if ok else "✗" }}</b><span>{{ line }}</span></li>
{% endfor %}</ul>
</header>
<main>
<section><h2>What was compared</h2>
<dl>{% for key, value in card.items() %}<div><dt>{{ key }}</dt><dd>{{ value }}</dd></div>{% endfor %}</dl>
</section>
{% for figure in figures %}<section><h2>{{ figure.heading }}</h2>
<figure><figcaption><strong>{{ figure.finding }}</strong></figcaption>
<div class="wide hint">{{ figure.svg }}</div></figure>
{% if figure.table is not none %}<details><summary>The same in numbers</summary>
<div class="wide">{{ grid(figure.table) }}</div></details>
{% endif %}</section>
{% endfor %}
<section><h2>Every figure</h2>
<p class="note">A difference has its 95 % interval beside it. Decisions: Wilson, as if requests were independent.
Quantiles: {{ rule }}. KS D and W1 / mean are effect sizes between 0 and 1, and of the mean; no p-values. Quantiles of
all served requests sit between two worlds (caches, model) and can jump where their shares meet.</p>
{% for section, table in sections %}<h3>{{ section }}</h3><div class="wide">{{ grid(table) }}</div>
{% endfor %}</section>
</main>
</body>
</html>
"""


# ---------------------------------------------------------------- text


def table(found: Comparison, names: tuple[str, str]) -> Table:
    """Every score in 100 columns, section by section; p99 and the pairs by class are left to the JSON and the page."""
    floor = bool(found.noise_floor)
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    shown.add_column("", no_wrap=True, overflow="ellipsis", max_width=LABEL)
    for head in (*names, "difference", *(("floor",) if floor else ()), "mark", ""):
        shown.add_column(head, justify="right", no_wrap=True)
    for section, scores in _sections(found.scores):
        kept = [s for s in scores if _in_brief(s)]
        if kept:
            shown.add_row(Text(section, style="bold"))
        for score in kept:
            shown.add_row(Text(f" {score.what}"), *_cells(score, found, floor))
        shown.add_section()
    return shown


def matrix_table(found: Comparison, names: tuple[str, str]) -> Table:
    """Decisions of the first run by row, of the second by column."""
    return frame_table(_matrix_frame(found, names))


def sentence(found: Comparison, names: tuple[str, str]) -> str:
    """The verdict in a sentence."""
    bad = sum(line.startswith("no") for line in found.lines)
    marks = len(found.lines)
    what = f"{names[0].capitalize()} and {names[1]} {'do not agree' if bad else 'agree'}"
    count = f"all {marks} marks are met" if not bad else f"{bad} of {marks} marks are missed"
    return f"{what}: {count}; {100 * found.decision_agreement:.1f} % of {found.pairs} decisions are the same"


def rule_words(found: Comparison) -> str:
    """How the intervals of quantiles were made."""
    rule = found.bootstrap
    words = (
        f"moving-block bootstrap over the order of arrival, {rule.draws} draws, seed {rule.seed}, blocks of "
        f"{rule.block} requests (twice the mean of {rule.busy_requests:.0f} per busy period"
    )
    return words + (f", cut to a fifth of the {found.pairs} pairs: too narrow)" if rule.capped else ")")


def _sections(scores: list[Score]) -> list[tuple[str, list[Score]]]:
    out: dict[str, list[Score]] = {}
    for score in scores:
        out.setdefault(score.section, []).append(score)
    return list(out.items())


def _in_brief(score: Score) -> bool:
    if score.key.startswith("paired."):
        return score.key.split(".", 2)[2].startswith((f"{ALL}.", f"{BY_MODEL}."))
    return score.value is not None and not score.what.endswith("p99")


def _cells(score: Score, found: Comparison, floor: bool) -> list[str]:
    """Live, twin, difference, (floor,) mark, yes or no."""
    below = found.noise_floor.get(score.key)
    at_floor = NONE if below is None else amount(below.value, score.unit)
    if below is not None and below.times is not None:
        at_floor += f" x{below.times:.1f}" if below.times < 100 else " x>99"
    mark = "" if score.mark is None else amount(score.mark, score.unit)
    verdict = "" if score.ok is None else "yes" if score.ok else "no"
    if score.note:
        verdict = "yes*"
    return [_value(score, score.live), _value(score, score.twin), said(score), *([at_floor] if floor else []), mark,
            verdict]


def _value(score: Score, value: float | None) -> str:
    if value is None:
        return ""
    if score.what.startswith(MS_SECTIONS):
        return milliseconds(value)
    return f"{100 * value:.1f} %" if score.unit == "pp" else f"{value:.2f}"


def _matrix_frame(found: Comparison, names: tuple[str, str]) -> pd.DataFrame:
    seen = {*found.matrix, *(column for row in found.matrix.values() for column in row)}
    columns = [*(tier for tier in TIERS if tier in seen), *sorted(seen.difference(TIERS))]
    rows = [
        {f"{names[0]} \\ {names[1]}": row, **{c: found.matrix.get(row, {}).get(c, 0) for c in columns}}
        for row in columns
    ]
    return pd.DataFrame(rows)


# ---------------------------------------------------------------- figures


@styled
def confusion_map(pairs: pd.DataFrame, names: tuple[str, str] = ("live", "twin")) -> Figure:
    """Decisions of the first run (rows) by those of the second: the diagonal agrees, orange does not."""
    counts = confusion(pairs)
    labels = [plain(name, 20) for name in counts.index]
    values = counts.to_numpy()
    n = len(labels)
    figure = Figure(figsize=(WIDTH_IN, 1.3 + 0.42 * n), layout="constrained")
    axis = figure.subplots()
    of_row = values / np.maximum(values.sum(axis=1, keepdims=True), 1)
    for i in range(n):
        for j in range(n):
            if values[i, j]:
                colour = ALIKE(of_row[i, j]) if i == j else APART(0.15 + 0.85 * of_row[i, j])
                axis.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, color=colour, lw=0))
                share = f"{values[i, j]}  ({100 * of_row[i, j]:.0f} %)"
                axis.text(j, i, share if n <= 8 else str(values[i, j]), ha="center", va="center", fontsize=8)
            else:
                axis.text(j, i, "·", ha="center", va="center", color=LOST)
    axis.set(xlim=(-0.5, n - 0.5), ylim=(n - 0.5, -0.5), xlabel=f"decision of the {names[1]} run",
             ylabel=f"decision of the {names[0]} run")
    axis.set_xticks(range(n), [label.replace("_", "_\n") for label in labels], fontsize=8 if n <= 6 else 7)
    axis.set_yticks(range(n), labels)
    axis.grid(visible=False)
    axis.tick_params(length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)
    return headed(figure, _confusion_finding(counts, names), [])


@styled
def ratio_over_time(pairs: pd.DataFrame, names: tuple[str, str] = ("live", "twin")) -> Figure:
    """Second over first, a dot a pair that was decided alike, in the colour of who answered; a line for the median of
    what the model answered. What is beyond the axis is drawn at its edge.
    """
    same = pairs["decision_a"] == pairs["decision_b"]
    at_s = pairs["arrived_ns_a"].astype("float64") / S_NS
    width = 2 * bin_s(float(at_s.max()))
    figure = Figure(figsize=(WIDTH_IN, 5.2), layout="constrained")
    axes = figure.subplots(2, 1, sharex=True)
    for axis, metric, what in zip(axes, METRICS, ("time to the first token", "time to the end"), strict=True):
        ratio = ratios(pairs, metric)
        reach = _reach(ratio[same].dropna())
        ratio = ratio.clip(1 / reach, reach)
        other = ~same & ratio.notna()
        if other.any():
            axis.plot(at_s[other], ratio[other], "x", color=LOST, ms=4, mew=0.8, clip_on=False,
                      label="decided differently")
        for tier in TIERS:
            mine = same & (pairs["decision_a"] == tier) & ratio.notna()
            if mine.any():
                axis.plot(at_s[mine], ratio[mine], ".", color=TIER_COLOURS[tier], ms=4, alpha=0.8, mew=0, clip_on=False,
                          label=tier)
        by_model = ratio[same & (pairs["decision_a"] == "model")].dropna()
        grouped = by_model.groupby((at_s[by_model.index] // width).astype(int))
        middle = grouped.median()[grouped.size() >= FEWEST_IN_BIN]
        if len(middle):
            axis.plot((middle.index.to_numpy() + 0.5) * width, middle, color=TWIN, lw=1.6,
                      label=f"median by the model, per {width} s")
        axis.axhline(1, color=QUIET, lw=0.8)
        axis.set_title(f"{what}: {names[1]} over {names[0]}")
        axis.set_yscale("log")
        axis.set(ylim=(1 / reach, reach), ylabel="ratio")
        axis.yaxis.set_major_locator(LogLocator(10, subs=(1.0, 2.0, 5.0) if reach < 20 else (1.0,), numticks=12))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} x"))
        axis.yaxis.set_minor_formatter(NullFormatter())
    axes[-1].set_xlabel("seconds since the start, at arrival")
    handles, labels = axes[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=min(4, len(labels)), markerscale=1.8)
    return headed(figure, _ratio_finding(pairs, same, names), [])


def _reach(alike: pd.Series) -> float:
    """How far the axis goes on either side of 1: over 98 % of what was decided alike, never less than 2."""
    far = float(np.exp(np.quantile(np.abs(np.log(alike)), 0.98))) if len(alike) else 1.0
    return min(WIDEST, max(2.0, 1.3 * far))


def _confusion_finding(counts: pd.DataFrame, names: tuple[str, str]) -> str:
    values = counts.to_numpy()
    total, alike = int(values.sum()), int(np.trace(values))
    share = f"{100 * alike / max(total, 1):.1f} % of {total} requests"
    words = f"{names[0].capitalize()} and {names[1]} decided alike for {share}"
    apart = values - np.diag(np.diag(values))
    if not apart.any():
        return words
    i, j = np.unravel_index(int(apart.argmax()), apart.shape)
    pair = f"{plain(counts.index[i], 20)} ({names[0]}) against {plain(counts.columns[j], 20)} ({names[1]})"
    return f"{words}; most often apart: {pair}, {apart[i, j]} times"


def _ratio_finding(pairs: pd.DataFrame, same: pd.Series, names: tuple[str, str]) -> str:
    """Of what the model answered in both, if anything: where latency is more than the way to a cache and back."""
    by_model = same & (pairs["decision_a"] == "model")
    chosen = by_model if by_model.any() else same
    logs = np.log(ratios(pairs[chosen], "e2e").dropna().to_numpy())
    if not len(logs):
        return "No pair was served by the same decision"
    who = "that the model answered in both" if by_model.any() else "decided alike"
    half, most, middle = (float(np.exp(x)) for x in (*np.quantile(np.abs(logs), [0.5, 0.9]), np.median(logs)))
    return (
        f"Of {len(logs)} pairs {who}, half end within {half:.2f} x of each other, nine in ten within {most:.2f} x; "
        f"{names[1]} takes {middle:.2f} x the time in the middle"
    )


# ---------------------------------------------------------------- the page


def write_certificate(
    folder: Path, found: Comparison, pairs: pd.DataFrame, names: tuple[str, str], card: Mapping[str, str]
) -> Path:
    """``certificate.html`` in the folder, in place of an older one; returns its path."""
    path = folder / NAME
    path.write_text(render(found, pairs, names, card), encoding="utf-8")
    return path


def render(found: Comparison, pairs: pd.DataFrame, names: tuple[str, str], card: Mapping[str, str]) -> str:
    """The page as text."""
    figures = []
    for name, heading, figure, numbers in (
        ("confusion", "Who decided what", confusion_map(pairs, names), _matrix_frame(found, names)),
        ("ratios", "How long they took, pair by pair", ratio_over_time(pairs, names), None),
    ):
        finding, _ = take_heading(figure)
        svg = inline_svg(figure, name, f"{heading}: {finding}")
        figures.append({"heading": heading, "finding": finding, "svg": svg, "table": numbers})
    seen = [(line.startswith("yes"), line.partition(": ")[2]) for line in found.lines]
    return ENV.from_string(PAGE).render(
        title=f"{sentence(found, names)} · doorbuster certificate", css=Markup(CSS), kicker="doorbuster · certificate",
        mark=found.verdict, sentence=sentence(found, names), seen=seen, card=card, figures=figures,
        rule=rule_words(found), grid=_grid,
        sections=[(section, _score_frame(scores, found, names)) for section, scores in _sections(found.scores)],
    )


def _score_frame(scores: list[Score], found: Comparison, names: tuple[str, str]) -> pd.DataFrame:
    floor = bool(found.noise_floor)
    heads = [*names, "difference", *(["floor"] if floor else []), "mark", "met"]
    rows = [
        {"": s.what, "n": NONE if s.n is None else s.n, **dict(zip(heads, _cells(s, found, floor), strict=True))}
        for s in scores
    ]
    return pd.DataFrame(rows)


def _grid(frame: pd.DataFrame) -> Markup:
    rows = [[str(value) for value in row] for row in frame.itertuples(index=False, name=None)]
    return Markup(ENV.from_string(GRID).render(heads=list(frame.columns), rows=rows))

"""The look of every figure: one colour meaning everywhere, units on the axes, words instead of keys.

Live dark, twin orange, SLO red dashed, not served grey, each tier its own colour of Paul Tol's "muted" set: told apart
with any colour vision. Text from outside (class names, request ids) becomes a label without markup.
"""

from __future__ import annotations

import re
import sys
import textwrap
import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from sim.desk.series import NOT_SERVED

LIVE, TWIN, SLO, LOST, QUIET = "#222222", "#E8710A", "#C81E1E", "#9A9A9A", "#666666"
COLOUR_OF_RUN = {"live": LIVE, "twin": TWIN}
TIER_COLOURS = {
    "exact": "#88CCEE", "coalesced": "#44AA99", "semantic": "#117733", "approximate": "#DDCC77", "fallback": "#AA4499",
    "model": "#332288", NOT_SERVED: LOST,
}
DARK_TIERS = ("semantic", "fallback", "model")
STAGE_COLOURS = {"queue": "#C6DBEF", "prefill": "#6BAED6", "decode": "#2171B5"}
STAGE_WORDS = {"queue": "queue", "prefill": "prefill, to the first token", "decode": "decode, the rest of the answer"}
WIDTH_IN = 7.4
TITLE_CHARS = 88
UNIT = re.compile(r"(?<=\d) (?=(s|ms|%)(\W|$))")
RUN_NAME = "run-name"  # group id of a run's name above a figure
STYLE: Any = {
    "font.family": "DejaVu Sans", "font.size": 9, "axes.titlesize": 9, "axes.labelsize": 9,
    "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": QUIET,
    "axes.axisbelow": True, "axes.grid": True, "grid.color": "#E6E6E6", "grid.linewidth": 0.6, "lines.linewidth": 1.4,
    "xtick.color": "#444444", "ytick.color": "#444444", "xtick.labelsize": 8, "ytick.labelsize": 8,
    "figure.facecolor": "white", "figure.titlesize": 10, "figure.titleweight": "bold", "savefig.facecolor": "white",
    "legend.frameon": False, "legend.fontsize": 8, "legend.handlelength": 1.0, "legend.handleheight": 1.0,
    "legend.columnspacing": 1.2, "svg.fonttype": "path", "svg.hashsalt": "doorbuster",
}
TIMES_MS = {0.1: "0.1 ms", 1: "1 ms", 10: "10 ms", 100: "100 ms", 1e3: "1 s", 1e4: "10 s", 1e5: "100 s", 1e6: "1000 s"}

P = ParamSpec("P")


def style() -> None:
    """For notebooks: the same look for what is drawn by hand; figures inline and sharp; tables whole."""
    mpl.rcParams.update(STYLE)
    pd.set_option("display.max_colwidth", None)
    warnings.filterwarnings("ignore", message="IProgress not found")  # of tqdm, which shows nothing here anyway
    if "ipykernel" in sys.modules:
        from matplotlib_inline.backend_inline import set_matplotlib_formats

        set_matplotlib_formats("retina")


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Draw in this look, whatever the process has set."""

    @wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with mpl.rc_context(STYLE):
            return draw(*args, **kwargs)

    return drawn


def headed(figure: Figure, finding: str, runs: list[str]) -> Figure:
    """The finding as the title; above it the names of the lines' colours."""
    lines = textwrap.wrap(UNIT.sub("\u00a0", finding), TITLE_CHARS)  # a number keeps its unit on its line
    figure.suptitle("\n".join([*lines, " "] if runs else lines), x=0.008, ha="left")
    height_in = figure.get_size_inches()[1]
    y = 1 - (0.06 + 0.165 * len(lines)) / height_in
    for i, who in enumerate(runs):
        figure.text(0.008 + 0.055 * i, y, who, color=COLOUR_OF_RUN[who], va="top", weight="bold", gid=RUN_NAME)
    return figure


def take_heading(figure: Figure) -> tuple[str, list[str]]:
    """A figure's title and run names, taken off it: a page sets them as text that wraps and can be searched."""
    title = " ".join(figure.get_suptitle().split()).replace(r"\$", "$")
    figure.suptitle("").set_in_layout(False)
    names = [text for text in figure.texts if text.get_gid() == RUN_NAME]
    for text in names:
        text.remove()
    return title, [text.get_text() for text in names]


def plain(text: object, most: int = 40) -> str:
    """Any text as a label: no markup, no glyph that the font lacks."""
    safe = "".join(c if c.isascii() and c.isprintable() else "?" for c in str(text))
    return (safe if len(safe) <= most else safe[: most - 2] + "..").replace("$", r"\$")


def slo_line(line: Callable[..., Any], at: float) -> None:
    """A red dashed line; ``line`` is an axes' ``axhline`` or ``axvline``."""
    line(at, color=SLO, ls="--", lw=1)


def log_times(axis: Axes) -> None:
    """A log axis in ms whose decades read ``10 ms``, ``1 s``."""
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(10, numticks=8))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda ms, _: TIMES_MS.get(float(f"{ms:.6g}"), f"{ms:g} ms")))
    axis.xaxis.set_minor_formatter(NullFormatter())

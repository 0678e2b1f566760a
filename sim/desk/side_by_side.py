"""Several runs as one offline page: a table with a column a run, and their latencies laid over each other.

The runs need one scenario's classes, not the same arrivals; two runs of the same arrivals are ``compare.py``'s, which
pairs them request by request and judges.
"""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from engine.errors import UserError
from sim.desk.look import take_heading
from sim.desk.overlay import latencies
from sim.desk.page import CSS, GRID, RUNS_PAGE
from sim.desk.report import TWIN_KINDS, RunView, inline_svg
from sim.desk.summary import Summary
from sim.desk.tables import milliseconds, percent

ENV = Environment(autoescape=True, undefined=StrictUndefined)


def numbers(runs: Mapping[str, RunView]) -> pd.DataFrame:
    """A row a measure, a column a run; all as text. Raises UserError where the runs have other classes."""
    classes = {name: tuple(view.scenario.classes) for name, view in runs.items()}
    if len(set(classes.values())) > 1:
        said = "; ".join(f"{name}: {', '.join(found)}" for name, found in classes.items())
        raise UserError("the runs have other traffic classes", why=said, fix="give runs of one scenario")
    return pd.DataFrame({name: _column(view.summary) for name, view in runs.items()}).reset_index(names="measure")


def render(runs: Mapping[str, RunView], card: Mapping[str, str]) -> str:
    """The page as text. ``card``: what a reader must know of the runs, by name."""
    table = numbers(runs)
    figure = latencies(runs)
    finding, _ = take_heading(figure)
    grid = ENV.from_string(GRID).render(heads=list(table.columns), rows=table.to_numpy().tolist())
    return ENV.from_string(RUNS_PAGE).render(
        title=f"doorbuster · {len(runs)} runs of {next(iter(runs.values())).summary.scenario}", css=Markup(CSS),
        finding=finding, card=card, numbers=Markup(grid), svg=inline_svg(figure, "latency", finding),
    )


def _column(summary: Summary) -> dict[str, str]:
    rows = {
        "kind": "twin" if summary.kind in TWIN_KINDS else "live", "seed": str(summary.seed),
        "offered": str(summary.offered), "served": str(summary.served),
        "within SLO, per second": f"{summary.goodput_rps:.2f}",
        "deflected, of served": percent(summary.deflection_rate), "utilisation": percent(summary.utilisation),
    }
    for name, found in summary.classes.items():
        rows |= {
            f"{name}: within SLO": percent(found.slo_attainment, ".0f"),
            f"{name}: degraded, shed": f"{found.degraded}, {found.shed}",
            f"{name}: first token": milliseconds(found.ttft_ms.p95), f"{name}: end": milliseconds(found.e2e_ms.p95),
        }
    return rows

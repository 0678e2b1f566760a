"""``doorbuster report``: report.html of a run folder again, from what the run left there."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec

from engine.config import Scenario
from engine.errors import UserError
from engine.scenario import load
from sim.demo import CARD, extra_tables, replay_again
from sim.desk.boundaries import breaker_frame
from sim.desk.frames import read_run
from sim.desk.report import NAME, RunView, render
from sim.desk.summary import Summary, verdict


def report_again(folder: Path) -> Path:
    """A demo's folder holds its twin's below it; both are shown. The old report goes only when the new one is whole."""
    if not folder.is_dir():
        raise UserError("no such run folder", str(folder), "there is no folder of that name", "ls runs")
    live, twin = view_of(folder), view_of(folder / "twin") if (folder / "twin").is_dir() else None
    judged = verdict(live.frame, live.levels, live.scenario) if twin is not None else None
    tables = extra_tables(live, twin, replay_again(folder)) if twin is not None else {}
    text = render(live, twin, judged, _card(folder, live), tables)
    beside = folder / f"{NAME}.part"
    beside.write_text(text, encoding="utf-8")
    beside.replace(folder / NAME)
    return folder / NAME


def _card(folder: Path, view: RunView) -> dict[str, str]:
    """As the run itself wrote it; runs of before have none."""
    path = folder / CARD
    if not path.is_file():
        return {"run": folder.name, "scenario": f"{view.scenario.name}, seed {view.summary.seed}"}
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, str])
    except msgspec.DecodeError as error:
        raise UserError("not a card", where=str(path), why=str(error), fix=f"remove {CARD}") from None


def view_of(folder: Path) -> RunView:
    """A run folder, or the twin inside a demo's, as reports show it. Raises UserError."""
    run = read_run(folder)
    base = folder if (folder / "scenario.toml").is_file() else folder.parent
    path = folder / "summary.json"
    try:
        summary = msgspec.json.decode(path.read_bytes(), type=Summary)
    except FileNotFoundError:
        raise UserError("the run was not finished: it has no summary", where=str(folder), fix="ls runs") from None
    except msgspec.DecodeError as error:
        raise UserError("not a summary", where=str(path), why=str(error)) from None
    breakers = breaker_frame(run.records, run.duration_ns, run.start_ns)
    return RunView(summary, run.frame, run.levels, _scenario(base), breakers)


def _scenario(base: Path) -> Scenario:
    """Every value as it ran, ``--set`` included; a run of another version is read from its file."""
    tree: dict[str, object] = {}
    try:
        for dotted, row in json.loads((base / "resolved.json").read_text()).items():
            node = tree
            *parents, leaf = dotted.split(".")
            for part in parents:
                node = node.setdefault(part, {})  # type: ignore[assignment]
            node[leaf] = row["value"]
        return msgspec.convert(tree, Scenario)
    except (OSError, ValueError, TypeError, KeyError, msgspec.ValidationError):
        return load(str(base / "scenario.toml")).scenario

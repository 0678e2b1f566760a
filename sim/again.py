"""``doorbuster report``: report.html of a run folder again, from what the run left there."""

from __future__ import annotations

from pathlib import Path

import msgspec

from engine.errors import UserError
from engine.scenario import load
from sim.desk.frames import read_run
from sim.desk.report import NAME, RunView, write_report
from sim.desk.summary import Summary, verdict


def report_again(folder: Path) -> Path:
    """A demo's folder holds its twin's below it; both are shown."""
    if not folder.is_dir():
        raise UserError("no such run folder", where=str(folder), fix="ls runs")
    live, twin = _view(folder), _view(folder / "twin") if (folder / "twin").is_dir() else None
    judged = verdict(live.frame, live.levels, live.scenario) if twin is not None else None
    (folder / NAME).unlink(missing_ok=True)
    card = {"run": folder.name, "scenario": f"{live.scenario.name}, seed {live.summary.seed}"}
    return write_report(folder, live, twin, judged, card)


def _view(folder: Path) -> RunView:
    run = read_run(folder)
    base = folder if (folder / "scenario.toml").is_file() else folder.parent
    scenario = load(str(base / "scenario.toml")).scenario
    summary = msgspec.json.decode((folder / "summary.json").read_bytes(), type=Summary)
    return RunView(summary, run.frame, run.levels, scenario)

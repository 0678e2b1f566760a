"""``doorbuster lab``: JupyterLab on the notebooks; ``doorbuster lab compare``: several runs on one page.

JupyterLab as it comes asks the network for news, updates and extensions; this one asks nobody.
"""

from __future__ import annotations

import json
import os
import secrets
import sys
import time
from pathlib import Path
from typing import Any

from rich.table import Table

from engine.errors import UserError
from engine.model.folder import cache_dir
from engine.scenario import DATA
from sim.again import view_of
from sim.compare_cli import TWIN, changed, read
from sim.desk.report import RunView
from sim.desk.side_by_side import numbers, render
from sim.desk.summary import Summary
from sim.desk.tables import frame_table

NOTEBOOKS = DATA.parent / "notebooks"
QUIET = (
    "--LabApp.news_url=None", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
    "--LabApp.extension_manager=readonly",
)
PAGE_CONFIG = {"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": True}}  # it asks all the same


def jupyter(notebook: str, port: int, browser: bool) -> list[str]:
    """The command line of JupyterLab on this machine's loopback: for a file, or a name below ``notebooks``.

    Raises UserError where there is no such notebook.
    """
    path = Path(notebook) if notebook.endswith(".ipynb") else NOTEBOOKS / f"{notebook}.ipynb"
    if not path.is_file():
        known = ", ".join(p.stem for p in sorted(NOTEBOOKS.glob("*.ipynb"))) or "none: install from a checkout, -e"
        raise UserError(f"no notebook {notebook!r}", where=str(NOTEBOOKS), why=f"there are: {known}")
    command = [sys.executable, "-m", "jupyterlab", str(path), "--ip=127.0.0.1", f"--port={port}", *QUIET]
    command += [] if browser else ["--no-browser"]
    return command + (["--allow-root"] if os.geteuid() == 0 else [])  # a container's only user is root


def open_lab(notebook: str, port: int, browser: bool) -> None:
    """Becomes JupyterLab: signals and exit code are its own. It prints its address."""
    command = jupyter(notebook, port, browser)
    folder = cache_dir() / "jupyter"
    (folder / "labconfig").mkdir(parents=True, exist_ok=True)
    (folder / "labconfig" / "page_config.json").write_text(json.dumps(PAGE_CONFIG))
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("JUPYTER_CONFIG_PATH")]))
    os.execve(command[0], command, {**os.environ, "JUPYTER_CONFIG_PATH": path})


def compare_runs(folders: list[Path], out_file: Path | None) -> tuple[dict[str, Summary], Table, Path]:
    """Summaries by run, a table, the page. Raises UserError for fewer than two runs, or a page that is there."""
    runs = views(folders)
    if len(runs) < 2:
        raise UserError("one run is nothing to lay over another", fix="doorbuster lab compare RUN RUN...")
    path = out_file or Path("runs") / f"{time.strftime('%Y-%m-%dT%H-%M-%S')}_lab_{secrets.token_hex(2)}.html"
    text = render(runs, _card(folders, list(runs)))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise UserError("a page never overwrites a page", where=str(path), fix="another --out") from None
    except OSError as error:
        raise UserError("cannot write the page", where=str(path), why=str(error)) from None
    table = frame_table(numbers(runs).rename(columns={"measure": ""}))
    return {name: view.summary for name, view in runs.items()}, table, path


def views(folders: list[Path]) -> dict[str, RunView]:
    """The runs by a short name, the last two words of their folder's: ``demo 5d0c``, ``demo 5d0c twin``."""
    found: dict[str, RunView] = {}
    for folder in folders:
        view, path = view_of(folder), folder.resolve()
        name = f"{_short(path.parent)} {path.name}" if path.name == TWIN else _short(path)
        if name in found:
            raise UserError("the same run twice", where=str(folder), fix="give each run once")
        found[name] = view
    return found


def _short(path: Path) -> str:
    return " ".join(path.name.split("_")[-2:])


def _card(folders: list[Path], names: list[str]) -> dict[str, str]:
    """Each run's folder, and which of its values differ from the first one's."""
    settings: list[dict[str, Any]] = [read(folder).settings for folder in folders]
    rows = dict(zip(names, map(str, folders), strict=True))
    for name, found in zip(names[1:], settings[1:], strict=True):
        rows[f"{name} against {names[0]}"] = changed(settings[0], found) or "the same settings"
    return rows

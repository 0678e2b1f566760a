"""Run folders: ``runs/<time>_<scenario>_<kind>_<id>/``, never the same twice, with all that a run was made of."""

from __future__ import annotations

import contextlib
import json
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from engine.errors import UserError
from engine.scenario import Resolved, flat

ROOT = Path("runs")
PARTS = {
    "capacity": "the search for the capacity", "journal": "the live journals",
    "ledger/records.ndjson": "the live ledger",
    "requests.parquet": "the live requests", "summary.json": "the live summary", "floor": "the second live run",
    "twin/summary.json": "the twin's run",
}  # of a demo's folder, in the order in which they come to be


def create(resolved: Resolved, kind: str, root: Path = ROOT) -> Path:
    """A new folder with ``scenario.toml`` as given and ``resolved.json``: every value and its origin."""
    stamp = time.strftime("%Y-%m-%dT%H-%M-%S")
    folder = root / f"{stamp}_{resolved.scenario.name}_{kind}_{secrets.token_hex(2)}"
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise UserError("cannot make a run folder", where=str(folder), why=str(error)) from None
    fill(folder, resolved)
    return folder


def fill(folder: Path, resolved: Resolved) -> None:
    """``scenario.toml`` and ``resolved.json`` of a folder that is there."""
    (folder / "scenario.toml").write_text(resolved.text)
    values = {
        key: {"value": value, "origin": resolved.origins.get(key, "default")}
        for key, value in flat(resolved.scenario).items()
    }
    (folder / "resolved.json").write_text(json.dumps(values, indent=1) + "\n")


def write_json(path: Path, value: Any) -> None:
    """Indented JSON, never over an older file."""
    with path.open("xb") as file:
        file.write(msgspec.json.format(msgspec.json.encode(value), indent=1) + b"\n")


@contextlib.contextmanager
def kept(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Inside, a run is made. Whatever stops it half-way, the person is told what is left, and what can read it."""
    try:
        yield
    except BaseException:
        there = [words for name, words in PARTS.items() if (folder / name).exists()]
        if there:
            say(f"not finished: {folder} keeps {', '.join(there)}")
        if (folder / "summary.json").is_file():
            say(f"  doorbuster report {folder}    draws the live run")
        if any(folder.glob("journal/*.ndjson")):
            say(f"  doorbuster replay {folder}    reads its journals")
        raise

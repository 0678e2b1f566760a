"""Run folders: ``runs/<time>_<scenario>_<kind>_<id>/``, never the same twice, with all that a run was made of."""

from __future__ import annotations

import json
import secrets
import time
from pathlib import Path
from typing import Any

import msgspec

from engine.errors import UserError
from engine.scenario import Resolved, flat

ROOT = Path("runs")


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

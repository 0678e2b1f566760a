"""What was decided, written into a scenario file: the old file with its comments, other values, and the reason beside.

The new file is read back through the engine's own reader before it gets its name, so it never holds what the engine
would refuse.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tomlkit

from engine.errors import UserError
from engine.scenario import Resolved, load, overlay


def write_decision(base: Resolved, changes: tuple[str, ...], path: Path, why: str = "") -> Resolved:
    """``base``'s file with ``changes`` (``section.key=value``) at ``path``; returns it as the engine reads it.

    Raises UserError where a file is there already, ScenarioError where the engine refuses the values.
    """
    if path.exists():
        raise UserError("a decision never overwrites a file", where=str(path), fix="another name, or remove it")
    document = tomlkit.parse(base.text)
    for change in changes:
        tree: dict[str, Any] = {}
        *parents, leaf = overlay(tree, change).split(".")
        section: Any = document
        for part in parents:
            tree = tree[part]
            section = section[part] if part in section else section.setdefault(part, tomlkit.table())
        before = section.unwrap().get(leaf)
        section[leaf] = tree[leaf]
        section[leaf].comment(_note(before, why))
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.stem}.draft.toml")
    try:
        draft.write_text(tomlkit.dumps(document))
        load(str(draft))
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    return load(str(path))


def _note(before: object, why: str) -> str:
    was = "decided, the default before" if before is None else f"decided, {before!r} before"
    return " ".join(f"{was}: {why}".split()) if why else was

"""``doorbuster compare``: two run folders against each other, and a third one as the floor."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console

from engine.config import ClassConfig
from engine.errors import UserError
from engine.units import S_NS
from sim.desk import certificate
from sim.desk.compare import Comparison, Side, compare, pair
from sim.desk.frames import read_run
from sim.desk.report import TWIN_KINDS
from sim.desk.summary import Summary

TWIN, FLOOR = "twin", "floor"


class Found(msgspec.Struct, frozen=True):
    """A run folder, read."""

    folder: Path
    side: Side
    summary: Summary
    settings: dict[str, Any]  # every value of the scenario, as it ran

    @property
    def name(self) -> str:
        """What the run is called beside another one."""
        return "twin" if self.summary.kind in TWIN_KINDS else "live"


def compare_cli(
    first: Path, second: Path | None, floor: Path | None, json_wanted: bool, say: Callable[[str], None],
    emit: Callable[[Any], None], out: Console,
) -> bool:
    """Compare, print, write the certificate. False when the verdict is "no"."""
    if second is None:
        second = first / TWIN
        if first.is_dir() and not second.is_dir():
            raise UserError("one run, and no twin in it", where=str(first), fix="doorbuster compare RUN_A RUN_B")
    if floor is None and (first / FLOOR).is_dir():
        floor = first / FLOOR  # the demo made one
    a, b = read(first), read(second)
    c = None if floor is None else read(floor)
    for other in (b, c):
        if other is not None:
            _same_sale(a, other)
    if c is not None and c.name != a.name:
        raise UserError(
            "the floor is of another kind", where=str(c.folder), why=f"it is a {c.name} run, and {a.folder} is not",
            fix="--floor RUN, a second run of the same kind and arrivals",
        )
    names = (a.name, b.name) if a.name != b.name else ("first", "second")
    result = compare(a.side, b.side, _classes(a), None if c is None else c.side)
    card = _card(a, b, c, names, result)
    where = certificate.write_certificate(a.folder, result, pair(a.side.frame, b.side.frame), names, card)
    if json_wanted:
        emit(result)
    else:
        out.print(certificate.table(result, names))
        out.print(f"decisions: {names[0]} by row, {names[1]} by column", markup=False)
        out.print(certificate.matrix_table(result, names))
        if any(score.note for score in result.scores):
            out.print("yes*: relatively further apart, but by less than the load generator's own p99 lateness")
        for line in result.lines:
            if line.startswith("no"):
                out.print(line, markup=False, soft_wrap=True)
        out.print(f"{result.verdict}: {certificate.sentence(result, names)}", markup=False, soft_wrap=True)
    for key, value in card.items():
        say(f"{key}: {value}")
    say(f"certificate {where}")
    return result.verdict == "yes"


def read(folder: Path) -> Found:
    """A run, or the twin inside a demo. Raises UserError."""
    if not folder.is_dir():
        raise UserError("no such run", str(folder), "there is no folder of that name", "ls runs")
    run = read_run(folder)
    path = folder / "summary.json"
    try:
        summary = msgspec.json.decode(path.read_bytes(), type=Summary)
    except FileNotFoundError:
        raise UserError("the run was not finished: it has no summary", where=str(folder), fix="ls runs") from None
    except msgspec.DecodeError as error:
        raise UserError("not a summary", where=str(path), why=str(error)) from None
    base = folder if (folder / "resolved.json").is_file() else folder.parent
    try:
        settings = {key: row["value"] for key, row in json.loads((base / "resolved.json").read_text()).items()}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError("no settings of the run", where=str(base / "resolved.json"), why=str(error)) from None
    levels = run.levels if run.records else None
    return Found(folder, Side(run.frame, levels, summary.utilisation, run.duration_ns / S_NS), summary, settings)


def _same_sale(a: Found, b: Found) -> None:
    if a.summary.scenario != b.summary.scenario:
        raise UserError(
            "the runs are of other scenarios",
            why=f"{a.folder}: {a.summary.scenario}; {b.folder}: {b.summary.scenario}",
            fix="give two runs of one scenario",
        )


def _classes(run: Found) -> dict[str, ClassConfig]:
    """The classes with their SLOs as the run had them, ``--set`` included."""
    return {
        name: ClassConfig(
            criticality=run.settings[f"classes.{name}.criticality"],
            slo_ttft_ms=run.settings[f"classes.{name}.slo_ttft_ms"],
            slo_e2e_ms=run.settings[f"classes.{name}.slo_e2e_ms"],
        )
        for name in run.summary.classes if f"classes.{name}.slo_ttft_ms" in run.settings
    }


def _card(a: Found, b: Found, c: Found | None, names: tuple[str, str], result: Comparison) -> dict[str, str]:
    rows = {names[0]: str(a.folder), names[1]: str(b.folder)}
    none = "none: --floor RUN, or doorbuster demo --floor, says how far live is from live"
    rows["floor"] = none if c is None else str(c.folder)
    alone = result.only_first + result.only_second
    rows["pairs"] = f"{result.pairs} by request id, {alone} without a partner"
    for other in (b, c):
        if other is not None and (words := changed(a.settings, other.settings)):
            rows[f"settings that differ in {other.folder.name}"] = words
    rows["intervals"] = certificate.rule_words(result)
    return rows


def changed(a: dict[str, Any], b: dict[str, Any]) -> str:
    """The values that differ, in words; "" where none does."""
    keys = [key for key in dict.fromkeys([*a, *b]) if a.get(key) != b.get(key)]
    return ", ".join(f"{key} {a.get(key)!r} to {b.get(key)!r}" for key in keys)

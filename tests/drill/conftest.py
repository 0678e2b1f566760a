"""Where a drill's figures go: a table on the terminal, and ``runs/drill/NAME.json`` for whoever compares two runs."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

Row = dict[str, object]
Publish = Callable[[str, list[Row]], None]
FOLDER = Path(__file__).parents[2] / "runs" / "drill"


@pytest.fixture
def publish(capsys: pytest.CaptureFixture[str]) -> Publish:
    """``publish(name, rows)``: before anything is asserted, so that a failed drill leaves its figures too."""

    def write(name: str, rows: list[Row]) -> None:
        FOLDER.mkdir(parents=True, exist_ok=True)
        load = [round(n, 2) for n in os.getloadavg()]
        (FOLDER / f"{name}.json").write_text(json.dumps({"load_average": load, "rows": rows}, indent=1) + "\n")
        heads = list(rows[0])
        lines = [[str(row[head]) for head in heads] for row in rows]
        widths = [max(map(len, column)) for column in zip(heads, *lines, strict=True)]
        with capsys.disabled():
            print(f"\n{name} (load average {load[0]})")
            for line in (heads, *lines):
                print("  " + "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))

    return write

"""Every notebook is a short argument: question, method, figure, decision, check; no logic, no stored outputs.

Run: python -m pytest tests/notebooks -q
Mutations that it catches are its own tests below: each breaks one rule of a real notebook.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode

ROOT = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(ROOT.glob("*.ipynb"))
HEADINGS = ["Question", "Method", "Figure", "Decision", "Check"]
MOST_LINES = 12
PACKAGES = {"sim", "numpy", "pandas", "scipy", "matplotlib"}
LOGIC = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.For, ast.While, ast.If, ast.Try, ast.With)
KERNEL = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def faults(notebook: NotebookNode) -> list[str]:
    """What is wrong with the shape of a notebook, one line each."""
    found = []
    words = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    lines = [line for source in words for line in source.splitlines()]
    if [line.removeprefix("## ") for line in lines if line.startswith("## ")] != HEADINGS:
        found.append(f"the headings are not {', '.join(HEADINGS)}")
    if not words or not words[0].startswith("# ") or "?" not in words[0].splitlines()[0]:
        found.append("the title asks no question")
    if not code or not any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(code[-1].source))):
        found.append("the last cell checks nothing")
    if notebook.metadata != KERNEL:
        found.append("metadata other than the kernel's")
    if len({cell.get("id") for cell in notebook.cells}) != len(notebook.cells):
        found.append("cells without ids of their own")
    for cell in code:
        found += [f"{cell.id}: {fault}" for fault in _cell_faults(cell)]
    return found


def _cell_faults(cell: NotebookNode) -> list[str]:
    found = []
    if cell.outputs:
        found.append("stored outputs")
    if cell.execution_count is not None:
        found.append("an execution count")
    if cell.metadata:
        found.append("metadata")
    if len(cell.source.splitlines()) > MOST_LINES:
        found.append(f"more than {MOST_LINES} lines")
    for node in ast.walk(ast.parse(cell.source)):
        if isinstance(node, LOGIC):
            found.append(f"logic: {type(node).__name__}")
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or "."] if isinstance(node, ast.ImportFrom) else []
        found += [f"imports {name}" for name in names if name.partition(".")[0] not in PACKAGES]
    return found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_has_the_shape(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert faults(notebook) == []


def test_there_is_a_first_notebook_and_the_table_names_each() -> None:
    assert "00_start_here" in [path.stem for path in NOTEBOOKS]
    table = (ROOT / "README.md").read_text()
    assert [path.name for path in NOTEBOOKS if path.name not in table] == []


def _code(notebook: NotebookNode, source: str) -> None:
    notebook.cells[2].source += f"\n{source}"


def _swap(notebook: NotebookNode) -> None:
    notebook.cells[0], notebook.cells[1] = notebook.cells[1], notebook.cells[0]


BREAKS: dict[str, tuple[str, Callable[[NotebookNode], object]]] = {
    "order": ("headings", _swap),
    "heading gone": ("headings", lambda n: n.cells.pop(1)),
    "heading twice": ("headings", lambda n: n.cells.append(n.cells[1])),
    "no question": ("question", lambda n: n.cells[0].update(source=n.cells[0].source.replace("?", "."))),
    "no check": ("checks nothing", lambda n: n.cells[-1].update(source="print(1)")),
    "kernel": ("metadata", lambda n: n.metadata.kernelspec.update(name="my-venv")),
    "version": ("metadata", lambda n: n.metadata.language_info.update(version="3.11.7")),
    "output": ("outputs", lambda n: n.cells[2].outputs.append(nbformat.v4.new_output("stream", text="x"))),
    "count": ("count", lambda n: n.cells[2].update(execution_count=1)),
    "collapsed": ("metadata", lambda n: n.cells[2].metadata.update(collapsed=True)),
    "long": ("lines", lambda n: _code(n, "x = 1\n" * MOST_LINES)),
    "def": ("FunctionDef", lambda n: _code(n, "def f(): pass")),
    "class": ("ClassDef", lambda n: _code(n, "class A: pass")),
    "loop": ("For", lambda n: _code(n, "for i in []: pass")),
    "branch": ("If", lambda n: _code(n, "if bench: pass")),
    "import": ("imports os", lambda n: _code(n, "import os")),
    "import from": ("imports engine", lambda n: _code(n, "from engine.scenario import load")),
    "ids": ("ids", lambda n: n.cells[1].update(id=n.cells[0].id)),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_break_is_seen(name: str) -> None:
    words, break_it = BREAKS[name]
    notebook = copy.deepcopy(nbformat.read(ROOT / "00_start_here.ipynb", as_version=4))
    break_it(notebook)
    assert any(words in fault for fault in faults(notebook)), faults(notebook)

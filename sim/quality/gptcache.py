"""GPTCache itself, with its defaults, on the same requests as our rules: a row of the table, where it is installed.

It runs in an environment of its own (``make bench-peers`` makes it) and gets our encoder's vectors. Tens of
milliseconds a request: the first shuffle only.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from engine.model.folder import cache_dir
from sim.quality.contest import Row, Setting, row
from sim.quality.fill import Outcomes

DRIVER = Path(__file__).parents[2] / "tests" / "bench" / "peers" / "gptcache_answers.py"
SETTINGS = ("Banking77, filling", "Banking77, full", "traps")
NAME = "GPTCache 0.1.44 itself"


def peer_python() -> Path | None:
    """The interpreter that has it; None where nobody installed it, or the checkout's ``tests`` are not here."""
    python = cache_dir() / "peers" / "gptcache" / "bin" / "python"
    return python if python.exists() and DRIVER.exists() else None


def gptcache_row(setting: Setting, python: Path) -> Row:
    """Of the first shuffle."""
    return row(setting.name, NAME, [answered(setting, python)], 0)


def answered(setting: Setting, python: Path) -> Outcomes:
    """What it serves, and what of it is another label's."""
    questions, order = setting.replay.questions, setting.orders[0]
    names = {scope: at for at, scope in enumerate(dict.fromkeys(questions.scopes))}
    with tempfile.TemporaryDirectory() as folder:
        given = Path(folder) / "given.npz"
        np.savez(
            given, vectors=questions.vectors, scopes=np.array([names[scope] for scope in questions.scopes]),
            stored=setting.stored, asked=order, insert=setting.insert,
        )  # fmt: skip
        done = subprocess.run(
            [python, DRIVER, given, folder], check=True, text=True, stdout=subprocess.PIPE,
            env=dict(os.environ, OMP_WAIT_POLICY="PASSIVE", PIP_NO_INDEX="1"),
        )  # fmt: skip
    rows = np.array(json.loads(done.stdout.splitlines()[-1]))
    labels = np.array(setting.replay.label_of)
    served, none = rows >= 0, np.zeros(len(rows), bool)
    return Outcomes(served, served & (labels[rows] != labels[order]), none, none)

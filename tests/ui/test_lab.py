"""The first notebook as a person meets it: ``doorbuster lab``, "Run All Cells", figures on the screen.

Run: make test-ui, or python -m pytest -m ui tests/ui/test_lab.py -q
Faults it found: figures shown as their repr; a dialog of Jupyter news; an import's warning above the first table.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.ui.conftest import ROOT, SHOTS, Tab

NOTEBOOK = "00_start_here"
FEWEST_COLOURS = 12
RUN_MS = 240_000  # the notebook's cells: about 45 s on two quiet cores

INSIDE = "x => x.getBoundingClientRect().right <= x.closest('.jp-Cell').getBoundingClientRect().right"
FAILED = "[data-mime-type='application/vnd.jupyter.error']"
DONE = f"""cells => {{
  if (document.querySelector("{FAILED}")) return true;
  const found = [...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')];
  return found.length == cells && found.every(prompt => /\\[\\d+\\]/.test(prompt.textContent));
}}"""


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[str]:
    """The address of JupyterLab on a copy of the notebook: it saves what it runs."""
    copy = tmp_path / f"{NOTEBOOK}.ipynb"
    shutil.copy(ROOT / "notebooks" / copy.name, copy)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    token = secrets.token_hex(16)
    env = {**os.environ, "JUPYTER_TOKEN": token, "DOORBUSTER_PROFILE": "ci"}
    env["JUPYTER_CONFIG_DIR"] = str(tmp_path / "config")
    command = [sys.executable, "-m", "sim.cli", "lab", "--notebook", str(copy), "--port", str(port), "--no-browser"]
    log = (tmp_path / "lab.log").open("w+")
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        yield f"http://127.0.0.1:{port}/lab/tree/{copy.name}?token={token}"
    finally:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        log.close()


def test_the_first_notebook_runs_in_jupyterlab(lab: str, tab: Tab) -> None:
    page = tab.page
    _open(tab, lab)
    page.locator(".jp-Notebook").wait_for(timeout=60_000)
    page.locator(".jp-CodeCell").first.wait_for(timeout=60_000)
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for(timeout=60_000)
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    cells = json.loads((ROOT / "notebooks" / f"{NOTEBOOK}.ipynb").read_text())["cells"]
    page.wait_for_function(DONE, arg=sum(cell["cell_type"] == "code" for cell in cells), timeout=RUN_MS)

    failed = page.locator(FAILED)
    assert failed.count() == 0, failed.first.inner_text()
    assert page.locator(".jp-Dialog").count() == 0, "something asks for attention"
    assert page.locator("[data-mime-type='application/vnd.jupyter.stderr']").count() == 0, "a cell warns"
    figures = page.locator(".jp-OutputArea-output img")
    assert figures.count() == 3
    SHOTS.mkdir(parents=True, exist_ok=True)
    for i in range(figures.count()):
        picture = np.asarray(Image.open(io.BytesIO(figures.nth(i).screenshot())).convert("RGB")).reshape(-1, 3)
        assert len(np.unique(picture, axis=0)) >= FEWEST_COLOURS, "a blank figure"
        assert figures.nth(i).evaluate(INSIDE), "wider than its cell"
        page.screenshot(path=SHOTS / f"lab-{i}.png")
    page.locator(".jp-CodeCell").last.scroll_into_view_if_needed()
    page.screenshot(path=SHOTS / "lab-end.png")
    assert [url for url in tab.asked if "//127.0.0.1:" not in url] == [], "asked for something outside of this machine"
    assert tab.complaints == []


def _open(tab: Tab, url: str) -> None:
    """As soon as it listens."""
    for _ in range(120):
        try:
            tab.page.goto(url)
        except Exception as error:
            if "ERR_CONNECTION_REFUSED" not in str(error):
                raise
            tab.page.wait_for_timeout(500)
        else:
            tab.complaints.clear()
            return
    pytest.fail("JupyterLab did not answer within a minute")

"""The pages that runs leave, in a real browser: they fetch nothing, fit the screen, and no word covers another.

Run: make test-ui, or python -m pytest -m ui tests/ui/test_pages.py -q
Mutations it caught: an image from another host; a script; a table that widens the page; grey body text; a key over an
axis; figures without ink. Faults it found: rotated labels over one another, and a key cut off, in the certificate.
"""

from __future__ import annotations

import io
import itertools
from pathlib import Path

import msgspec
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from sim.desk import side_by_side
from sim.desk.certificate import render as render_certificate
from sim.desk.compare import pair
from sim.desk.report import RunView
from sim.desk.report import render as render_report
from sim.desk.summary import verdict
from sim.desk.workbench import Workbench
from tests.sim.test_report import CARD, EVIL, SALE, view
from tests.ui.conftest import Tab

WIDTHS, SCHEMES = (1280, 768, 390), ("light", "dark")
SCREENS = list(itertools.product(WIDTHS, SCHEMES))
FEWEST_COLOURS = 12  # of a figure's picture: a blank one has one, an empty frame three or four

WORDS = """svg => [...svg.querySelectorAll('g[id*="-text_"]')].map(g => {
  const r = g.getBoundingClientRect();
  return {id: g.id, left: r.left, top: r.top, right: r.right, bottom: r.bottom};
}).filter(r => r.right > r.left && r.bottom > r.top)"""
BOX = """svg => {
    const r = svg.getBoundingClientRect()
    return {left: r.left, top: r.top, right: r.right, bottom: r.bottom}
}"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A report of two real sales (in the twin; the first plays the live one), one with hostile names, two others."""
    folder = tmp_path_factory.mktemp("pages")
    bench = Workbench("flash-sale", "model.name=fake", base_s=5, ramp_s=10, plateau_s=15, decay_s=5, root=folder)
    few, half = bench.sim("batcher.slots=12"), bench.sim("batcher.slots=8")
    sales = {"as it is": bench.sim(), "fewer slots": few, "half": half}
    first, twin = sales["as it is"], sales["fewer slots"]
    live = RunView(msgspec.structs.replace(first.summary, kind="live"), first.frame, first.levels, first.scenario)
    judged = verdict(live.frame, live.levels, live.scenario)
    card = {"scenario": "flash-sale, seed 7", "machine": "a CPU with a long name " * 3}
    evil, twin_of_evil = view(1, "live"), view(2, "twin")
    extra = {f"Replay {EVIL}": pd.DataFrame({"journal": [EVIL, "b"], "error": [0.125, None]})}
    found = bench.compare(live, twin)
    texts = {
        "report": render_report(live, twin, judged, card, {}),
        "report-alone": render_report(twin, None, None, card, {}),
        "report-hostile": render_report(evil, twin_of_evil, verdict(evil.frame, evil.levels, SALE), CARD, extra),
        "certificate": render_certificate(found, pair(live.frame, twin.frame), ("live", "twin"), card),
        "lab-compare": side_by_side.render({"live": live, **sales}, card),
    }
    out = {name: folder / f"{name}.html" for name in texts}
    for name, text in texts.items():
        out[name].write_text(text, encoding="utf-8")
    return out


@pytest.mark.parametrize("tab", SCREENS, indirect=True, ids=[f"{w}-{s}" for w, s in SCREENS])
@pytest.mark.parametrize("name", ["report", "report-alone", "report-hostile", "certificate", "lab-compare"])
def test_a_page_stands_alone_and_fits(pages: dict[str, Path], name: str, tab: Tab) -> None:
    tab.page.goto(pages[name].as_uri())
    tab.shot(name)
    tab.page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert tab.complaints == []
    assert tab.asked == [], "the page asks for something outside of itself"
    room, needs = tab.page.evaluate("[document.documentElement.clientWidth, document.documentElement.scrollWidth]")
    assert needs <= room, f"the page is {needs - room} px wider than its window"
    assert _contrast(tab) >= 7, "body text on its background (WCAG AAA)"


@pytest.mark.parametrize("tab", [(1280, "light"), (390, "light")], indirect=True, ids=["1280", "390"])
@pytest.mark.parametrize("name", ["report", "report-alone", "report-hostile", "certificate", "lab-compare"])
def test_a_figure_is_there_and_its_words_do_not_touch(pages: dict[str, Path], name: str, tab: Tab) -> None:
    tab.page.goto(pages[name].as_uri())
    figures = tab.page.query_selector_all("figure svg")
    assert figures
    for figure in figures:
        label = (figure.get_attribute("aria-label") or "")[:40]
        box, words = figure.evaluate(BOX), figure.evaluate(WORDS)
        assert box["right"] - box["left"] > 300 and box["bottom"] - box["top"] > 80, label
        assert len(words) > 3, label
        out = [w["id"] for w in words if _outside(w, box)]
        assert out == [], f"{label}: cut off at the edge"
        touching = [(a["id"], b["id"]) for a, b in itertools.combinations(words, 2) if _overlap(a, b)]
        assert touching == [], f"{label}: words over words"
        picture = np.asarray(Image.open(io.BytesIO(figure.screenshot())).convert("RGB")).reshape(-1, 3)
        assert len(np.unique(picture, axis=0)) >= FEWEST_COLOURS, f"{label}: blank"


def _outside(word: dict[str, float], box: dict[str, float], slack_px: float = 0.5) -> bool:
    return (
        word["left"] < box["left"] - slack_px or word["top"] < box["top"] - slack_px
        or word["right"] > box["right"] + slack_px or word["bottom"] > box["bottom"] + slack_px
    )


def _overlap(a: dict[str, float], b: dict[str, float], slack_px: float = 1.0) -> bool:
    wide = min(a["right"], b["right"]) - max(a["left"], b["left"])
    high = min(a["bottom"], b["bottom"]) - max(a["top"], b["top"])
    return wide > slack_px and high > slack_px


def _contrast(tab: Tab) -> float:
    """Of the body's text, as WCAG 2.2 counts it."""
    colours = tab.page.evaluate(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
    )
    lights = []
    for colour in colours:
        parts = [float(x) / 255 for x in colour.partition("(")[2].rstrip(")").split(",")[:3]]
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
        lights.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(lights) + 0.05) / (min(lights) + 0.05)

"""The status page of a real engine in a real browser: whole, uncut, live, and asking for nothing but its events.

Run: make test-ui, or python -m pytest -m ui tests/ui/test_status_page.py -q
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Iterator

import msgspec
import numpy as np
import pytest
from PIL import Image

from tests.service.harness import CHAT, SCENARIO, STEP_20_MS, Engine, body, start
from tests.ui.conftest import Tab

WIDTHS, SCHEMES = (1280, 390), ("light", "dark")
SCREENS = list(itertools.product(WIDTHS, SCHEMES))
NAME = "a-class-with-quite-a-long-name"

WORDS = """() => {
  const out = [], walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const parent = walk.currentNode.parentElement, range = document.createRange();
    if (!walk.currentNode.textContent.trim() || parent.closest('script')) continue;
    range.selectNodeContents(walk.currentNode);
    for (const r of range.getClientRects()) {
      out.push({text: walk.currentNode.textContent.trim(), left: r.left, top: r.top, right: r.right, bottom: r.bottom});
    }
  }
  return out;
}"""  # every line of text, where it is


@pytest.fixture(scope="module")
def busy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """An engine that has answered some, refused some, and has a class that nobody asks for."""
    classes = SCENARIO.classes | {NAME: msgspec.structs.replace(SCENARIO.classes["chat"], criticality="sheddable")}
    cost = msgspec.structs.replace(STEP_20_MS, fixed_ns=2e6)
    with start(tmp_path_factory.mktemp("status"), cost, classes=classes) as engine:
        with engine.http() as client, engine.http("trickle") as trickle:
            for n in range(30):
                assert client.post(CHAT, json=body(f"question {n % 20}")).status_code == 200
                trickle.post(CHAT, json=body("again and again"))
        yield engine


def opened(tab: Tab, engine: Engine) -> None:
    tab.page.goto(engine.url, wait_until="domcontentloaded")
    says(tab, "#link", "live")
    tab.page.locator("#load rect").nth(1).wait_for(state="attached")


def says(tab: Tab, where: str, text: str) -> None:
    """Waits until it does; the page's content policy forbids what ``wait_for_function`` does."""
    tab.page.locator(where).filter(has_text=re.compile(f"^{text}")).wait_for()


@pytest.mark.parametrize("tab", SCREENS, indirect=True, ids=[f"{w}-{s}" for w, s in SCREENS])
def test_nothing_is_blank_cut_or_covered(busy: Engine, tab: Tab) -> None:
    opened(tab, busy)
    tab.shot("status")
    assert tab.complaints == []
    assert set(tab.asked) == {f"{busy.url}/", f"{busy.url}/status/events"}
    room, needs = tab.page.evaluate("[document.documentElement.clientWidth, document.documentElement.scrollWidth]")
    assert needs <= room, f"the page is {needs - room} px wider than its window"
    words = tab.page.evaluate(WORDS)
    assert len(words) > 55
    cut = [w["text"] for w in words if w["left"] < 0 or w["right"] > room]
    assert cut == []
    pairs = itertools.combinations(words, 2)
    assert [(a["text"], b["text"]) for a, b in pairs if overlap(a, b)] == [], "words over words"
    empty = tab.page.evaluate("[...document.querySelectorAll('h1, td, dd, b, tbody th')].filter(e => !e.textContent)")
    assert empty == []
    assert tab.page.evaluate("document.querySelectorAll('#classes tbody tr').length") == 4
    chart = tab.page.query_selector("#load")
    assert chart is not None
    picture = np.asarray(Image.open(io.BytesIO(chart.screenshot())).convert("RGB")).reshape(-1, 3)
    seen, counts = np.unique(picture, axis=0, return_counts=True)
    assert len(seen) > 3 and counts.min() < counts.max(), "the chart has bars of several tiers"


def overlap(a: dict[str, float], b: dict[str, float], slack_px: float = 1.0) -> bool:
    wide = min(a["right"], b["right"]) - max(a["left"], b["left"])
    high = min(a["bottom"], b["bottom"]) - max(a["top"], b["top"])
    return wide > slack_px and high > slack_px


def test_it_is_live_and_says_when_it_is_not(busy: Engine, tab: Tab) -> None:
    opened(tab, busy)
    served = "#classes tbody tr:first-child td:nth-child(2)"
    before = int(tab.page.locator(served).inner_text())
    with busy.http() as client:
        for n in range(3):
            assert client.post(CHAT, json=body(f"something new {n}")).status_code == 200
    says(tab, served, f"{before + 3}$")
    tab.page.context.set_offline(True)
    busy.call(lambda: [each.transport.abort() for each in list(busy.inside.connections)])
    says(tab, "#link", "connection lost")
    tab.page.context.set_offline(False)
    says(tab, "#link", "live")

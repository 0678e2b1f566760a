"""A real browser, one for all tests of this folder, that tells what it fetched and what it complained about."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

ROOT = Path(__file__).parents[2]
SHOTS = ROOT / "runs" / "ui"
Scheme = Literal["light", "dark"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All of this folder needs a browser."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("ui")


@dataclass
class Tab:
    """A page and what went on in it. ``asked``: every address but files and data; ``complaints``: of the console."""

    page: Page
    screen: str = ""
    asked: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def listen(self) -> None:
        self.page.on("request", lambda request: self._asked(request.url))
        self.page.on("console", lambda said: self._said(said.type, said.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))

    def shot(self, name: str) -> Path:
        """The whole page as a picture, for people."""
        SHOTS.mkdir(parents=True, exist_ok=True)
        path = SHOTS / f"{name}-{self.screen}.png"
        self.page.screenshot(path=path, full_page=True)
        return path

    def _asked(self, url: str) -> None:
        if not url.startswith(("file:", "data:", "blob:")):
            self.asked.append(url)

    def _said(self, kind: str, text: str) -> None:
        if kind == "error":
            self.complaints.append(text)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Chromium without a window."""
    found = subprocess.run(["sh", str(ROOT / ".ci" / "browser")], check=True, capture_output=True, text=True)
    path = found.stdout.strip()
    with sync_playwright() as playwright:
        args = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=path, args=args)
        yield browser
        browser.close()


@pytest.fixture
def tab(browser: Browser, request: pytest.FixtureRequest) -> Iterator[Tab]:
    """An empty tab; parametrise indirectly with (width, colour scheme)."""
    width, scheme = getattr(request, "param", (1280, "light"))
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    tab = Tab(context.new_page(), f"{width}-{scheme}")
    tab.listen()
    yield tab
    context.close()

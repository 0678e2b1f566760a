"""The report stands alone, says what the summaries say, and nothing from outside becomes markup. Then: progress."""

import html
import io
import json
import re
from html.parser import HTMLParser

import msgspec
import numpy as np
import pandas as pd
import pytest

from engine.config import ClassConfig, Scenario
from engine.events import LevelRecord, RequestRecord
from engine.units import MS_NS, S_NS
from sim.desk.frames import level_frame, requests_frame
from sim.desk.progress import Progress
from sim.desk.report import RunView, write_report
from sim.desk.summary import Summary, summarise, verdict

EVIL = "<script>alert('x')</script>"
EVIL_CLASS = '"><img src=http://evil.example/x onerror=alert(1)>'
EVIL_CRITICAL = "<i>pay</i>"
SALE = Scenario(
    name="flash</title>-sale",
    classes={
        "checkout": ClassConfig(criticality="critical", caches="none"),
        "question": ClassConfig(criticality="standard"),
        EVIL_CRITICAL: ClassConfig(criticality="critical"),
        EVIL_CLASS: ClassConfig(criticality="sheddable", fallback="tips.txt"),
    },
)
LEVELS = level_frame([LevelRecord(3_500_000_000, 3), LevelRecord(8 * S_NS, 0)], 12 * S_NS)
CARD = {"revision": "1a2b3c", "CPU": "Some <fast> one", EVIL: EVIL}
VOID = {"meta", "img", "br", "hr", "link", "input", "use", "path"}


def view(seed: int, kind: str, n: int = 300) -> RunView:
    rng = np.random.default_rng(seed)
    records = []
    for i in range(n):
        name = str(rng.choice(list(SALE.classes)))
        at = {"request_id": f"{EVIL}{i}", "tenant": EVIL, "traffic_class": name, "level": 0}
        at["arrived_ns"] = int(rng.uniform(0, 1.2e10))
        queue, ttft = int(rng.gamma(2, 1e8)), int(rng.uniform(3e8, 9e8))
        if name == EVIL_CLASS and i % 2:
            more = {"outcome": "served", "tier": "fallback", "error_code": "overloaded", "ttft_ns": 1, "e2e_ns": MS_NS}
        elif name == "question" and i % 3 == 0:
            more = {"outcome": "rejected", "error_code": EVIL, "e2e_ns": MS_NS}
        else:
            times = {"queue_ns": queue, "ttft_ns": queue + ttft, "e2e_ns": queue + 2 * ttft, "output_tokens": 9}
            more = {"outcome": "served", "tier": "model", "replica": 0, **times}
        records.append(RequestRecord(**at, **more))
    frame = requests_frame(records)
    return RunView(summarise(frame, SALE, kind, 7, 12.0, LEVELS, 0.5), frame, LEVELS, SALE)


class Page(HTMLParser):
    """Reads a page strictly: every tag that opens has to close in turn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.said: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID or (tag in ("path", "use") and not self.get_starttag_text().endswith("/>")):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag in VOID and (not self.open or self.open[-1] != tag):
            return
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        if self.open and data.strip():
            self.said.append((self.open[-1], data.strip()))

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]

    def text(self, tag: str) -> list[str]:
        return [data for name, data in self.said if name == tag]


@pytest.fixture(scope="module")
def both() -> tuple[RunView, RunView]:
    return view(1, "live"), view(2, "twin")


@pytest.fixture(scope="module")
def written(both, tmp_path_factory):
    live, twin = both
    extra = {f"Replay {EVIL}": pd.DataFrame({"journal": [EVIL, "b"], "error": [0.125, None]})}
    judged = verdict(live.frame, live.levels, SALE)
    return write_report(tmp_path_factory.mktemp("run"), live, twin, judged, CARD, extra)


@pytest.fixture(scope="module")
def text(written) -> str:
    return written.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(text) -> Page:
    return Page(text)


# ---------------------------------------------------------------- alone


def test_nothing_in_the_file_leads_out_of_it(text, page):
    for _, attrs in page.tags:
        for name in attrs:
            if name.split(":")[-1] in ("src", "href", "srcset", "action", "data", "poster", "xmlns"):
                assert attrs[name].startswith("#"), attrs
    assert re.findall(r"url\((?!#)", text) == [] and "@import" not in text
    outside = [m for m in re.findall(r"https?://[^\s\"'<&]+", html.unescape(text)) if "evil.example" not in m]
    assert outside == []
    assert "default-src 'none'" in html.unescape(text)


def test_the_file_is_small_and_where_it_should_be(written):
    assert written.name == "report.html"
    assert 50_000 < written.stat().st_size < 2_000_000


def test_a_report_never_overwrites_a_report(written, both):
    before = written.read_bytes()
    with pytest.raises(FileExistsError):
        write_report(written.parent, both[0], None, None, {})
    assert written.read_bytes() == before


def test_ids_are_unique_and_every_reference_finds_its_own(text, page):
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    used = set(re.findall(r"url\(#([^)]+)\)", text)) | {a["href"].removeprefix("#") for a in page.of("use")}
    assert used and used <= set(ids)


def test_a_name_cannot_become_markup(text, page):
    assert not any(bad in text for bad in (EVIL, EVIL_CLASS, EVIL_CRITICAL, "<img", "<i>"))
    assert [attrs.get("type") for attrs in page.of("script")] == ["application/json"]
    assert page.of("img") == []
    assert f"{EVIL}" in page.text("dd") and EVIL in page.text("dt")  # it is there, as text
    assert any(EVIL in said for said in page.text("td"))


# ---------------------------------------------------------------- what it says


def test_the_frame_of_the_page(page):
    assert page.of("html") == [{"lang": "en"}]
    assert page.text("title") == ["flash</title>-sale live, seed 7 · doorbuster report"]
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.of("meta")
    order = [tag for tag, _ in page.tags if tag in ("h1", "h2", "dl", "table", "svg")]
    assert order[:5] == ["h1", "h2", "dl", "h2", "table"]
    assert page.text("h2")[:3] == ["Where and how", "The whole run", "By class"]


def test_the_verdict_comes_first(text, page, both):
    judged = verdict(both[0].frame, LEVELS, SALE)
    assert judged.ok
    assert page.text("h1") == [judged.sentence] and "yes" in page.text("span")
    assert text.index(judged.sentence) < text.index("Where and how")
    for line in judged.lines:
        assert line.removeprefix("yes: ") in page.text("span")


def test_a_verdict_of_no_says_so(both, tmp_path):
    live = both[0]
    judged = verdict(live.frame[live.frame["traffic_class"] != EVIL_CRITICAL], level_frame([], S_NS), SALE)
    read = Page(write_report(tmp_path, live, None, judged, CARD).read_text())
    assert page_mood(read) == "no" and read.text("h1")[0].startswith("The sale did not hold: the overload level")
    assert f"{EVIL_CRITICAL} (critical) had no request" in read.text("h1")[0] and read.of("i") == []
    assert "✗" in read.text("b")


def page_mood(read: Page) -> str | None:
    return read.of("header")[0]["class"]


def test_the_table_has_live_twin_and_difference(text, both):
    rows = re.findall(r'<tr><th scope="row">(.*?)</th>(.*?)</tr>', text, flags=re.DOTALL)
    cells = {label: re.findall(r"<td>(.*?)</td>", rest) for label, rest in reversed(rows)}  # the whole run wins
    live, twin = (run.summary for run in both)
    change = f"{round(100 * (twin.served / live.served - 1)):+d} %" if twin.served != live.served else "0 %"
    assert cells["served"] == [str(live.served), str(twin.served), change]
    assert cells["model"][:2] == [str(live.tiers["model"]), str(twin.tiers["model"])]
    assert cells[html.escape(EVIL, quote=True).replace("&#x27;", "&#39;")][0] == str(live.rejected[EVIL])
    assert cells["first token, p99"][0] == f"{live.ttft_ms.p99 / 1000:.2f} s"


def test_every_figure_is_there_with_its_finding_and_its_table(text, page):
    labels = [attrs["aria-label"] for attrs in page.of("svg")]
    heads = ["The sale, second by second", "How long people waited", "The slowest of the served", "Who answered"]
    assert [label.split(":")[0] for label in labels] == heads
    findings = page.text("strong")
    assert [label.split(": ", 1)[1] for label in labels] == findings
    assert "At a peak of" in findings[0] and "came nearest" in findings[1]
    sections = text.split("<section>")[-5:-1]
    assert all(s.count("<svg") == 1 and s.count("<details>") == 1 and s.count("<table>") == 1 for s in sections)


def test_the_tables_under_the_figures_hold_what_is_drawn(both, text):
    timeline, latency, slowest, tiers = re.findall(r"<details>.*?</details>", text, flags=re.DOTALL)[1:]
    live = both[0]

    def grid(part: str) -> list[list[str]]:
        rows = re.findall(r"<tr>(.*?)</tr>", part, flags=re.DOTALL)
        return [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row) for row in rows]

    second = grid(timeline)
    assert second[0][:3] == ["second", "offered/s", "served/s live"] and len(second) == 13
    assert sum(float(row[1]) for row in second[1:]) == len(live.frame)
    top = second[0].index("highest level live")
    assert [row[top] for row in second[1:]] == ["0", "0", "0", *["3"] * 5, *["0"] * 4]
    found = {tuple(row[:3]): row[3:] for row in grid(latency)[1:]}
    n, p50, interval = found["checkout", "TTFT", "live"][:3]
    served = live.frame[live.frame["traffic_class"] == "checkout"]["ttft_ns"].dropna().astype(float) / MS_NS
    assert (n, p50) == (str(len(served)), f"{served.median():.1f} ms")
    low, high = interval.removesuffix(" ms").split(" ms to ")
    assert float(low) < served.median() < float(high)
    assert [row[:2] for row in grid(tiers)[1:]][:2] == [["checkout", "live"], ["checkout", "twin"]]
    asked = live.frame[live.frame["traffic_class"] == "question"]
    counts = [str((asked["outcome"] == outcome).sum()) for outcome in ("served", "rejected")]  # served: by the model
    assert grid(tiers)[3] == ["question", "live", *["0"] * 5, *counts]
    assert len(grid(slowest)) == 11
    assert float(grid(slowest)[1][-1]) == pytest.approx(live.frame["e2e_ns"].max() / MS_NS, abs=0.1)


def test_the_summaries_are_inside_as_json(text, both):
    raw = re.search(r'<script type="application/json" id="summaries">(.*?)</script>', text, flags=re.DOTALL)[1]
    assert "<" not in raw
    assert list(json.loads(raw)) == ["live", "twin"]
    assert msgspec.json.decode(raw, type=dict[str, Summary]) == {"live": both[0].summary, "twin": both[1].summary}


def test_extra_tables_stand_at_the_end(text, page):
    assert page.text("h2")[-1] == f"Replay {EVIL}"
    assert "<td>0.125</td>" in text and text.rindex("<td>b</td><td>–</td>") > text.rindex("<svg")


def test_a_lone_twin_is_shown_as_the_twin(tmp_path):
    read = Page(write_report(tmp_path, view(3, "sim"), None, None, CARD).read_text())
    heads = [attrs for attrs in read.of("th") if attrs.get("class")]
    assert [attrs["class"] for attrs in heads] == ["twin", "twin"]
    assert page_mood(read) == "" and "requests were served" in read.text("h1")[0]
    assert "difference" not in read.text("th") and len(read.of("svg")) == 4


def test_an_empty_run_makes_a_report(tmp_path):
    frame = requests_frame([])
    summary = summarise(frame, SALE, "live", 1, 12.0, LEVELS, None)
    read = Page(write_report(tmp_path, RunView(summary, frame, LEVELS, SALE), None, None, {}).read_text())
    assert "No request was served" in read.text("strong")


# ---------------------------------------------------------------- progress


class Clock:
    """Seconds by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_pipe_gets_a_line_at_each_tenth():
    clock, out = Clock(), io.StringIO()
    with Progress("sweep", 400, "runs", budget_s=50, stream=out, clock=clock) as progress:
        for _ in range(400):
            clock.now += 0.1
            progress.step()
    said = out.getvalue().splitlines()
    assert len(said) == 11  # the first one, and ten tenths
    assert said[0].startswith("sweep 1/400 runs")
    assert said[3] == "sweep 120/400 runs  10/s  28 s left  budget 24 %"
    assert said[-1] == "sweep 400/400 runs  10/s  0 s left  budget 80 %"


def test_a_pipe_that_jumps_says_each_tenth_once():
    out = io.StringIO()
    progress = Progress("x", 100, stream=out, clock=Clock())
    for done in (35, 36, 39, 71, 100):
        progress.update(done)
    assert [line.split()[1] for line in out.getvalue().splitlines()] == ["35/100", "71/100", "100/100"]


def test_a_terminal_gets_one_line_rewritten_in_place_and_not_too_often():
    clock, out = Clock(), Terminal()
    with Progress("load", 1000, stream=out, clock=clock) as progress:
        for _ in range(1000):
            clock.now += 0.01
            progress.step()
    said = out.getvalue()
    assert said.count("\n") == 1 and said.endswith("\n")
    frames = said.strip().split("\r")
    assert 80 <= len(frames) <= 110  # ten seconds, at most ten a second
    assert frames[-1] == "load 1000/1000  100/s  0 s left"
    assert max(map(len, frames)) < 79


def test_a_shorter_line_wipes_the_longer_one():
    clock, out = Clock(), Terminal()
    progress = Progress("x", 100_000, "requests", stream=out, clock=clock)
    clock.now += 1000
    progress.update(1)
    long = out.getvalue().removeprefix("\r")
    out.seek(0)
    out.truncate()
    clock.now += 1
    progress.update(100_000)
    assert len(out.getvalue().removeprefix("\r")) >= len(long)


def test_a_notebook_updates_one_output(monkeypatch):
    shown: list[dict] = []

    class Handle:
        def update(self, content, raw):
            shown.append(content)

    def display(content, raw, display_id):
        shown.append(content | {"first": True})
        return Handle()

    monkeypatch.setattr("IPython.display.display", display)
    clock = Clock()
    with Progress("plan", 3, clock=clock, face="notebook") as progress:
        for _ in range(3):
            clock.now += 1
            progress.step()
    assert [content.get("first", False) for content in shown] == [True, False, False, False]
    assert shown[-1] == {"text/plain": "plan 3/3  1/s  0 s left"}


def test_talk_goes_to_stderr(capsys):
    with Progress("x", 1) as progress:
        progress.step()
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("x 1/1")


def test_long_and_unknown_times_are_readable():
    clock = Clock()
    progress = Progress("x", 100, stream=io.StringIO(), clock=clock)
    assert progress.line() == "x 0/100"
    clock.now += 60
    progress.update(1)
    assert progress.line() == "x 1/100  0.017/s  99 min left"
    clock.now += 600
    assert progress.line().endswith("18.1 h left")
    Progress("nothing", 0, stream=io.StringIO()).update(0)

"""The bench behind the notebooks, and ``doorbuster lab``: one load for all settings, runs that other verbs can read.

Run: python -m pytest tests/sim/test_workbench.py -q
Mutations it caught: a load that follows a setting; a decided bench on the old file, or in place of the old bench; a
page over a page; the same run twice.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.errors import UserError
from sim.desk.side_by_side import numbers
from sim.desk.trials import AS_IT_IS
from sim.desk.workbench import Workbench
from sim.lab import compare_runs, jupyter, views


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    """Short sales."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DOORBUSTER_PROFILE", "ci")
        root = tmp_path_factory.mktemp("bench")
        return Workbench("flash-sale", "model.name=fake", base_s=2, ramp_s=2, plateau_s=6, decay_s=2, root=root)


def test_settings_meet_the_same_sale(bench: Workbench) -> None:
    before, fewer = bench.sim(), bench.sim("batcher.slots=4")
    assert list(before.frame["request_id"]) == list(fewer.frame["request_id"])
    assert list(before.frame["arrived_ns"]) == list(fewer.frame["arrived_ns"])
    assert fewer.scenario.batcher.slots == 4 and before.scenario.batcher.slots == 16
    assert before.summary.goodput_rps != fewer.summary.goodput_rps
    other = bench.sim(seed=bench.seed + 1)
    assert list(other.frame["arrived_ns"]) != list(before.frame["arrived_ns"])


def test_a_sale_can_be_had_again(bench: Workbench) -> None:
    assert bench.sim().summary == bench.sim().summary
    found = bench.compare(bench.sim(), bench.sim())
    assert found.decision_agreement == 1.0 and found.verdict == "yes"


def test_each_setting_is_tried_on_each_sale(bench: Workbench) -> None:
    trials = bench.try_each({"fewer": ("batcher.slots=4",)})
    seeds = [bench.seed + i for i in range(bench.profile.seeds)]
    assert [(t.setting, t.seed) for t in trials] == [(n, s) for n in (AS_IT_IS, "fewer") for s in seeds]
    assert bench.choose(trials).setting in (AS_IT_IS, "fewer")


def test_a_decided_bench_plays_the_file(bench: Workbench, tmp_path: Path) -> None:
    decided = bench.decide(tmp_path / "decided.toml", "batcher.slots=4", why="a test")
    assert decided.resolved.path == str(tmp_path / "decided.toml") and decided.base_rps == bench.base_rps
    assert decided.scenario.model.name == "fake"
    assert decided.sim().summary == bench.sim("batcher.slots=4").summary
    assert bench.scenario.batcher.slots == 16


def test_the_card_says_what_was_run(bench: Workbench) -> None:
    rows = bench.card[""]
    assert f"base {bench.base_rps:.2f}/s" in rows["load"] and "+300%" in rows["load"]
    assert rows["repeated"].endswith("(DOORBUSTER_PROFILE=ci)") and "fake, at the pace of" in rows["model"]


def test_an_unknown_profile_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DOORBUSTER_PROFILE", "huge")
    with pytest.raises(UserError, match="no notebook profile 'huge'"):
        Workbench("flash-sale", root=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_runs_side_by_side(bench: Workbench, tmp_path: Path) -> None:
    bench.sim(), bench.sim("batcher.slots=4")
    a, b = sorted(path for path in bench.folder.iterdir() if path.is_dir())[-2:]
    summaries, _, page = compare_runs([a, b], tmp_path / "page.html")
    assert list(summaries) == [a.name.replace("_", " "), b.name.replace("_", " ")]
    text = page.read_text()
    assert "batcher.slots 16 to 4" in text and "<svg" in text and "http" not in text.replace("http-equiv", "")
    table = numbers(views([a, b])).set_index("measure")
    assert table.loc["offered"].tolist() == [str(s.offered) for s in summaries.values()]
    assert table.loc["recommendation: degraded, shed"].nunique() == 2
    with pytest.raises(UserError, match="never overwrites"):
        compare_runs([a, b], page)
    with pytest.raises(UserError, match="twice"):
        compare_runs([a, a], tmp_path / "other.html")
    with pytest.raises(UserError, match="one run"):
        compare_runs([a], tmp_path / "other.html")


def test_lab_opens_a_notebook_that_is_there(tmp_path: Path) -> None:
    command = jupyter("00_start_here", 8899, browser=False)
    assert command[3].endswith("notebooks/00_start_here.ipynb")
    assert {"--ip=127.0.0.1", "--port=8899", "--no-browser", "--LabApp.news_url=None"} <= set(command)
    with pytest.raises(UserError, match="no notebook '01_x'"):
        jupyter("01_x", 8899, browser=True)

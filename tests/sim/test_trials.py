"""Which setting is chosen, and what is written of it.

Run: python -m pytest tests/sim/test_trials.py -q
Mutations it caught: an unpaired interval; a gain that may be chance; a critical class that pays; an unweighted share; a
decision over a file; a draft that stays; a file that the engine has not read.
"""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from engine.errors import ScenarioError, UserError
from engine.scenario import load
from sim.desk.decision import write_decision
from sim.desk.overlay import settings, settings_finding
from sim.desk.summary import ClassSummary, Quantiles, Rate, Summary
from sim.desk.trials import ALL, AS_IT_IS, Trial, choose, tidy

RESOLVED = load("flash-sale")
NOTHING = Quantiles(None, None, None, 0)
CLASSES = {"payment_fraud": 100, "checkout_help": 300, "product_qa": 400, "recommendation": 200}


def trial(setting: str, seed: int, payments: float, others: float) -> Trial:
    shares = {name: payments if name == "payment_fraud" else others for name in CLASSES}
    classes = {name: ClassSummary(n, n, 0, 0, shares[name], NOTHING, NOTHING) for name, n in CLASSES.items()}
    summary = Summary(
        "flash-sale", "sim", seed, 10.0, 1000, 1000, 1.0, None, Rate(), {}, {}, classes, NOTHING, NOTHING, NOTHING, 1,
        None, {},
    )
    return Trial(setting, (f"exact.ttl_s={len(setting)}",), seed, summary)


def tried(**shares: list[tuple[float, float]]) -> list[Trial]:
    """(payments, others) by seed; ``base`` is the scenario as it is."""
    names = {name: AS_IT_IS if name == "base" else name for name in shares}
    return [trial(names[name], seed, *pair) for name, pairs in shares.items() for seed, pair in enumerate(pairs)]


def test_the_share_of_all_is_weighted_by_what_was_offered() -> None:
    frame = tidy([trial("x", 1, 1.0, 0.5)])
    assert frame[frame["traffic_class"] == ALL]["within_slo"].item() == pytest.approx(0.1 + 0.9 * 0.5)
    assert len(frame) == len(CLASSES) + 1


def test_the_best_wins_by_pairs_though_sales_differ_more_than_settings() -> None:
    base = [(1.0, 0.3), (1.0, 0.9), (1.0, 0.6)]
    better = [(1.0, 0.32), (1.0, 0.921), (1.0, 0.619)]
    best = [(1.0, 0.34), (1.0, 0.941), (1.0, 0.639)]
    found = choose(tried(base=base, better=better, best=best), RESOLVED.scenario)
    assert (found.setting, found.changes, found.seeds) == ("best", ("exact.ttl_s=4",), 3)
    assert found.low < found.gain < found.high
    assert found.gain == pytest.approx(0.9 * 0.04)
    assert "best: 67.6% of all requests within their SLO, +3.6 points" in str(found)


def test_a_gain_that_may_be_chance_is_none() -> None:
    base = [(1.0, 0.5), (1.0, 0.5), (1.0, 0.5)]
    lucky = [(1.0, 0.9), (1.0, 0.45), (1.0, 0.5)]
    found = choose(tried(base=base, lucky=lucky), RESOLVED.scenario)
    assert found.setting == AS_IT_IS and found.changes == ()
    assert "No setting keeps more" in settings_finding(found)
    assert choose(tried(base=base[:1], one=[(1.0, 0.9)]), RESOLVED.scenario).setting == AS_IT_IS


def test_payments_do_not_pay_for_it() -> None:
    base = [(1.0, 0.5), (1.0, 0.5)]
    greedy = [(0.9, 0.8), (0.9, 0.81)]
    assert choose(tried(base=base, greedy=greedy), RESOLVED.scenario).setting == AS_IT_IS


def test_other_sales_are_not_compared() -> None:
    with pytest.raises(UserError, match="not tried on the same sales"):
        choose(tried(base=[(1.0, 0.5)], x=[(1.0, 0.5), (1.0, 0.6)]), RESOLVED.scenario)
    with pytest.raises(UserError, match="as it is"):
        choose(tried(x=[(1.0, 0.5)]), RESOLVED.scenario)


def test_the_figure_has_a_row_a_setting_and_says_what_was_found() -> None:
    trials = tried(base=[(1.0, 0.5), (1.0, 0.6)], best=[(1.0, 0.8), (1.0, 0.9)])
    figure = settings(tidy(trials), RESOLVED.scenario, choose(trials, RESOLVED.scenario))
    assert figure.get_suptitle().startswith("Best: 86.5% of all requests")
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == [AS_IT_IS, "best"]
    assert len(figure.axes) == 1 + len(CLASSES)


# ---------------------------------------------------------------- the file


def test_a_decision_changes_its_values_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "new" / "decided.toml"
    found = write_decision(RESOLVED, ("exact.ttl_s=300", "overload.window_ms=200"), path, "because\nof this")
    assert found.scenario.exact.ttl_s == 300 and found.scenario.overload.window_ms == 200
    before, after = tomllib.loads(RESOLVED.text), tomllib.loads(path.read_text())
    before["exact"]["ttl_s"], before["overload"]["window_ms"] = 300, 200
    assert after == before
    lines = set(path.read_text().splitlines())
    assert "ttl_s   = 300 # decided, 60 before: because of this" in lines
    assert "window_ms = 200 # decided, the default before: because of this" in lines
    kept = [line for line in RESOLVED.text.splitlines() if not line.startswith("ttl_s   ")]
    assert [line for line in kept if line not in lines] == []
    assert load(str(path)).origins["exact.ttl_s"] == "file"
    assert [p.name for p in path.parent.iterdir()] == ["decided.toml"]


def test_a_new_section_is_made(tmp_path: Path) -> None:
    text = 'name = "small"\n[classes.a]\ncriticality = "critical"\nshare = 1.0\n'
    small = tmp_path / "small.toml"
    small.write_text(text)
    found = write_decision(load(str(small)), ("semantic.cosine=0.9", "classes.a.share=1"), tmp_path / "out.toml")
    assert found.scenario.semantic.cosine == 0.9


def test_what_the_engine_refuses_leaves_no_file(tmp_path: Path) -> None:
    for change in ("overload.brownout_share=0.9", "exact.ttls=3", "exact.ttl_s=-1"):
        with pytest.raises(ScenarioError):
            write_decision(RESOLVED, (change,), tmp_path / "x.toml")
    assert list(tmp_path.iterdir()) == []


def test_a_decision_never_overwrites_a_file(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text("mine")
    with pytest.raises(UserError, match="never overwrites"):
        write_decision(RESOLVED, (), tmp_path / "x.toml")
    assert (tmp_path / "x.toml").read_text() == "mine"



"""Scenario files: precedence, origins, and what a mistake is answered with.

Run: python -m pytest tests/test_scenario.py -q
Mutations it caught: environment laid over --set; line numbers counted from 0; unknown keys let through below a class;
the nearest match left out.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.errors import ScenarioError
from engine.scenario import find, flat, load

MINIMAL = '[classes.help]\ncriticality = "standard"\nshare = 1.0\n'


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "s.toml"
    path.write_text('name = "s"\n' + text)
    return str(path)


def test_precedence_and_origins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = write(tmp_path, MINIMAL + "[exact]\nttl_s = 10\nstale_s = 20\n[batcher]\nslots = 4\nreserved_slots = 1\n")
    monkeypatch.setenv("DOORBUSTER_SET", "exact.ttl_s=30; exact.stale_s=40")
    found = load(name, ("exact.ttl_s=50", 'model.name="tiny"'))
    assert found.scenario.exact.ttl_s == 50
    assert found.scenario.exact.stale_s == 40
    assert found.scenario.batcher.slots == 4
    assert found.scenario.model.name == "tiny"
    assert found.origins.get("exact.ttl_s") == "--set"
    assert found.origins.get("exact.stale_s") == "environment"
    assert found.origins.get("batcher.slots") == "file"
    assert found.origins.get("prefix.blocks") is None
    assert flat(found.scenario)["exact.ttl_s"] == 50


def test_an_unquoted_word_and_infinity_can_be_set(tmp_path: Path) -> None:
    found = load(write(tmp_path, MINIMAL), ("model.name=fake", "model.fake_speed=inf", "exact.enabled=false"))
    assert found.scenario.model.name == "fake"
    assert found.scenario.model.fake_speed == float("inf")
    assert found.scenario.exact.enabled is False


@pytest.mark.parametrize(
    ("text", "what", "where", "fix"),
    [
        (MINIMAL + "[limiter]\nrate_per_s = 4\n", "limiter.rate_per_s is not a known key", "s.toml:6", "rate_rps"),
        (MINIMAL + 'slo_ttft = 5\n', "classes.help.slo_ttft is not a known key", "s.toml:5", "slo_ttft_ms"),
        (MINIMAL + "[exact]\nttl_s = -1\n", "exact.ttl_s: Expected `float`", "s.toml:6", ""),
        (MINIMAL + '[exact]\nttl_s = "soon"\n', "exact.ttl_s: Expected `float`", "s.toml:6", ""),
        ("[classes.help\n", "not valid TOML", "s.toml", ""),
        ("", "no traffic class", "s.toml", "[classes.NAME]"),
        ('[classes.a]\ncriticality = "standard"\nshare = 0.7\n', "add up to 0.7, not 1", "s.toml", ""),
        (MINIMAL + "[batcher]\nslots = 2\nreserved_slots = 2\n", "leaves none of the 2 slots", "s.toml", ""),
        (MINIMAL + "[batcher]\nslots = 64\nstep_tokens = 64\n", "batcher.slots (64)", "s.toml", ""),
        (MINIMAL + "[prefix]\nblocks = 100\n", "cannot hold one full context", "s.toml", "at least 224"),
        (MINIMAL + "[overload]\nbrownout_share = 0.9\n", "brownout_share <= degraded_share", "s.toml", ""),
        (MINIMAL + 'fallback = "nowhere.txt"\n', "no file 'nowhere.txt'", "s.toml", ""),
    ],
)
def test_mistakes_name_place_and_cure(tmp_path: Path, text: str, what: str, where: str, fix: str) -> None:
    with pytest.raises(ScenarioError) as caught:
        load(write(tmp_path, text))
    assert what in caught.value.what
    assert where in caught.value.where
    assert fix in caught.value.fix


def test_mistakes_on_the_command_line_are_not_blamed_on_the_file(tmp_path: Path) -> None:
    name = write(tmp_path, MINIMAL)
    with pytest.raises(ScenarioError) as caught:
        load(name, ("exact.ttl_s=never",))
    assert caught.value.where == "--set"
    with pytest.raises(ScenarioError, match="sets nothing"):
        load(name, ("exact.ttl_s",))
    with pytest.raises(ScenarioError) as caught:
        load(name, ("exact.tll_s=3",))
    assert "ttl_s" in caught.value.fix


@pytest.mark.parametrize(
    ("item", "what", "fix"),
    [
        ("classes.hlep.share=0.1", "classes.hlep: Object missing required field `criticality`", "did you mean help?"),
        ("classes.help.criticality=urgent", "classes.help.criticality: 'urgent' is not one of critical, standard", ""),
        ("classes.help=3", "classes.help: Expected a section", ""),
        ("model.device=gpu", "model.device: 'gpu' is not one of auto, cpu, cuda", ""),
        ("model=3", "model: Expected `object`", ""),
        ("workload.profiles.ci.base_s=-1", "workload.profiles.ci.base_s: Expected `float` > 0.0", ""),
        ("seed=x", "seed: Expected `int`", ""),
    ],
)
def test_a_value_that_does_not_fit_is_named_to_the_last_key(tmp_path: Path, item: str, what: str, fix: str) -> None:
    profile = "[workload.profiles.ci]\nbase_s = 1\nramp_s = 1\nplateau_s = 1\ndecay_s = 1\n"
    name = write(tmp_path, MINIMAL + profile + '[model]\nname = "fake"\n')
    with pytest.raises(ScenarioError) as caught:
        load(name, (item,))
    assert what in caught.value.what
    assert caught.value.where == "--set"
    assert fix in caught.value.fix


def test_a_class_that_lacks_a_key_is_named_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(ScenarioError) as caught:
        load(write(tmp_path, MINIMAL + "[classes.more]\nshare = 0.0\n"))
    assert "classes.more: Object missing required field" in caught.value.what
    assert caught.value.where.endswith("s.toml:5")


def test_a_misspelt_scenario_names_the_nearest() -> None:
    with pytest.raises(ScenarioError) as caught:
        find("flash-sail")
    assert "did you mean flash-sale?" in caught.value.fix


def test_upstreams_are_the_replicas(tmp_path: Path) -> None:
    two = '[upstreams.one]\nurl = "http://a:1/v1"\nwindow = 4\n[upstreams.two]\nurl = "https://b"\n'
    found = load(write(tmp_path, MINIMAL + two), ('upstreams.cli-1.url="http://c:3"',))
    assert [*found.scenario.upstreams] == ["one", "two", "cli-1"]
    assert found.scenario.replicas == 3
    assert found.origins["upstreams.one.window"] == "file"
    assert load(write(tmp_path, MINIMAL)).scenario.replicas == 1


@pytest.mark.parametrize(
    ("item", "what"),
    [
        ('upstreams.one.url="a:1"', "upstreams.one.url: 'a:1' is no URL"),
        ('upstreams.one.url="http://"', "upstreams.one.url: 'http://' is no URL"),
        ("upstreams.one.window=2", "upstreams.one: Object missing required field `url`"),
        ('upstreams.one={url="http://a",window=2,reserved=2}', "reserved (2) leaves none of the 2 places"),
        ('upstreams.one={url="http://a",windw=2}', "upstreams.one.windw is not a known key"),
    ],
)
def test_upstreams_that_cannot_be(tmp_path: Path, item: str, what: str) -> None:
    with pytest.raises(ScenarioError) as told:
        load(write(tmp_path, MINIMAL), (item,))
    assert what in told.value.what

"""The sale as a list of requests: shape, mix, popularity, repeatability.

Run: python -m pytest tests/sim/test_workload.py -q
Mutations it caught: thinning against the base instead of the peak; one random stream for all purposes; popularity
drawn anew for each request; decay that ends at zero.
"""

from __future__ import annotations

from collections import Counter

import msgspec
import pytest

from engine.errors import ScenarioError
from engine.scenario import load
from engine.units import S_NS
from sim.twin.workload import flash_sale, profile_of, read_corpus, sale_rate, steady

SCENARIO = load("flash-sale").scenario


def test_rate_follows_the_profile() -> None:
    profile = profile_of(SCENARIO, "demo")
    rate = sale_rate(profile, 3.0, 4.0)
    begin, end = profile.base_s + profile.ramp_s, profile.base_s + profile.ramp_s + profile.plateau_s
    assert rate(0) == rate(profile.base_s - 0.01) == 3.0
    assert rate(profile.base_s + profile.ramp_s / 2) == pytest.approx(7.5)
    assert rate(begin) == rate(end - 0.01) == 12.0
    assert rate(profile.duration_s) == pytest.approx(3.0)


def test_plus_300_percent_within_a_minute_is_what_is_drawn() -> None:
    profile = profile_of(SCENARIO, "full")
    assert profile.ramp_s <= 60
    times = [r.at_ns / S_NS for r in flash_sale(SCENARIO, "full", 20.0, seed=3)]
    begin, end = profile.base_s + profile.ramp_s, profile.base_s + profile.ramp_s + profile.plateau_s
    base = sum(t < profile.base_s for t in times) / profile.base_s
    plateau = sum(begin <= t < end for t in times) / profile.plateau_s
    assert base == pytest.approx(20.0, rel=0.06)  # 2,400 arrivals: three standard deviations
    assert plateau == pytest.approx(80.0, rel=0.02)
    assert times == sorted(times)


def test_mix_and_popularity() -> None:
    requests = steady(SCENARIO, 100.0, 100.0, seed=4)
    share = Counter(r.traffic_class for r in requests)
    for name, cls in SCENARIO.classes.items():
        assert share[name] / len(requests) == pytest.approx(cls.share, abs=0.015)
    mine = [r for r in requests if r.traffic_class == "product_qa"]
    asked = Counter(r.label for r in mine if not r.trap)
    size = len({q.answer_id for q in read_corpus(SCENARIO)["product_qa"] if not q.trap})
    harmonic = sum(1 / k for k in range(1, size + 1))
    (label, most), total = asked.most_common(1)[0], asked.total()
    assert most / total == pytest.approx(1 / harmonic, rel=0.15), "Zipf with exponent one: the first of n gets 1 / H(n)"
    wordings = Counter(r.text for r in mine if r.label == label)
    assert len(wordings) >= 2
    assert 0.5 < wordings.most_common(1)[0][1] / wordings.total() < 0.75
    assert sum(r.trap for r in mine) / len(mine) == pytest.approx(SCENARIO.workload.trap_share, abs=0.008)


def test_equal_labels_are_equal_answers() -> None:
    by_text: dict[str, set[str]] = {}
    for r in steady(SCENARIO, 100.0, 60.0, seed=6):
        by_text.setdefault(r.text, set()).add(r.label)
    assert all(len(labels) == 1 for labels in by_text.values())


def test_same_seed_same_sale_and_streams_are_apart() -> None:
    first, again = flash_sale(SCENARIO, "ci", 9.0, 7), flash_sale(SCENARIO, "ci", 9.0, 7)
    assert first == again
    assert first != flash_sale(SCENARIO, "ci", 9.0, 8)
    flat = msgspec.structs.replace(SCENARIO.workload, zipf_exponent=0.0)
    other = flash_sale(msgspec.structs.replace(SCENARIO, workload=flat), "ci", 9.0, 7)
    assert [(r.at_ns, r.traffic_class) for r in first] == [(r.at_ns, r.traffic_class) for r in other]
    assert [r.text for r in first if r.intent == "payment"] == [r.text for r in other if r.intent == "payment"]
    assert [r.text for r in first] != [r.text for r in other]


def test_payments_are_all_different_and_classes_keep_to_their_tenants() -> None:
    requests = steady(SCENARIO, 200.0, 60.0, seed=5)
    payments = [r.text for r in requests if r.traffic_class == "payment_fraud"]
    assert len(payments) > 400
    assert len(set(payments)) == len(payments)
    assert {(r.traffic_class, r.tenant) for r in requests} == {(n, c.tenant) for n, c in SCENARIO.classes.items()}


def test_unknown_profile_is_explained() -> None:
    with pytest.raises(ScenarioError, match="no profile 'weekend'"):
        profile_of(SCENARIO, "weekend")

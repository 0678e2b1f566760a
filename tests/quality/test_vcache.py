"""vCache's rule in the study, against slow readings of the formulae.

Run: python -m pytest tests/quality/test_vcache.py -q
Mutations it caught: five observations taken for enough; the lower limit of ``at`` for the upper; right ones stored.
"""

from __future__ import annotations

from math import exp
from statistics import NormalDist

import numpy as np
import pytest
from scipy.optimize import minimize

from engine.events import TextMarks
from engine.policy.rules import DRAWS, Candidate, Judgement, Lesson
from sim.quality.fill import Replay
from sim.quality.vcache import EPSILON, Fit, VCacheRule, explore_chance, fit
from tests.quality.test_replay import made

KEY = (b"", b"entry")


def near(cosine: float) -> list[Candidate]:
    """One entry."""
    return [Candidate(KEY, round(1e6 * cosine), "", TextMarks())]


def told(rule: VCacheRule, *seen: tuple[float, bool]) -> VCacheRule:
    """The rule, having compared."""
    for cosine, right in seen:
        rule.learn(Lesson(KEY, round(1e6 * cosine), right, False))
    return rule


@pytest.mark.parametrize("seed", range(5))
def test_the_fit_is_the_likeliest_and_its_deviation_that_of_the_curvature(seed):
    rng = np.random.default_rng(seed)
    cosines = np.concatenate(([0.0, 1.0, 0.7, 0.9], rng.uniform(0.6, 1.0, 40)))
    right = np.concatenate(([False, True, True, False], rng.random(40) < 1 / (1 + np.exp(-12 * (cosines[4:] - 0.8)))))

    def loss(given: np.ndarray) -> float:
        odds = given[1] * (cosines - given[0])  # threshold and steepness themselves: no delta method
        return float((np.logaddexp(0, odds) - right * odds).sum())

    best = minimize(loss, [0.8, 10.0], method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-12, "maxiter": 5000}).x
    steps = np.diag([1e-4, 1e-2])
    hessian = np.array([
        [(loss(best + a + b) - loss(best + a - b) - loss(best - a + b) + loss(best - a - b)) / (4 * a.sum() * b.sum())
         for b in steps] for a in steps
    ])  # fmt: skip
    found = fit(cosines, right)
    assert (found.at, found.steep) == pytest.approx(tuple(best), rel=1e-4)
    assert found.deviation == pytest.approx(np.linalg.inv(hessian)[0, 0] ** 0.5, rel=1e-3)


def test_separable_data_are_a_step_in_the_gap():
    cosines, right = np.array([0.0, 1.0, 0.7, 0.9, 0.8, 0.95]), np.array([0, 1, 0, 1, 0, 1], bool)
    found = fit(cosines, right)
    assert (found.at, found.steep) == (pytest.approx(0.85), float("inf"))
    assert found.deviation**2 == pytest.approx(0.035)


@pytest.mark.parametrize("steep", [3.0, 40.0, float("inf")])
@pytest.mark.parametrize("cosine", [0.5, 0.8, 0.97])
def test_the_chance_to_explore_is_the_least_over_the_grid(steep, cosine):
    model, share, least = Fit(0.75, steep, 0.05), 0.02, 1.0
    for epsilon in EPSILON.tolist():
        at = min(1.0, max(0.0, model.at + NormalDist().inv_cdf(1 - epsilon) * model.deviation))
        curve = float(cosine >= at) if steep == float("inf") else 1 / (1 + exp(-steep * (cosine - at)))
        least = min(least, 1 - share / (1 - (1 - epsilon) * curve))
    assert explore_chance(model, cosine, share) == pytest.approx(least)


def test_an_entry_serves_from_six_observations_on():
    rule = told(VCacheRule(0.05), *[(0.7, True)] * 3)
    assert rule.judge(TextMarks(), near(0.99), False, DRAWS - 1) == Judgement(compare=0)
    told(rule, (0.7, True))
    assert rule.judge(TextMarks(), near(0.99), False, DRAWS - 1) == Judgement(serve=0)
    assert rule.stats().explored == 0
    rule.forget(KEY)
    assert rule.judge(TextMarks(), near(0.99), False, DRAWS - 1) == Judgement(compare=0)
    assert rule.judge(TextMarks(), [], False, DRAWS - 1) == Judgement()
    rule.check()


def test_each_look_up_keeps_its_bound_where_the_curve_is_true():
    rng, share, wrong, asked = np.random.default_rng(7), 0.05, 0, 6_000
    rule = VCacheRule(share)
    for cosine, coin, draw in zip(rng.uniform(0.6, 1, asked), rng.random(asked), rng.integers(0, DRAWS, asked),
                                  strict=True):  # fmt: skip
        right = bool(coin < 1 / (1 + exp(-40 * (cosine - 0.8))))
        if rule.judge(TextMarks(), near(float(cosine)), False, int(draw)).serve is None:
            told(rule, (float(cosine), right))
        else:
            wrong += not right
    assert rule.stats().served > 0.3 * asked
    assert wrong < share * asked
    rule.check()


class Compares(VCacheRule):
    """Never serves."""

    def judge(self, marks, near, relaxed, draw):
        return Judgement(compare=0) if near else Judgement()


def test_what_was_compared_and_right_is_not_stored():
    questions = made(300, seed=8)
    rule = Compares(0.01)
    Replay(questions).fill(rule, np.arange(300), store_right=False)
    present: list[int] = []
    for row in range(300):
        cosines = questions.vectors[present] @ questions.vectors[row]
        if not present or questions.labels[present[int(cosines.argmax())]] != questions.labels[row]:
            present.append(row)
    assert (rule.stats().lessons, rule.stats().wrong) == (299, len(present) - 1)

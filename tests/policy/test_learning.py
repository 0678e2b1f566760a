"""The online logistic: near the batch fit, sane on separable outcomes, exact about weights.

Run: python -m pytest tests/policy/test_learning.py -q
Mutations it caught: the covariance never shrunk, or by weight 1; a step of weight 1.
"""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.policy.learning import OnlineLogistic, logistic, moderated

FEATURE = st.floats(-3, 3)
OUTCOMES = st.lists(st.tuples(FEATURE, FEATURE, st.booleans(), st.floats(0.1, 5)), max_size=30)


def test_finds_the_weights_that_made_the_outcomes():
    true, random_ = (-1.0, 2.0, -0.5), random.Random(1)
    model = OnlineLogistic((0.0, 0.0, 0.0), 3.0)
    for _ in range(5000):
        features = (1.0, random_.gauss(0, 1), random_.gauss(0, 1))
        odds = sum(weight * value for weight, value in zip(true, features, strict=True))
        model.learn(features, random_.random() < logistic(odds))
    model.check()
    assert model.means() == pytest.approx(true, abs=0.2)


@given(OUTCOMES)
def test_a_belief_stays_a_belief(outcomes):
    model = OnlineLogistic((0.0, 0.0, 0.0), 2.0)
    for one, other, outcome, weight in outcomes:
        model.learn((1.0, one, other), outcome, weight)
        model.check()
        assert model.predict((1.0, one, other))[1] <= 4.0 * (1 + one**2 + other**2) * (1 + 1e-6)


@given(FEATURE, st.booleans())
def test_an_outcome_moves_the_odds_its_way_and_makes_them_surer(feature, outcome):
    model, features = OnlineLogistic((0.3, -0.2), 2.0), (1.0, feature)
    mean, variance = model.predict(features)
    model.learn(features, outcome)
    after, smaller = model.predict(features)
    assert (after > mean) == outcome
    assert smaller < variance


def test_separable_outcomes_keep_the_weights_finite():
    model = OnlineLogistic((0.0, 0.0), 3.0)
    for _ in range(2000):
        model.learn((1.0, 1.0), True)
        model.learn((1.0, -1.0), False)
    assert 2 < model.means()[1] < 30


def test_a_weight_of_two_counts_twice():
    heavy, once, twice = (OnlineLogistic((0.0,), 0.1) for _ in range(3))
    heavy.learn((1.0,), True, weight=2.0)
    once.learn((1.0,), True)
    twice.learn((1.0,), True)
    twice.learn((1.0,), True)
    assert heavy.means()[0] == pytest.approx(twice.means()[0], rel=0.02)
    assert heavy.predict((1.0,))[1] == pytest.approx(twice.predict((1.0,))[1], rel=0.001)
    assert heavy.means()[0] > 1.9 * once.means()[0]


def test_uncertain_odds_are_nearer_to_even():
    assert moderated(3.0, 0.0) == 3.0
    assert 0 < moderated(3.0, 10.0) < 1.5
    assert logistic(-1000.0) == 0.0
    assert logistic(0.0) == 0.5

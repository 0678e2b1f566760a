"""Upper bounds: they hold at every moment at once, and are not so wide as to say nothing.

Run: python -m pytest tests/policy/test_confidence.py -q
Mutations it caught: a tenth of the confidence's log; the sum of the bets instead of their mean; the bisection's lower
end; of those looked at with certainty, the most instead of those found.
"""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from engine.policy.confidence import upper_count, upper_mean

RUNS, TRIED, EVERY = 200, 400, 40
BROKEN_MOST = 20  # of 200 at 90 %: what is promised, on average


def test_a_mean_is_under_its_bound_at_all_times_at_once():
    for mean in (0.02, 0.5):
        broken = 0
        for seed in range(RUNS):
            random_ = random.Random(seed)
            found = 0
            for tried in range(1, TRIED + 1):
                found += random_.random() < mean
                if tried % EVERY == 0 and upper_mean(found, tried, 0.9) < mean:
                    broken += 1
                    break
        assert broken <= BROKEN_MOST


def test_a_mean_that_drifts_is_under_its_bound():
    broken = 0
    for seed in range(RUNS):
        random_ = random.Random(seed)
        found, expected = 0, 0.0
        for tried in range(1, TRIED + 1):
            chance = 0.3 * tried / TRIED
            expected += chance
            found += random_.random() < chance
            if tried % EVERY == 0 and upper_mean(found, tried, 0.9) < expected / tried:
                broken += 1
                break
    assert broken <= BROKEN_MOST


def test_a_count_is_under_its_bound_at_all_times_at_once_though_who_errs_has_seen_what_was_found():
    broken = 0
    for seed in range(RUNS):
        random_ = random.Random(seed)
        there = found = 0
        for asked in range(1, TRIED + 1):
            if found <= 2 or asked % 3 == 0:  # errs as long as it is lucky
                there += 1
                found += random_.random() < 0.1
            if asked % EVERY == 0 and upper_count(found, 0.1, asked, 0.9) < there:
                broken += 1
                break
    assert broken <= BROKEN_MOST


def test_bounds_are_near_when_much_was_seen():
    assert 0.05 < upper_mean(500, 10_000, 0.95) < 0.06
    assert upper_mean(0, 1000, 0.95) < 0.007  # log(8 / 0.05) is 5.1
    assert 1000 < upper_count(100, 0.1, 10_000, 0.95) < 1400


@given(st.integers(0, 50), st.integers(0, 50), st.floats(0.5, 0.99))
def test_a_mean_is_never_below_what_was_found(found, more, confidence):
    tried = found + more
    bound = upper_mean(found, tried, confidence)
    assert bound <= 1
    assert bound * tried >= found - 1e-9
    assert upper_mean(found, tried, 0.995) >= bound


@given(st.integers(0, 50), st.floats(0, 1), st.integers(0, 1000))
def test_a_count_is_between_what_was_found_and_the_most(found, share, most):
    assert min(found, most) <= upper_count(found, share, most, 0.95) <= most
    assert upper_count(found, share, most, 0.95) <= upper_count(found + 1, share, most, 0.95)


def test_nothing_seen_is_nothing_known():
    assert upper_mean(0, 0, 0.95) == 1
    assert upper_count(0, 0.0, 700, 0.95) == 700
    assert upper_count(3, 1.0, 700, 0.95) == 3

"""Looks by a coin: which lessons are looks, and that their bound holds at every moment.

Run: python -m pytest tests/policy/test_looks.py -q
Mutations it caught: an audit taken for a look; a look counted twice; a lost look forgotten.
"""

from __future__ import annotations

import random

from engine.policy.looks import Looks
from engine.policy.rules import DRAWS, Lesson

KEY = (b"", b"a")


def test_a_lesson_is_a_look_once_and_an_audit_never():
    looks = Looks(0.1, 0.95)
    assert not looks.looks(KEY, 900_000, DRAWS - 1)
    assert looks.looks(KEY, 900_000, 0)
    assert not looks.learn(Lesson(KEY, 900_000, right=False, audit=True))
    assert not looks.learn(Lesson(KEY, 899_999, right=False, audit=False))
    assert looks.learn(Lesson(KEY, 900_000, right=True, audit=False))
    assert not looks.learn(Lesson(KEY, 900_000, right=True, audit=False))
    looks.check()
    assert (looks.served, looks.explored) == (1, 1)


def test_the_bound_holds_at_every_moment_and_a_lost_look_counts_as_an_error():
    broken, last = 0, []
    for seed in range(100):
        looks, truth, wrong = Looks(0.1, 0.9), random.Random(seed), 0
        for asked in range(1, 501):
            right = truth.random() < 0.8
            if not looks.looks(KEY, asked, truth.randrange(DRAWS)):
                wrong += not right
            elif right or asked % 2:
                looks.learn(Lesson(KEY, asked, right, audit=False))
            if asked % 50 == 0 and looks.bound_millionths(asked) * asked < 1e6 * wrong - asked:
                broken += 1
                break
        else:
            last.append(looks.bound_millionths(500))
        looks.check()
    assert broken <= 10
    assert sum(last) / len(last) < 500_000, "and it says something"


def test_nothing_asked_is_nothing_known():
    assert Looks(0.1, 0.95).bound_millionths(0) == 1_000_000
    assert Looks(0.0, 0.95).bound_millionths(10) == 0, "nothing was served"

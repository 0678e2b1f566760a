"""How the speed bench reads a contender's times, and the interval of a paired ratio. ``pytest tests/bench``.

Caught: a window that begins with the first first token instead of the last one; one that runs to the last token of all;
ratios of medians instead of medians of ratios.
"""

from __future__ import annotations

import pytest

from tests.bench.contender import timing
from tests.bench.intervals import paired_ratio
from tests.bench.peers.line import Seen


def test_a_batch_in_step_is_read_as_it_is():
    found = timing(Seen(10.0, [[11.0, 11.1, 11.2, 11.3]] * 4))
    assert found.prefill_s == pytest.approx(1.0)
    assert found.steps_ms == pytest.approx([100.0] * 12)


def test_steps_count_only_while_all_sequences_decode():
    early = [1.0, 2.0, 3.0, 3.1, 3.2]  # decodes slowly while the other is still in prefill, and ends first
    late = [3.0, 3.1, 3.2, 3.25, 3.3]  # decodes fast when it is alone
    found = timing(Seen(0.0, [early, late]))
    assert found.prefill_s == pytest.approx(3.0)
    assert found.steps_ms == pytest.approx([100.0] * 4)
    assert found.step_ms == pytest.approx(100.0)


def test_a_drift_that_hits_both_arms_leaves_the_paired_ratio_alone():
    drift = [1.0, 1.5, 2.0, 4.0, 8.0, 3.0, 1.2, 1.1]
    found = paired_ratio([1.02 * d for d in drift], drift)
    assert (found.low, found.middle, found.high) == pytest.approx((1.02, 1.02, 1.02))
    assert found.pairs == 8


def test_the_interval_of_noisy_pairs_holds_its_middle_and_is_wider_than_nothing():
    found = paired_ratio([0.9, 1.0, 1.1, 1.05, 0.97, 1.02], [1.0] * 6)
    assert found.low < found.middle < found.high

"""The fit finds a known truth; the threshold's bound survives its choice.

Run: python -m pytest tests/quality/test_fit.py -q
Mutations it caught: the loosest threshold that passes, wherever it stands; two-sided bounds; a point estimate as bound.
"""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from scipy import stats

from sim.quality.fit import Seen, certify, fit_weights
from sim.quality.rates import part, upper
from sim.quality.shipping import _together


def test_upper_bound_is_the_exact_one():
    assert upper(0, 1198) == pytest.approx(1 - 0.05 ** (1 / 1198))
    for count, total in ((3, 1000), (61, 30415)):
        assert stats.binom.cdf(count, total, upper(count, total)) == pytest.approx(0.05)
    assert upper(5, 5) == upper(0, 0) == 1
    assert part(0, 10).high == pytest.approx(1 - 0.025 ** (1 / 10))


def test_the_certificate_keeps_its_level():
    """True error crosses the bound between two thresholds: it may be certified beyond in 5 % of the runs."""
    rng = np.random.default_rng(3)
    grid = [5.0, 4.0, 3.0, 2.0, 1.0, 0.0]
    truth = dict(zip(grid, [0.002, 0.004, 0.007, 0.0101, 0.0102, 0.0103], strict=True))
    runs = 2000
    broken = 0
    for _ in range(runs):
        found = certify(lambda least: (int(rng.binomial(4000, truth[least])), 4000), 0.01, grid=grid)
        broken += found.least is not None and truth[found.least] > 0.01
    assert broken / runs <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / runs)
    assert broken > 0, "or else the test has no power"


def test_it_stops_at_the_first_failure():
    counts = {3.0: 0, 2.0: 30, 1.0: 0}
    assert certify(lambda least: (counts[least], 1000), 0.01, grid=[3.0, 2.0, 1.0]).least == 3.0
    assert certify(lambda least: (50, 1000), 0.01, grid=[3.0]).least is None


def test_the_fit_finds_the_weights_that_made_the_data():
    rng = np.random.default_rng(4)
    found = rng.normal(size=(60_000, 11)) * np.linspace(0.2, 2, 11)
    found[:, 5] = 0.0
    truth = np.array([0.5, -1.0, 2.0, 0.0, 1.5, 0.0, -0.5, 1.0, 0.3, 0.7, -0.2])
    right = rng.random(60_000) < 1 / (1 + np.exp(-(found @ truth - 0.4)))
    bias, *weights = msgspec.structs.astuple(fit_weights(Seen(found, right)))
    assert bias == pytest.approx(-0.4, abs=0.06)
    assert weights == pytest.approx(truth, abs=0.2)
    assert weights[5] == 0


def test_a_part_weighs_what_it_is_given_however_many_its_rows():
    """Three times the rows at the same weight is the same fit."""
    rng = np.random.default_rng(5)
    one, two = (Seen(rng.normal(size=(400, 3)) + at, rng.random(400) < 0.5 + 0.3 * at) for at in (0, 1))
    thrice = Seen(np.tile(two.found, (3, 1)), np.tile(two.right, 3))
    seen, share = _together([(1.0, one), (0.2, two)])
    assert share.sum() == pytest.approx(1)
    assert share[400:].sum() == pytest.approx(0.2 / 1.2)
    assert _solved(seen, share) == pytest.approx(_solved(*_together([(1.0, one), (0.2, thrice)])), abs=0.05)
    assert _solved(seen, share) != pytest.approx(_solved(*_together([(1.0, one), (5.0, two)])), abs=0.05)


def _solved(seen: Seen, share: np.ndarray) -> list[float]:
    return list(msgspec.structs.astuple(fit_weights(seen, share)))[:4]

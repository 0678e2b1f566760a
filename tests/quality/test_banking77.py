"""What ships, on Banking77's rows that neither the fit nor the threshold saw. Slow the first time.

Run: DOORBUSTER_BANKING77=DIR python -m pytest -m slow tests/quality/test_banking77.py -q
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from engine.cache_config import CalibratedConfig, SemanticConfig
from engine.policy.calibrated import CalibratedRule
from engine.policy.fixed import FixedRule
from sim.quality.certified import pooled, split
from sim.quality.fill import Replay
from sim.quality.questions import banking77

FOLDER = Path(os.environ.get("DOORBUSTER_BANKING77") or Path(__file__).parents[3] / "shared" / "data" / "banking77")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (FOLDER / "train.csv").is_file(), reason="no Banking77: set DOORBUSTER_BANKING77 to its folder"
    ),
]


@pytest.fixture(scope="module")
def test_rows() -> Replay:
    return Replay(split(*banking77(FOLDER)).test)


def test_the_data_are_those_of_the_reference(test_rows):
    """A bare threshold of 0.95 deflects 12.8 % of these rows, and 0.2 to 0.3 % get a wrong answer."""
    found = pooled(test_rows, lambda: FixedRule(SemanticConfig(cosine=0.95, vetoes=())), 0.95)
    assert found.asked == 5 * 6083
    assert found.deflected == pytest.approx(0.128, abs=0.004)
    assert 0.002 <= found.wrong / found.asked <= 0.003


@pytest.mark.parametrize(("bound", "at_least"), [(0.0025, 0.24), (0.01, 0.46)])
def test_what_ships_keeps_its_bound(test_rows, bound, at_least):
    """With the default vetoes. At 0.25 % the test's own upper bound is 0.26 %: there its estimate, 0.21 %, is held."""
    shipped = CalibratedConfig()
    least = shipped.least if bound < 0.01 else shipped.approximate_least
    config = SemanticConfig(calibrated=CalibratedConfig(least=least))
    found = pooled(test_rows, lambda: CalibratedRule(config), least)
    assert found.wrong / found.asked <= 0.9 * bound
    assert bound < 0.01 or found.upper <= bound
    assert found.deflected >= at_least

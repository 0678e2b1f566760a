"""A gate on the traps: no change of marks, vetoes or defaults may serve more of them, or lose more good hits.

Real encoder, all questions of the corpus cached. Run: python -m pytest tests/quality/test_trap_gate.py -q
"""

from __future__ import annotations

import msgspec
import pytest

from engine.cache_config import SemanticConfig
from engine.policy.calibrated import CalibratedRule
from sim.quality.traps import corpus
from sim.quality.vetoes import judged


def test_traps_served_and_good_hits_lost() -> None:
    config, world = SemanticConfig(), corpus()
    traps = judged(world.traps, config.cosine, config.vetoes)
    assert traps.asked == 186
    assert traps.served <= 5, "2.7 % of the traps, as measured when the vetoes became the default"
    assert judged(world.traps, config.cosine, ()).served > 70, "the traps are traps"


@pytest.mark.parametrize(("relaxed", "at_most"), [(False, 0), (True, 2)])
def test_traps_served_by_the_calibrated_rule(relaxed: bool, at_most: int) -> None:
    """As measured when its weights were fitted, on half of them: 0 of 186 at the bound of 0.25 %, 2 at that of 1 %."""
    config, world = SemanticConfig(), corpus()

    def served(vetoes) -> int:
        rule = CalibratedRule(msgspec.structs.replace(config, vetoes=vetoes))
        said = [rule.judge(lookup.marks, lookup.near, relaxed, draw=0) for lookup in world.traps]
        return sum(each.serve is not None for each in said)

    assert served(config.vetoes) <= at_most
    if relaxed:
        assert served(()) > 20, "the vetoes are needed"

"""A gate on the traps: no change of marks, vetoes or defaults may serve more of them, or lose more good hits.

Real encoder, all questions of the corpus cached. Run: python -m pytest tests/quality/test_trap_gate.py -q
"""

from __future__ import annotations

from engine.cache_config import SemanticConfig
from sim.quality.traps import corpus
from sim.quality.vetoes import judged


def test_traps_served_and_good_hits_lost() -> None:
    config, world = SemanticConfig(), corpus()
    traps = judged(world.traps, config.cosine, config.vetoes)
    assert traps.asked == 186
    assert traps.served <= 5, "2.7 % of the traps, as measured when the vetoes became the default"
    assert judged(world.traps, config.cosine, ()).served > 70, "the traps are traps"

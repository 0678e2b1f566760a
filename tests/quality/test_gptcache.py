"""GPTCache itself against its rule as we wrote it: the same requests, the same answers.

Run: python -m pytest -m slow tests/quality/test_gptcache.py -q
Mutations it caught: misses that are not stored; answers shared across scopes.
"""

from __future__ import annotations

import numpy as np
import pytest

from engine.cache_config import SemanticConfig
from engine.policy.fixed import FixedRule
from sim.quality.contest import GPTCACHE_COSINE, Setting
from sim.quality.fill import Replay
from sim.quality.gptcache import answered, peer_python
from tests.quality.test_replay import made

PYTHON = peer_python()

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PYTHON is None, reason="GPTCache is not here: make bench-peers brings it"),
]


@pytest.mark.parametrize(("stored", "insert"), [(0, True), (60, False)])
def test_it_serves_what_its_rule_serves(stored, insert):
    replay = Replay(made(160, seed=12, scopes=2))
    order = np.arange(stored, 160)
    setting = Setting("made", replay, [order], np.arange(stored), insert)
    theirs = answered(setting, PYTHON)
    rule = FixedRule(SemanticConfig(cosine=GPTCACHE_COSINE, vetoes=()))
    ours = replay.fill(rule, order, setting.stored, insert)
    assert np.array_equal(theirs.served, ours.served)
    assert np.mean(theirs.wrong != ours.wrong) <= 0.02, "of two that are equally near, another may answer"
    assert 10 < theirs.served.sum() < len(order)

"""Learning rules on made-up clusters, through the command's own run; on Banking77 when it is there (slow).

Run: python -m pytest tests/quality/test_bounds.py -q
"""

from __future__ import annotations

import pytest

from engine.policy.rules import Judgement, RuleStats
from sim.quality.bounds import SHARES, learners, main, run, table
from sim.quality.fill import Replay
from sim.quality.questions import banking77
from tests.quality.test_banking77 import FOLDER
from tests.quality.test_replay import made


class Careless:
    """Serves whatever is nearest, and claims that next to nothing is wrong."""

    def __init__(self, bound_millionths: int) -> None:
        self._bound, self._asked, self._served = bound_millionths, 0, 0

    def judge(self, marks, near, relaxed, draw):
        self._asked += 1
        self._served += bool(near)
        return Judgement(serve=0 if near else None)

    def learn(self, lesson):
        pass

    def forget(self, key):
        pass

    def stats(self):
        return RuleStats(self._asked, self._served, 0, 0, 0, self._bound)

    def check(self):
        pass


def test_a_bound_that_is_broken_is_seen():
    replay = Replay(made(400, seed=1))
    claimed, honest = (run(replay, Careless(bound), seed=1) for bound in (1000, 1_000_000))
    assert claimed.wrong > 0.001
    assert (claimed.covered, honest.covered) == (False, True)
    assert table("careless", 0.001, [claimed, claimed]).count("0 of 2") == 2


@pytest.mark.parametrize("name", list(learners()))
def test_learners_run_and_keep_their_invariants(name):
    rule = learners()[name](0.05)
    found = run(Replay(made(1200, seed=2).take(range(600))), rule, seed=3)
    rule.check()
    assert found.covered
    assert 0 <= found.wrong <= 0.05


def test_no_runs_is_a_clear_error(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bounds", "--banking77", "nowhere", "--runs", "0"])
    assert main() == 1
    assert "--runs 0" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(
    not (FOLDER / "train.csv").is_file(), reason="no Banking77: set DOORBUSTER_BANKING77 to its folder"
)
def test_on_banking77_they_keep_their_share_in_17_of_20_runs():
    train, test = banking77(FOLDER)
    replay = Replay(train.and_then(test))
    least = {"adaptive": (0.53, 0.64), "conformal": (0.27, 0.37)}
    for name, make in learners().items():
        for share, deflected in zip(SHARES, least[name], strict=True):
            runs = [run(replay, make(share), seed) for seed in range(2000, 2020)]
            assert sum(each.wrong <= share for each in runs) >= 17, (name, share)
            assert sum(each.covered for each in runs) >= 17, (name, share)
            assert sum(each.deflected for each in runs) / 20 >= deflected, (name, share)

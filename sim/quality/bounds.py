"""Do the rules that learn keep what they are told? Many runs on Banking77, the cache filling from empty.

Each run is another order of the rows and other coins. Two promises: no more than ``wrong_share`` of all that ask get a
wrong answer (a goal, by estimates), and at no look every 500 requests were there more than the bound that the rule
reports (a guarantee, with its confidence).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np

from engine.cache_config import AdaptiveConfig, ConformalConfig, SemanticConfig
from engine.errors import UserError
from engine.policy.adaptive import AdaptiveRule
from engine.policy.conformal import ConformalRule
from engine.policy.rules import Rule
from sim.quality.fill import Replay
from sim.quality.questions import banking77

SHARES = (0.01, 0.02)
FIRST_SEED = 1000  # the rules' constants were chosen on seeds below

Make = Callable[[float], Rule]


class Run(msgspec.Struct, frozen=True):
    """Shares of all that asked. ``covered``: the reported bound was never below what was wrong until then."""

    deflected: float
    wrong: float
    explored: float
    bound: float
    covered: bool


def learners() -> dict[str, Make]:
    """New rules, by name, for a share of wrong answers; without vetoes, which Banking77 is no test of."""

    def adaptive(share: float) -> Rule:
        return AdaptiveRule(SemanticConfig(vetoes=(), adaptive=AdaptiveConfig(wrong_share=share)))

    def conformal(share: float) -> Rule:
        return ConformalRule(SemanticConfig(vetoes=(), conformal=ConformalConfig(wrong_share=share)))

    return {"adaptive": adaptive, "conformal": conformal}


def run(replay: Replay, rule: Rule, seed: int) -> Run:
    """Every row once, in the seed's order."""
    order = np.random.default_rng(seed).permutation(len(replay.questions))
    bounds: list[tuple[int, int]] = []

    def look(at: int, of: int) -> None:
        bounds.append((at, rule.stats().bound_millionths))

    found = replay.fill(rule, order, seed=seed, on_asked=look)
    last = rule.stats()
    bounds.append((len(order) - 1, last.bound_millionths))
    wrong = np.cumsum(found.wrong)
    covered = all(1e6 * wrong[at] <= bound * (at + 1) + at + 1 for at, bound in bounds)  # rounded to a millionth
    asked = len(order)
    return Run(
        float(found.served.mean()), float(found.wrong.mean()), last.explored / asked, last.bound_millionths / 1e6,
        covered,
    )  # fmt: skip


def table(name: str, share: float, runs: Sequence[Run]) -> str:
    """One line of the table, in percent."""
    deflected, wrong, explored, bound = (
        100 * np.array([getattr(each, field) for each in runs]) for field in ("deflected", "wrong", "explored", "bound")
    )
    kept, covered = sum(each.wrong <= share for each in runs), sum(each.covered for each in runs)
    return (
        f"| {name} | {100 * share:g} | {deflected.mean():.1f} ({deflected.min():.1f} to {deflected.max():.1f}) "
        f"| {wrong.mean():.2f} ({wrong.min():.2f} to {wrong.max():.2f}) | {kept} of {len(runs)} "
        f"| {explored.mean():.1f} | {bound.mean():.1f} | {covered} of {len(runs)} |"
    )


HEAD = (
    "| rule | wrong_share, % | deflected, % (least to most) | wrong of all, % (least to most) | kept "
    "| explored, % | last bound, % | bound held at every look |\n|---|---|---|---|---|---|---|---|"
)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m sim.quality.bounds", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--banking77", type=Path, required=True, metavar="DIR", help="holds train.csv and test.csv")
    parser.add_argument("--runs", type=int, default=20, metavar="N", help="orders of asking (20)")
    parser.add_argument("--seed", type=int, default=FIRST_SEED, metavar="N", help=f"of the first run ({FIRST_SEED})")
    given = parser.parse_args()
    try:
        if given.runs < 1:
            raise UserError(
                f"--runs {given.runs} is too few", where="the command line", why="there is nothing to count",
                fix="give 1 or more; 20 is what the README's table has",
            )  # fmt: skip
        train, test = banking77(given.banking77)
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    replay = Replay(train.and_then(test))
    print(HEAD)
    for name, make in learners().items():
        for share in SHARES:
            runs = [run(replay, make(share), given.seed + i) for i in range(given.runs)]
            print(table(name, share, runs), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

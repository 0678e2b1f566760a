"""How much a rule deflects under a bound on wrong / all: Banking77, the cache filling from empty.

7,000 train rows are for the fit and for the threshold; the other 6,083 rows are the test, asked in five shuffles and
pooled by request. Two readings. *Chosen before*: half of the 7,000 is fitted on, the other half gives the threshold
(``fit.certify``), and the test rows are looked at once. *On the test*: weights from all 7,000, the threshold swept
until the upper bound of the test itself meets the bound; that is what papers report, and it flatters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec
import numpy as np

from engine.cache_config import SemanticConfig, Weights
from engine.policy.fixed import FixedRule
from engine.policy.rules import Rule
from sim.quality.fill import Outcomes, Replay
from sim.quality.fit import certify, fit_weights, rows_of, rule_at, wrong_at
from sim.quality.questions import Questions
from sim.quality.rates import upper

FIT_ROWS = 7_000
SHUFFLES = 5
FIT_SHUFFLES = 12
BOUNDS = (0.0025, 0.01)
UNSEEN = 20  # intents
ENOUGH = 1.5  # a curve ends at so many times the largest bound
ODDS = tuple(float(each) for each in np.round(np.arange(5.0, 1.0, -0.05), 2))
COSINES = tuple(float(each) for each in np.round(np.arange(0.99, 0.84, -0.005), 3))


class Point(msgspec.Struct, frozen=True):
    """Pooled over the shuffles. ``at``: the threshold."""

    at: float
    asked: int
    served: int
    wrong: int

    @property
    def deflected(self) -> float:
        """Share of all that was asked."""
        return self.served / self.asked

    @property
    def upper(self) -> float:
        """One-sided 95 % upper bound of wrong / all."""
        return upper(self.wrong, self.asked)


class Finding(msgspec.Struct, frozen=True):
    """One row: what is known of answers, a bound, and the two readings; None where no threshold kept it."""

    name: str
    bound: float
    before: Point | None
    on_test: Point | None
    fixed_on_test: Point | None


class Split(msgspec.Struct, frozen=True):
    """Rows for the fit (in random order) and for the test."""

    fit: Questions
    test: Questions


def split(train: Questions, test: Questions, seed: int = 0) -> Split:
    """7,000 rows of train, and everything else."""
    order = np.random.default_rng(seed).permutation(len(train))
    return Split(train.take(order[:FIT_ROWS]), train.take(order[FIT_ROWS:]).and_then(test))


def orders(size: int) -> list[np.ndarray]:
    """The shuffles of the test."""
    return [np.random.default_rng([1, shuffle]).permutation(size) for shuffle in range(SHUFFLES)]


def pooled(replay: Replay, make: Callable[[], Rule], at: float) -> Point:
    """A new rule for each shuffle."""
    found: list[Outcomes] = [replay.fill(make(), order) for order in orders(len(replay.questions))]
    return Point(
        at, sum(each.served.size for each in found), sum(int(each.served.sum()) for each in found),
        sum(int(each.wrong.sum()) for each in found),
    )  # fmt: skip


def fixed_curve(test: Replay) -> list[Point]:
    """Rule ``fixed`` at each cosine."""
    return _curve(test, COSINES, lambda cosine: FixedRule(SemanticConfig(cosine=cosine, vetoes=())))


def calibrated_curve(test: Replay, weights: Weights) -> list[Point]:
    """Rule ``calibrated`` at each log-odds."""
    return _curve(test, ODDS, lambda odds: rule_at(weights, odds))


def _curve(test: Replay, grid: Sequence[float], make: Callable[[float], Rule]) -> list[Point]:
    """Strict to loose, and not much beyond the largest bound."""
    points: list[Point] = []
    for at in grid:
        points.append(pooled(test, lambda: make(at), at))  # noqa: B023
        if points[-1].upper > ENOUGH * max(BOUNDS):
            break
    return points


def loosest(curve: Sequence[Point], bound: float) -> Point | None:
    """The last before the first that does not keep the bound."""
    kept = None
    for point in curve:
        if point.upper > bound:
            break
        kept = point
    return kept


class Chosen(msgspec.Struct, frozen=True):
    """Weights of half of the fit's rows, and the thresholds that the other half gave for ``BOUNDS``."""

    weights: Weights
    least: tuple[float | None, ...]


def choose(fit: Replay, rows: Sequence[int] | np.ndarray) -> Chosen:
    """Of these rows, in random order already: the first half is fitted on."""
    half = len(rows) // 2
    weights = fit_weights(rows_of(fit, rows[:half], FIT_SHUFFLES, seed=7))
    wrong = wrong_at(fit, weights, np.asarray(rows[half:]))
    return Chosen(weights, tuple(certify(wrong, bound).least for bound in BOUNDS))


def compare(
    name: str, fit: Replay, test: Replay, fixed: Sequence[Point], rows: Sequence[int] | None = None
) -> tuple[list[Finding], list[Point]]:
    """Both readings at both bounds, and the curve. ``rows``: of ``fit`` that may be seen, all by default."""
    seen = np.arange(len(fit.questions)) if rows is None else np.asarray(rows)
    chosen = choose(fit, seen)
    curve = calibrated_curve(test, fit_weights(rows_of(fit, seen, FIT_SHUFFLES, seed=7)))
    findings = []
    for bound, least in zip(BOUNDS, chosen.least, strict=True):
        before = None
        if least is not None:
            before = pooled(test, lambda: rule_at(chosen.weights, least), least)  # noqa: B023
        findings.append(Finding(name, bound, before, loosest(curve, bound), loosest(fixed, bound)))
    return findings, curve


def rows_without(questions: Questions, seed: int = 11) -> list[int]:
    """Rows of all intents but ``UNSEEN`` that are drawn."""
    labels = sorted(set(questions.labels))
    gone = set(np.random.default_rng(seed).choice(labels, UNSEEN, replace=False).tolist())
    return [row for row, label in enumerate(questions.labels) if label not in gone]

"""A logistic that learns from one outcome after the other: a normal belief over its weights, moved at each of them.

Assumed-density filtering: the belief after an outcome is the Laplace approximation of the posterior, one Newton step
from the belief before (Spiegelhalter and Lauritzen 1990; MacKay 1992 for the odds under an uncertain weight). O(n^2) an
outcome, nothing of it is kept. The first belief is proper, so perfectly separable outcomes do no harm.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, pi, sqrt

Vector = tuple[float, ...]


def logistic(log_odds: float) -> float:
    """Chance of 1."""
    return 1 / (1 + exp(-log_odds)) if log_odds > -700 else 0.0


def moderated(mean: float, variance: float) -> float:
    """Log-odds of 1 when the log-odds themselves are normal: nearer to even (MacKay 1992)."""
    return mean / sqrt(1 + pi * variance / 8)


class OnlineLogistic:
    """Belief over ``n`` weights: means and covariance."""

    def __init__(self, means: Vector, deviation: float) -> None:
        """``deviation`` of each weight at first."""
        size = len(means)
        self._means = list(means)
        self._covariance = [[deviation**2 * (row == column) for column in range(size)] for row in range(size)]
        self._loosest = deviation**2

    def predict(self, features: Vector) -> tuple[float, float]:
        """Mean and variance of the log-odds."""
        spread = self._spread(features)
        return _dot(self._means, features), max(0.0, _dot(features, spread))

    def learn(self, features: Vector, outcome: bool, weight: float = 1.0) -> None:
        """An outcome of ``weight`` 2 counts as two."""
        spread = self._spread(features)
        variance = _dot(features, spread)
        chance = logistic(_dot(self._means, features))
        information = weight * chance * (1 - chance)
        shrink = information / (1 + information * variance)
        step = weight * (outcome - chance) / (1 + information * variance)
        for row, (line, along) in enumerate(zip(self._covariance, spread, strict=True)):
            self._means[row] += along * step
            for column, other in enumerate(spread):
                line[column] -= shrink * along * other

    def means(self) -> Vector:
        """Of the weights, now."""
        return tuple(self._means)

    def check(self) -> None:
        """Invariants."""
        for row, line in enumerate(self._covariance):
            assert 0 < line[row] <= self._loosest * (1 + 1e-9), "certainty of a weight is never below that at first"
            for column in range(row):
                assert abs(line[column] - self._covariance[column][row]) < 1e-6, "a covariance is symmetric"

    def _spread(self, features: Vector) -> list[float]:
        return [_dot(line, features) for line in self._covariance]


def _dot(left: Sequence[float], right: Sequence[float]) -> float:
    return sum(a * b for a, b in zip(left, right, strict=True))

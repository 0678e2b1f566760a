"""vCache's own rule (Schroeder et al. 2025, "vCache: Verified Semantic Prompt Caching"), an opponent in the study only.

Written from the paper's formulae. Of each entry a logistic of the cosine, fitted to what later comparisons with it
showed; served by a coin so that each look-up is right with a chance of at least ``1 - wrong_share``. Only the nearest
entry is looked at. What was compared and right is not stored: ask ``Replay.fill`` for that. Three points are ours:
entries whose data are separable have no finite fit, so they are a step in the middle of the gap; the grid of epsilon is
geometric; and the variances of separable entries lie between four given points. It serves more than the authors' code
does (``README.md``).
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import NormalDist

import msgspec
import numpy as np

from engine.events import TextMarks
from engine.policy.rules import DRAWS, Candidate, Judgement, Key, Lesson, RuleStats

ENOUGH = 6  # observations, the two artificial ones among them
SEEDS = ((0.0, False), (1.0, True))  # of each entry: (cosine, right)
EPSILON = np.geomspace(1e-4, 0.5, 50)
Z = np.array([NormalDist().inv_cdf(1 - each) for each in EPSILON.tolist()])
SEPARABLE_AT, SEPARABLE_VARIANCE = (6, 10, 20, 30), (0.035, 0.019, 0.013, 0.008)  # by observations
LEAST_STEEP = 1e-6
STEPS, TOLERANCE = 60, 1e-8  # Newton's


class Fit(msgspec.Struct, frozen=True):
    """An entry is right at cosine ``s`` with ``1 / (1 + exp(-steep * (s - at)))``; ``steep`` may be infinite."""

    at: float
    steep: float
    deviation: float  # of ``at``


def fit(cosines: np.ndarray, right: np.ndarray) -> Fit:
    """By maximum likelihood. ``cosines``: float ``[n]``; ``right``: bool ``[n]``; the seeds among them."""
    last_wrong, first_right = float(cosines[~right].max()), float(cosines[right].min())
    if last_wrong <= first_right:
        variance = float(np.interp(len(cosines), SEPARABLE_AT, SEPARABLE_VARIANCE))
        return Fit((last_wrong + first_right) / 2, float("inf"), variance**0.5)
    intercept, slope, covariance = _newton(np.stack((np.ones_like(cosines), cosines), 1), right.astype(float))
    steep = max(slope, LEAST_STEEP)
    gradient = np.array([-1 / steep, intercept / steep**2])
    return Fit(min(1.0, max(0.0, -intercept / steep)), steep, float(gradient @ covariance @ gradient) ** 0.5)


def _newton(x: np.ndarray, y: np.ndarray) -> tuple[float, float, np.ndarray]:
    """Intercept, slope and their covariance; steps are halved until they do not lose likelihood."""

    def likelihood(weights: np.ndarray) -> float:
        odds = x @ weights
        return float((y * odds - np.logaddexp(0, odds)).sum())

    def curvature(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        chance = 0.5 * (1 + np.tanh(x @ weights / 2))
        return chance, x.T @ (x * (chance * (1 - chance))[:, None]) + 1e-9 * np.eye(2)

    weights, reached = np.zeros(2), likelihood(np.zeros(2))
    for _ in range(STEPS):
        chance, hessian = curvature(weights)
        step = np.linalg.solve(hessian, x.T @ (y - chance))
        while likelihood(weights + step) < reached and np.abs(step).max() > TOLERANCE:
            step = step / 2
        weights = weights + step
        reached = likelihood(weights)
        if np.abs(step).max() <= TOLERANCE * (1 + np.abs(weights).max()):
            break
    return float(weights[0]), float(weights[1]), np.linalg.inv(curvature(weights)[1])


def explore_chance(model: Fit, cosine: float, wrong_share: float) -> float:
    """Chance with which the entry must be compared instead of served; 0 or less: always served."""
    at = np.clip(model.at + Z * model.deviation, 0.0, 1.0)
    if np.isinf(model.steep):
        right = (cosine >= at).astype(float)
    else:
        right = 0.5 * (1 + np.tanh(model.steep * (cosine - at) / 2))
    return float((1 - wrong_share / (1 - (1 - EPSILON) * right)).min())


class VCacheRule:
    """See ``Rule``. ``wrong_share``: of each look-up, the most that its answer may be wrong. Nobody vetoes."""

    def __init__(self, wrong_share: float) -> None:
        self._wrong_share = wrong_share
        self._seen: dict[Key, list[tuple[float, bool]]] = {}
        self._fits: dict[Key, Fit] = {}  # of entries that learned nothing since
        self._asked = self._served = self._explored = self._lessons = self._wrong = 0

    def judge(self, marks: TextMarks, near: Sequence[Candidate], relaxed: bool, draw: int) -> Judgement:
        """See ``Rule``. The nearest only, whatever its marks; there is no relaxed standard."""
        self._asked += 1
        if not near or not near[0].servable:
            return Judgement()
        key, cosine = near[0].key, near[0].cosine_millionths / 1_000_000
        if len(SEEDS) + len(self._seen.get(key, ())) < ENOUGH:
            return Judgement(compare=0)
        if draw / DRAWS <= explore_chance(self._fit(key), cosine, self._wrong_share):
            self._explored += 1
            return Judgement(compare=0)
        self._served += 1
        return Judgement(serve=0)

    def _fit(self, key: Key) -> Fit:
        if key not in self._fits:
            cosines, right = zip(*SEEDS, *self._seen[key], strict=True)
            self._fits[key] = fit(np.array(cosines), np.array(right))
        return self._fits[key]

    def learn(self, lesson: Lesson) -> None:
        """See ``Rule``."""
        self._lessons += 1
        self._wrong += not lesson.right
        self._seen.setdefault(lesson.key, []).append((lesson.cosine_millionths / 1_000_000, lesson.right))
        self._fits.pop(lesson.key, None)

    def forget(self, key: Key) -> None:
        """See ``Rule``."""
        self._seen.pop(key, None)
        self._fits.pop(key, None)

    def stats(self) -> RuleStats:
        """See ``Rule``. ``explored``: by the coin, of entries that have enough observations. No bound is reported."""
        return RuleStats(self._asked, self._served, self._explored, self._lessons, self._wrong)

    def check(self) -> None:
        """Invariants."""
        assert self._served + self._explored <= self._asked, "no more served than asked"
        assert self._wrong <= self._lessons, "no more wrong than looked at"
        assert self._fits.keys() <= self._seen.keys(), "only what was compared is fitted"

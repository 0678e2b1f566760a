"""Weights for the rule ``calibrated``, fitted on labelled questions, and a threshold whose bound survives its choice.

States of a cache come from replays that keep a share of what is asked: cold ones, warm ones, sparse ones. The features
are the rule's own (``engine.policy.calibrated.evidence``). The threshold is chosen on questions that the fit never saw:
thresholds are tried from strict to loose, each by a replay from empty and an exact binomial test that wrong / all is
not above the bound, and the last before the first failure is taken. Each test stands at the full level, as none is
reached unless all before it passed (fixed-sequence testing: Maurer, Hothorn and Lehmacher 1995; for risk control,
Angelopoulos et al. 2021, "Learn then Test").
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec
import numpy as np
from scipy.optimize import minimize

from engine.cache_config import CalibratedConfig, SemanticConfig, Veto, Weights
from engine.policy.calibrated import CalibratedRule, evidence, weighed
from sim.quality.fill import Replay, Rows
from sim.quality.neighbours import Present
from sim.quality.rates import upper

KEPT = (1.0, 0.6, 0.4)  # of what is asked, the share that enters the cache, one replay after the other
RIDGE = 1e-5  # on standardised weights
GRID = tuple(float(each) for each in np.round(np.arange(9.0, -0.01, -0.1), 2))  # log-odds, strict to loose

Wrong = Callable[[float], tuple[int, int]]  # threshold -> wrong, all


class Certificate(msgspec.Struct, frozen=True):
    """``least``: log-odds, None where not even the strictest threshold kept the bound."""

    bound: float
    least: float | None
    wrong: int
    asked: int


class Seen(msgspec.Struct, frozen=True):
    """Evidence ``[m, features]`` of every option that would have been weighed, and whether it was right ``[m]``."""

    found: np.ndarray
    right: np.ndarray


def rows_of(replay: Replay, rows: Rows, shuffles: int, seed: int, vetoes: Sequence[Veto] = ()) -> Seen:
    """Each row asked once a shuffle, of a cache that keeps a share of them."""
    found: list[tuple[float, ...]] = []
    right: list[bool] = []
    for shuffle in range(shuffles):
        rng = np.random.default_rng([seed, shuffle])
        present = Present(len(replay.questions))
        kept = rng.random(len(rows)) < KEPT[shuffle % len(KEPT)]
        for at, row in enumerate(rng.permutation(np.asarray(rows)).tolist()):
            _weigh(replay, row, present, vetoes, found, right)
            if kept[at]:
                present.insert(row)
    return Seen(np.array(found), np.array(right))


def rows_against(replay: Replay, rows: Rows, stored: Rows, vetoes: Sequence[Veto] = ()) -> Seen:
    """Each row asked once, of a cache that holds ``stored``."""
    found: list[tuple[float, ...]] = []
    right: list[bool] = []
    present = Present(len(replay.questions))
    for row in stored:
        present.insert(int(row))
    for row in rows:
        _weigh(replay, int(row), present, vetoes, found, right)
    return Seen(np.array(found), np.array(right))


def _weigh(
    replay: Replay, row: int, present: Present, vetoes: Sequence[Veto], found: list[tuple[float, ...]],
    right: list[bool],
) -> None:
    """As the rule does."""
    near, places = replay.near(row, present)
    marks = replay.questions.marks[row]
    for own, at in weighed(vetoes, marks, near):
        found.append(evidence(marks, near, own, at))
        right.append(replay.label_of[places[at]] == replay.label_of[row])


def fit_weights(seen: Seen, share: np.ndarray | None = None) -> Weights:
    """Maximum likelihood with a small ridge on standardised features; a feature that never varies gets 0. ``share``:
    of each row in the whole ``[m]``, sum 1; all alike by default."""
    found, right = seen.found, seen.right
    part = np.full(len(right), 1 / len(right)) if share is None else share
    mean, deviation = found.mean(axis=0), found.std(axis=0)
    varies = deviation > 1e-9
    scaled = np.where(varies, (found - mean) / np.where(varies, deviation, 1.0), 0.0)
    sign = 2.0 * right - 1.0

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        odds = weights[0] + scaled @ weights[1:]
        slope = -sign * part / (1 + np.exp(np.clip(sign * odds, -700, 700)))
        inner = scaled.T @ slope + 2 * RIDGE * weights[1:]
        value = (part * np.logaddexp(0, -sign * odds)).sum() + RIDGE * (weights[1:] ** 2).sum()
        return float(value), np.concatenate([[slope.sum()], inner])

    best = minimize(loss, np.zeros(found.shape[1] + 1), jac=True, method="L-BFGS-B", options={"maxiter": 5000}).x
    slopes = np.where(varies, best[1:] / np.where(varies, deviation, 1.0), 0.0)
    bias = float(best[0] - (slopes * mean).sum())
    return Weights(*(round(float(each), 4) for each in (bias, *slopes)))


def rule_at(weights: Weights, least: float, config: SemanticConfig = SemanticConfig(vetoes=())) -> CalibratedRule:  # noqa: B008
    """The rule with these weights for both sorts of identity, at this threshold."""
    given = CalibratedConfig(
        known=weights, unknown=weights, least=least, least_unknown=least, approximate_least=least,
        approximate_least_unknown=least,
    )
    return CalibratedRule(msgspec.structs.replace(config, calibrated=given))


def wrong_at(
    replay: Replay, weights: Weights, order: np.ndarray, config: SemanticConfig = SemanticConfig(vetoes=())  # noqa: B008
) -> Wrong:
    """Fills the cache from empty in this order, at any threshold."""

    def count(least: float) -> tuple[int, int]:
        outcomes = replay.fill(rule_at(weights, least, config), order)
        return int(outcomes.wrong.sum()), len(order)

    return count


def certify(wrong: Wrong, bound: float, confidence: float = 0.95, grid: Sequence[float] = GRID) -> Certificate:
    """The loosest threshold before the first that fails. ``bound`` holds with ``confidence`` after this choice."""
    passed = Certificate(bound, None, 0, 0)
    for least in grid:
        count, asked = wrong(least)
        if upper(count, asked, confidence) > bound:
            break
        passed = Certificate(bound, least, count, asked)
    return passed

"""Upper bounds that hold at every moment at once: look as often as you like, stop when you like.

For bets ``b < 0`` on a fixed grid, ``exp(b * found) / prod(1 + p_t * (exp(b) - 1))`` is a non-negative martingale when
the outcomes are 0 or 1 with conditional means ``p_t``, however these drift; so is the mixture over the grid. By Ville's
inequality it ever reaches ``1 / (1 - confidence)`` with a probability of at most ``1 - confidence``: means that would
have made it so large are refuted. As the grid is fixed, counts are all that need be kept.

Sources: Robbins (1970), "Statistical methods related to the law of the iterated logarithm", for the mixture; Howard,
Ramdas, McAuliffe and Sekhon (2021), "Time-uniform, nonparametric, nonasymptotic confidence sequences"; Waudby-Smith and
Ramdas (2024), "Estimating means of bounded random variables by betting".
"""

from __future__ import annotations

from collections.abc import Callable
from math import exp, expm1, floor, log, log1p

# No bet is best for all: where little was found large ones are, else small ones. Eight of them cost log(8) at most.
BETS = (-8.0, -3.2, -1.6, -0.8, -0.4, -0.2, -0.1, -0.05)
HALVINGS = 40


def evidence(found: int, shrinks: list[float]) -> float:
    """Log of the mixture; ``shrinks``: for each bet the sum of ``log(1 + p_t (exp(bet) - 1))``, at most 0."""
    terms = [bet * found - shrink for bet, shrink in zip(BETS, shrinks, strict=True)]
    most = max(terms)
    return most + log(sum(exp(term - most) for term in terms) / len(terms))


def upper_mean(found: int, tried: int, confidence: float) -> float:
    """At all times at once, with this confidence: the mean of the conditional means of ``tried`` outcomes is not above.

    ``found`` of the outcomes were 1. A product of ``1 + p_t (exp(b) - 1)`` is at most the power of its mean (Jensen),
    so drift only makes the bound safer.
    """

    def refuted(mean: float) -> bool:
        return evidence(found, [tried * log1p(mean * expm1(bet)) for bet in BETS]) >= -log(1 - confidence)

    return _last(refuted, found / tried, 1.0) if tried else 1.0


def upper_count(found: int, share: float, most: int, confidence: float) -> int:
    """At all times at once, with this confidence: there were no more than this, seen or not, of at most ``most``.

    Each was looked at by a coin that shows heads with chance ``share``, whatever is there; ``found`` were seen. Nothing
    is assumed of how they came about: given that one is there, the look finds it with chance ``share``. So the bound
    is for what really happened, not for a mean. A share that is stated too small only makes it larger.
    """
    if share <= 0:
        return most
    if share >= 1:
        return min(found, most)
    shrink = [log1p(share * expm1(bet)) for bet in BETS]

    def refuted(count: float) -> bool:
        return evidence(found, [count * each for each in shrink]) >= -log(1 - confidence)

    return floor(_last(refuted, float(min(found, most)), float(most)))


def _last(refuted: Callable[[float], bool], low: float, high: float) -> float:
    """The largest that is not refuted, rounded up; ``refuted`` is monotone. Bisection."""
    if not refuted(high):
        return high
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if refuted(middle):
            high = middle
        else:
            low = middle
    return high

"""Rule ``conformal``: one cosine for all, moved so that few enough of all that ask get a wrong answer.

After conformal risk control (Angelopoulos et al. 2024): the loosest cosine that, had it stood all along, would have
cost no more than ``wrong_share`` by what was seen, less one standard error. It starts strict. A miss is computed anyway
and held against its nearest entry, so what a looser cosine would cost is known before it is tried; of what could be
served, ``explore_least`` are looked at by a coin, and audits of hits count too. An error among those tightens at once
(after Gibbs and Candes 2021). No move is greater than ``step``.

Deviations: the risk is estimated by bands of the cosine, since nearly all looks are below it, and few above; a band
borrows from the looser one, which is worse; old looks fade, so that it follows a drift. The paper's guarantee, for
exchangeable traffic and one choice, does not hold for this loop: what holds is ``bound_millionths``.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

from engine.cache_config import SemanticConfig
from engine.events import TextMarks
from engine.policy.looks import Looks
from engine.policy.rules import Candidate, Judgement, Key, Lesson, RuleStats
from engine.policy.vetoes import vetoed

BANDS = 100  # of the cosine, each a hundredth wide
BAND_MILLIONTHS = 1_000_000 // BANDS
EVERY = 50  # asked, between two moves
LENT = 100  # looks, from the looser band; chosen on Banking77
FADE = 0.995  # each time: some 10,000 asked are remembered


class ConformalRule:
    """See ``Rule``."""

    def __init__(self, config: SemanticConfig) -> None:
        self._vetoes, self._config = config.vetoes, config.conformal
        self._looks = Looks(self._config.explore_least, self._config.confidence)
        self._strict = self._relaxed = round(self._config.start * 1_000_000)
        self._step = round(self._config.step * 1_000_000)
        self._near, self._looked, self._errors = ([0.0] * BANDS for _ in range(3))  # by band
        self._seen = 0.0
        self._asked = self._lessons = self._wrong = 0

    def judge(self, marks: TextMarks, near: Sequence[Candidate], relaxed: bool, draw: int) -> Judgement:
        """See ``Rule``. Only the nearest candidate that may serve is weighed."""
        self._asked += 1
        self._seen += 1
        if self._asked % EVERY == 0:
            self._move()
        at = next((i for i, c in enumerate(near) if c.servable and not vetoed(self._vetoes, marks, c.marks)), None)
        if at is None:
            return Judgement()
        key, cosine = near[at].key, near[at].cosine_millionths
        self._near[_band(cosine)] += 1
        if cosine < (self._relaxed if relaxed else self._strict) or self._looks.looks(key, cosine, draw):
            return Judgement(compare=at)
        return Judgement(serve=at, approximate=cosine < self._strict)

    def learn(self, lesson: Lesson) -> None:
        """See ``Rule``."""
        self._lessons += 1
        self._wrong += not lesson.right
        looked = self._looks.learn(lesson)
        band = _band(lesson.cosine_millionths)
        self._looked[band] += 1
        self._errors[band] += not lesson.right
        if not lesson.right and (looked or lesson.audit):
            if lesson.cosine_millionths >= self._strict:
                self._strict = min(1_000_000, self._strict + self._step)
            self._relaxed = max(self._relaxed, min(self._strict, self._relaxed + self._step))

    def _move(self) -> None:
        self._strict = self._moved(self._strict, self._config.wrong_share)
        self._relaxed = min(self._strict, self._moved(self._relaxed, self._config.approximate_wrong_share))
        for counts in (self._near, self._looked, self._errors):
            counts[:] = [count * FADE for count in counts]
        self._seen *= FADE

    def _moved(self, threshold: int, share: float) -> int:
        """A step at most towards the loosest that what was seen allows."""
        cost, variance, band = 0.0, 0.0, BANDS
        for near, looked, rate in zip(self._near[::-1], self._looked[::-1], self._rates()[::-1], strict=True):
            cost += near * rate
            variance += near * near * rate / (looked + LENT)
            if cost + sqrt(variance) > share * self._seen:
                break
            band -= 1
        return max(threshold - self._step, min(threshold + self._step, band * BAND_MILLIONTHS))

    def _rates(self) -> list[float]:
        """Errors by band, lowest first. To its own looks each adds ``LENT``, as bad as those of the looser band."""
        rate, rates = 1.0, []
        for looked, errors in zip(self._looked, self._errors, strict=True):
            rate = (errors + LENT * rate) / (looked + LENT)
            rates.append(rate)
        return rates

    def forget(self, key: Key) -> None:
        """See ``Rule``: nothing is known of single entries."""

    def stats(self) -> RuleStats:
        """See ``Rule``."""
        return RuleStats(
            self._asked, self._looks.served, self._looks.explored, self._lessons, self._wrong,
            self._looks.bound_millionths(self._asked), self._strict,
        )

    def check(self) -> None:
        """Invariants."""
        assert 0 <= self._relaxed <= self._strict <= 1_000_000, "relaxed is never the stricter"
        assert self._looks.served + self._looks.explored <= self._asked, "no more served than asked"
        assert all(e <= n + 1e-9 for e, n in zip(self._errors, self._looked, strict=True)), "no more wrong than seen"
        self._looks.check()


def _band(cosine_millionths: int) -> int:
    return max(0, min(BANDS - 1, cosine_millionths // BAND_MILLIONTHS))

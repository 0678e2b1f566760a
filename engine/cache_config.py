"""What can be set about answers from caches: the exact one, the one of similar questions, and the rules in there.

Every share is a share of 1, every cosine a cosine (never a distance). What a rule's numbers were fitted on, and what
they were worth on questions that the fit never saw, stands in ``engine/policy/README.md``.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from engine.units import MIB_BYTES
from engine.values import NonNegative, NonNegativeFloat, Positive, PositiveFloat, Section, Share

RuleName = Literal["fixed", "calibrated", "adaptive", "conformal"]
Veto = Literal["numbers", "negation", "names", "opposites"]


class ExactConfig(Section):
    """Answers to requests that were the same to the letter."""

    enabled: bool = True
    max_mib: PositiveFloat = 64.0  # about 300,000 answers of 200 bytes
    ttl_s: PositiveFloat = 60.0  # prices and stock move within minutes in a sale
    revalidate_s: NonNegativeFloat = 0.0  # so much older still serves, once more, while it is computed anew
    stale_s: NonNegativeFloat = 240.0  # so much older is still good enough for a sheddable class under overload
    single_flight: bool = True  # who asks what is just being computed waits for that

    @property
    def max_bytes(self) -> int:
        """Capacity in bytes of answer text."""
        return round(self.max_mib * MIB_BYTES)


class Weights(Section):
    """A logistic over what the neighbours say for an answer: log-odds that it is right. In ``evidence``'s order."""

    bias: float = 0.0
    cosine: float = 0.0  # of the entry that would serve
    margin: float = 0.0  # cosine minus that of the nearest entry with another answer
    votes: float = 0.0  # of the neighbours, the share with the same answer
    near_votes: float = 0.0  # the same, each weighted by its cosine to the 12th
    nearer_votes: float = 0.0  # the same, to the 24th
    second: float = 0.0  # cosine of the next entry with the same answer; 0 = none
    no_second: float = 0.0  # 1 where there is none
    third: float = 0.0  # and of the one after that
    no_third: float = 0.0
    overlap: float = 0.0  # share of words in common
    last: float = 0.0  # cosine of the farthest neighbour that was shown


class CalibratedConfig(Section):
    """Rule ``calibrated``: serves when the log-odds reach ``least``. Two fits: answers' identity known, or not.

    Fitted by ``sim.quality.shipping`` with the default vetoes on 3,500 questions of Banking77 (Casanueva et al. 2020;
    all-MiniLM-L6-v2; cache filling from empty, eight neighbours), on 932 of the own corpus (half the weight) and on 103
    traps (0.07 of it): near questions whose answer is in no cache. ``least`` and ``approximate_least`` are the loosest
    log-odds that passed a fixed-sequence test on 3,500 other questions of Banking77, for 0.25 % and 1.0 % wrong of all
    that ask. Replayed requests share entries, so the test is an approximation, and it says nothing of other traffic:
    audit yours (``audit_share``). Where answers have few wordings in the cache, ``least`` serves next to nothing.
    What became of the bounds on rows that nobody had fitted on stands in ``sim/quality/README.md``.
    """

    known: Weights = Weights(
        bias=-10.195, cosine=8.6874, margin=-1.6743, votes=2.1938, near_votes=6.3234, nearer_votes=0.4438,
        second=-1.1695, no_second=-0.3741, third=-2.3938, no_third=-0.2746, overlap=-1.2328, last=2.3926,
    )
    unknown: Weights = Weights(
        bias=-6.0245, cosine=7.1476, margin=1.005, votes=-4.7192, near_votes=5.763, nearer_votes=-3.3734,
        overlap=-0.8248, last=3.3571,
    )
    least: float = 4.0  # log-odds
    least_unknown: float = 3.1
    approximate_least: float = 2.5
    approximate_least_unknown: float = 2.4


class AdaptiveConfig(Section):
    """Rule ``adaptive``: learns while it serves which answers are right (in the manner of vCache)."""

    wrong_share: Annotated[float, msgspec.Meta(gt=0, lt=1)] = 0.01  # of all that ask, at most so many get a wrong one
    approximate_wrong_share: Annotated[float, msgspec.Meta(gt=0, lt=1)] = 0.05
    explore_least: Share = 0.02  # of what could be served, so many are computed anew however sure the rule is
    pending_most: Positive = 10_000  # questions under way whose answers are awaited as lessons
    confidence: Annotated[float, msgspec.Meta(gt=0, lt=1)] = 0.95  # of the bound that is reported


class ConformalConfig(Section):
    """Rule ``conformal``: one cosine, moved by what comparisons show so that errors stay at their share."""

    wrong_share: Annotated[float, msgspec.Meta(gt=0, lt=1)] = 0.01  # of all that ask
    approximate_wrong_share: Annotated[float, msgspec.Meta(gt=0, lt=1)] = 0.05
    start: Share = 0.97  # cosine at first
    step: PositiveFloat = 0.002  # of the cosine, at most, every 50 questions and at each error that was served or could
    explore_least: Share = 0.02  # of what could be served, so many are computed anew
    confidence: Annotated[float, msgspec.Meta(gt=0, lt=1)] = 0.95  # of the bound that is reported


class SemanticConfig(Section):
    """Answers to single questions that mean the same under the same hard key."""

    enabled: bool = True
    rule: RuleName = "fixed"
    cosine: Share = 0.95  # fixed: MiniLM on Banking77: of the hits at 0.95, 2.7 % were wrong; at 0.85, 4.4 %
    approximate_cosine: Share = 0.85  # fixed: good enough for a sheddable class from level 1 on
    vetoes: tuple[Veto, ...] = ("numbers", "negation", "names", "opposites")  # traps at 0.95: 42 % without, 3 % with
    calibrated: CalibratedConfig = CalibratedConfig()
    adaptive: AdaptiveConfig = AdaptiveConfig()
    conformal: ConformalConfig = ConformalConfig()
    identity: Literal["text", "meaning", "unknown"] = "text"  # equal answers: by digest, by their vectors, not at all
    same_answer_cosine: Share = 0.95  # identity "meaning": answers so near are one
    audit_share: Share = 0.0  # of the hits, computed anew when it is calm, and compared
    quarantine: NonNegative = 0  # so many others must get an equal answer before an entry serves them; 0 = at once
    coalesce: bool = False  # a question that is just being computed serves those that mean the same
    neighbours: Positive = 8  # nearest entries that are looked at
    deadline_ms: Positive = 50  # for encoding and search; then a miss
    ttl_s: PositiveFloat = 60.0  # as for exact answers
    stale_s: NonNegativeFloat = 240.0
    max_entries: Positive = 20_000
    vectors: Literal["float32", "int8"] = "float32"  # int8: a quarter of the memory, cosines off by up to 0.001


class SnapshotConfig(Section):
    """The response caches on disk, for a start that is not from nothing. ``doorbuster serve`` only."""

    path: str = ""  # file, its owner's alone to read: it holds answers and the key of all digests; "" = none
    every_s: NonNegativeFloat = 0.0  # written so often; 0 = at the end only: copying holds up the gateway for a moment

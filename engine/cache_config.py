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
    """A logistic over what is known of a candidate: log-odds that its answer is the right one."""

    bias: float = 0.0
    cosine: float = 0.0
    margin: float = 0.0  # cosine minus that of the nearest entry with another answer
    votes: float = 0.0  # of the neighbours, the share with the same answer
    near_votes: float = 0.0  # the same, each weighted by exp(12 x cosine)
    second: float = 0.0  # cosine of the next entry with the same answer
    overlap: float = 0.0  # share of words in common


class CalibratedConfig(Section):
    """Rule ``calibrated``: serves when the log-odds reach ``least``. Two fits: answers' identity known, or not."""

    known: Weights = Weights()
    unknown: Weights = Weights()  # identity of answers not known: margin and votes have no meaning
    least: float = 4.0  # log-odds; chosen on a hold-out
    least_unknown: float = 4.0
    approximate_least: float = 2.0
    approximate_least_unknown: float = 2.0


class AdaptiveConfig(Section):
    """Rule ``adaptive``: a threshold for each entry, learned from what its answer was worth (vCache)."""

    wrong_share: Annotated[float, msgspec.Meta(gt=0, lt=1)] = 0.01  # of all that ask, at most so many get a wrong one
    approximate_wrong_share: Annotated[float, msgspec.Meta(gt=0, lt=1)] = 0.05
    explore_least: Share = 0.02  # audit floor: so many are computed anew however sure the rule is
    remembered: Positive = 64  # observations of an entry


class ConformalConfig(Section):
    """Rule ``conformal``: one threshold, moved by audited errors so that their share stays at the target."""

    wrong_share: Annotated[float, msgspec.Meta(gt=0, lt=1)] = 0.01  # of all that ask
    approximate_wrong_share: Annotated[float, msgspec.Meta(gt=0, lt=1)] = 0.05
    start: Share = 0.97  # cosine at first
    step: PositiveFloat = 0.02  # of the cosine, for a whole error
    confidence: Annotated[float, msgspec.Meta(gt=0, lt=1)] = 0.95  # of the bound that is reported


class SemanticConfig(Section):
    """Answers to single questions that mean the same under the same hard key."""

    enabled: bool = True
    rule: RuleName = "fixed"
    cosine: Share = 0.95  # fixed: MiniLM on Banking77: of the hits at 0.95, 2.7 % were wrong; at 0.85, 4.4 %
    approximate_cosine: Share = 0.85  # fixed: good enough for a sheddable class from level 1 on
    vetoes: tuple[Veto, ...] = ()  # for every rule: what must not differ between two questions
    calibrated: CalibratedConfig = CalibratedConfig()
    adaptive: AdaptiveConfig = AdaptiveConfig()
    conformal: ConformalConfig = ConformalConfig()
    identity: Literal["text", "meaning", "unknown"] = "text"  # equal answers: by digest, by their vectors, not at all
    same_answer_cosine: Share = 0.95  # identity "meaning": answers so near are one
    audit_share: Share = 0.0  # of the hits, computed anew when it is calm, and compared
    quarantine: NonNegative = 0  # so many others must get an equal answer before an entry serves them; 0 = at once
    coalesce: bool = False  # a question that is just being computed serves those that mean the same
    neighbours: Positive = 8  # nearest entries that are looked at
    deadline_ms: Positive = 60  # for encoding and search; then a miss
    ttl_s: PositiveFloat = 60.0  # as for exact answers
    stale_s: NonNegativeFloat = 240.0
    max_entries: Positive = 20_000
    vectors: Literal["float32", "int8"] = "float32"  # int8: a quarter of the memory, cosines off by up to 0.01

"""Which rule a scenario names."""

from __future__ import annotations

from engine.cache_config import SemanticConfig
from engine.policy.adaptive import AdaptiveRule
from engine.policy.calibrated import CalibratedRule
from engine.policy.conformal import ConformalRule
from engine.policy.fixed import FixedRule
from engine.policy.rules import Rule


def rule_of(config: SemanticConfig) -> Rule:
    """A new one, that has learned nothing yet."""
    match config.rule:
        case "fixed":
            return FixedRule(config)
        case "calibrated":
            return CalibratedRule(config)
        case "adaptive":
            return AdaptiveRule(config)
        case "conformal":
            return ConformalRule(config)

"""All rules on the same requests: deflected, and wrong of all, of the hits, of the traps."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec
import numpy as np

from engine.cache_config import AdaptiveConfig, CalibratedConfig, ConformalConfig, SemanticConfig, Veto
from engine.policy.adaptive import AdaptiveRule
from engine.policy.calibrated import CalibratedRule
from engine.policy.conformal import ConformalRule
from engine.policy.fixed import FixedRule
from engine.policy.rules import Rule
from sim.quality.certified import Split, orders
from sim.quality.fill import Outcomes, Replay
from sim.quality.questions import Questions
from sim.quality.rates import Part, part
from sim.quality.vcache import VCacheRule

VETOES = SemanticConfig().vetoes
GPTCACHE_COSINE = 0.60  # its default of 0.8 on the scale 4 - squared distance, top-1, insert on a miss
WRONG_SHARE = 0.01  # that the rules which learn are told


class Contestant(msgspec.Struct, frozen=True):
    """``make``: a new rule. ``known``: whether it may see which entries have the same answer. ``learns``: it compares
    on nearly every miss, which costs nothing, and counts by itself what it computed by its coin only to compare.
    ``store_right``: see ``Replay.fill``."""

    name: str
    make: Callable[[], Rule]
    known: bool = True
    learns: bool = False
    store_right: bool = True


class Row(msgspec.Struct, frozen=True):
    """One rule in one setting. ``explored``: of all, computed only to compare."""

    setting: str
    rule: str
    deflected: Part
    wrong_of_all: Part
    wrong_of_hits: Part
    explored: Part


class Setting(msgspec.Struct, frozen=True):
    """``orders``: of asking; ``stored``: rows in the cache before."""

    name: str
    replay: Replay
    orders: list[np.ndarray]
    stored: np.ndarray
    insert: bool


def contestants() -> list[Contestant]:
    """With the weights and thresholds that ship."""
    shipped = CalibratedConfig()
    loose = CalibratedConfig(least=shipped.approximate_least, least_unknown=shipped.approximate_least_unknown)

    learning = SemanticConfig(
        vetoes=(), adaptive=AdaptiveConfig(wrong_share=WRONG_SHARE), conformal=ConformalConfig(wrong_share=WRONG_SHARE)
    )

    def fixed(cosine: float, vetoes: tuple[Veto, ...] = ()) -> Callable[[], Rule]:
        return lambda: FixedRule(SemanticConfig(cosine=cosine, vetoes=vetoes))

    def calibrated(config: CalibratedConfig, vetoes: tuple[Veto, ...] = ()) -> Callable[[], Rule]:
        return lambda: CalibratedRule(SemanticConfig(calibrated=config, vetoes=vetoes))

    return [
        Contestant("GPTCache's rule, cosine 0.60", fixed(GPTCACHE_COSINE)),
        Contestant("fixed 0.85", fixed(0.85)),
        Contestant("fixed 0.90", fixed(0.90)),
        Contestant("fixed 0.95", fixed(0.95)),
        Contestant("fixed 0.95 + vetoes", fixed(0.95, VETOES)),
        Contestant("calibrated, 0.25 %", calibrated(shipped)),
        Contestant("calibrated, 1.0 %", calibrated(loose)),
        Contestant("calibrated, 0.25 % + vetoes", calibrated(shipped, VETOES)),
        Contestant("calibrated, 1.0 % + vetoes", calibrated(loose, VETOES)),
        Contestant("calibrated, 0.25 %, answers unknown", calibrated(shipped), known=False),
        Contestant("calibrated, 0.25 %, answers unknown + vetoes", calibrated(shipped, VETOES), known=False),
        Contestant("calibrated, 1.0 %, answers unknown", calibrated(loose), known=False),
        Contestant("adaptive, 1 %", lambda: AdaptiveRule(learning), learns=True),
        Contestant("conformal, 1 %", lambda: ConformalRule(learning), learns=True),
        Contestant("vCache, 1 %", lambda: VCacheRule(WRONG_SHARE), learns=True, store_right=False),
    ]


def settings(data: Split, train: Questions, test: Questions, own: tuple[Questions, Questions]) -> list[Setting]:
    """Banking77 and the own corpus, each against a full cache and filling from empty; the traps. ``calibrated`` was
    fitted on one half of the last two, so the other half is shown by itself as well."""
    asked, traps = own
    filling, full = Replay(data.test), Replay(train.and_then(test))
    corpus = Replay(asked.and_then(traps))
    every, none, unread = np.arange(len(asked)), np.arange(0), np.flatnonzero(~asked.read)
    unread_orders = [unread[each] for each in orders(len(unread))]
    test_rows = np.arange(len(train), len(train) + len(test))
    trap_rows = np.arange(len(asked), len(asked) + len(traps))
    return [
        Setting("Banking77, filling", filling, orders(len(data.test)), none, True),
        Setting("Banking77, full", full, [test_rows], np.arange(len(train)), False),
        Setting("own corpus, filling", corpus, orders(len(asked)), none, True),
        Setting("own corpus, full", corpus, [every], every, False),
        Setting("own corpus, half not read, filling", corpus, unread_orders, none, True),
        Setting("traps", corpus, [trap_rows], every, False),
        Setting("traps, half not read", corpus, [trap_rows[~traps.read]], every, False),
    ]


def rows(contestants: Sequence[Contestant], setting: Setting) -> list[Row]:
    """Each of them in this setting, shuffles pooled by request."""
    found = []
    replay = setting.replay
    for each in contestants:
        replay.show_answers(replay.questions.labels if each.known else [""] * len(replay.questions))
        outcomes, explored = [], 0
        for shuffle, order in enumerate(setting.orders):
            rule = each.make()
            outcome = replay.fill(
                rule, order, setting.stored, setting.insert, seed=shuffle, store_right=each.store_right
            )
            outcomes.append(outcome)
            explored += rule.stats().explored if each.learns else int(outcome.explored.sum())
        found.append(row(setting.name, each.name, outcomes, explored))
    return found


def row(setting: str, rule: str, outcomes: Sequence[Outcomes], explored: int) -> Row:
    """Pooled by request."""
    asked = sum(each.served.size for each in outcomes)
    served = sum(int(each.served.sum()) for each in outcomes)
    wrong = sum(int(each.wrong.sum()) for each in outcomes)
    return Row(setting, rule, part(served, asked), part(wrong, asked), part(wrong, served), part(explored, asked))

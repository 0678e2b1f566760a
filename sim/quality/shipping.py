"""The weights and thresholds that ship with the rule ``calibrated``.

Banking77 alone teaches that a near question with nobody else around is safe, since all its answers are soon in the
cache. A trap is a near question with nobody else around whose answer is in no cache. So three sorts of lookups are
fitted on together: Banking77's, those of the own corpus, and traps against it; of the last two only the half that the
authors of the word lists had read. The thresholds are for Banking77's bounds, with the default vetoes at work.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from engine.cache_config import SemanticConfig
from sim.quality.certified import BOUNDS, Chosen, Split
from sim.quality.fill import Replay
from sim.quality.fit import Seen, certify, fit_weights, rows_against, rows_of, wrong_at
from sim.quality.questions import Questions

SHUFFLES = 6
CORPUS, TRAPS = 0.5, 0.07  # weight of all these lookups together, beside 1 for Banking77's


class Material(msgspec.Struct, frozen=True):
    """``banking77``: rows in random order, the first half to be fitted on. ``corpus``: the half that was read, then
    its traps from ``first_trap`` on."""

    banking77: Replay
    corpus: Replay
    first_trap: int


def gather(data: Split, asked: Questions, traps: Questions) -> Material:
    """Of all that there is."""
    read, read_traps = (each.take(np.flatnonzero(each.read)) for each in (asked, traps))
    return Material(Replay(data.fit), Replay(read.and_then(read_traps)), len(read))


def ship(
    material: Material, known: bool, corpus: float = CORPUS, traps: float = TRAPS,
    config: SemanticConfig = SemanticConfig(),  # noqa: B008
) -> Chosen:
    """``known``: whether the rule sees which entries have the same answer. ``config``: whose vetoes are at work."""
    for replay in (material.banking77, material.corpus):
        replay.show_answers(replay.questions.labels if known else [""] * len(replay.questions))
    half = len(material.banking77.questions) // 2
    stored = np.arange(material.first_trap)
    trap_rows = np.arange(material.first_trap, len(material.corpus.questions))
    parts = [
        (1.0, rows_of(material.banking77, np.arange(half), SHUFFLES, seed=7, vetoes=config.vetoes)),
        (corpus, rows_of(material.corpus, stored, SHUFFLES, seed=7, vetoes=config.vetoes)),
        (traps, rows_against(material.corpus, trap_rows, stored, config.vetoes)),
    ]
    weights = fit_weights(*_together(parts))
    order = np.arange(half, len(material.banking77.questions))
    wrong = wrong_at(material.banking77, weights, order, config)
    return Chosen(weights, tuple(certify(wrong, bound).least for bound in BOUNDS))


def _together(parts: Sequence[tuple[float, Seen]]) -> tuple[Seen, np.ndarray]:
    """All rows, and each one's share of the whole."""
    share = np.concatenate([np.full(len(seen.right), weight / len(seen.right)) for weight, seen in parts])
    found, right = (np.concatenate([getattr(seen, name) for _, seen in parts]) for name in ("found", "right"))
    return Seen(found, right), share / share.sum()

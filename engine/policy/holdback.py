"""A stampede's second rank: who would compute again what another one is computing already lets it go first.

Many ask with one new, long prefix. The first computes it over several steps; whoever comes later finds what has been
published. But an older one of the same tenant, heard late or put back before, would take the budget first and compute
the same blocks again. It waits until the owner has had its chunk of this step: either that published all they share,
or the step is full. Nothing is parked, so nothing has to be woken: the next plan asks anew, and an owner that has
ended, failed or was put back is simply no longer there. Nobody behind it loses by this: the owner takes only what the
one held back would have taken itself. Across priorities nobody is held back: the higher computes for itself.
"""

from __future__ import annotations

from collections.abc import Iterable

from engine.policy.sequence import Sequence
from engine.units import ceil_div


def held_back(head: Sequence, hits: int, owners: Iterable[Sequence], block_tokens: int, least_tokens: int) -> bool:
    """Is one of ``owners``, in prefill and not yet served by this plan, computing what ``head`` needs next?

    ``hits``: its leading blocks that are cached. At least ``least_tokens`` behind them must be full blocks in common;
    digests are chained, so the last of these blocks speaks for all.
    """
    last = hits + ceil_div(least_tokens, block_tokens) - 1
    if last >= min(len(head.digests), (head.known - 1) // block_tokens):
        return False
    return any(
        owner.priority == head.priority
        and owner.computed <= hits * block_tokens
        and last < len(owner.digests)
        and owner.digests[last] == head.digests[last]
        for owner in owners
    )

"""What becomes of the running set when a step raised, or gave no number: nobody is lost, and nothing false is found.

Three functions over a ``Batcher``, called between two steps; ``isolation.py`` keeps who is under suspicion.
"""

from __future__ import annotations

from engine.events import RunStep
from engine.policy.batcher import Batcher
from engine.policy.sequence import Sequence


def fail(batcher: Batcher, step: RunStep) -> Sequence | None:
    """``step`` raised, and what it wrote may not be trusted: who ran in it goes on from where it stood before.

    The one that is to end, when it is certain who was guilty; else trials follow. The step is not counted: no row has
    a token from it. What the runner did of it is unknown, so the next plan says its stops and starts again.
    """
    pool = batcher.pool
    written = set(batcher.published)
    for block in batcher.published:
        pool.unpublish(block)
    batcher.published.clear()
    batcher.stop = list(step.stop)
    for start in step.start:
        seq = batcher.running[start.sid]
        if not seq.chunk:
            seq.told = False
            batcher.held.append(seq)
    # in the step's order: only its last prompt was cut to the budget, so in a trial nobody gets less than here
    ran = [*(seq for seq in batcher.running.values() if seq.state == "decode"), *batcher.planned]
    batcher.planned.clear()
    for seq in ran:
        batcher.hold(seq)
    batcher.stop = list(dict.fromkeys(batcher.stop))
    suspects = [seq for seq in ran if written.isdisjoint(seq.table[: seq.computed // pool.block_tokens])]
    guilty = batcher.isolation.raised([seq.ask.sid for seq in suspects], alone=len(suspects) == len(ran))
    for seq in ran:
        if seq not in suspects:  # its prefix was another's to write in this very step
            batcher.put_back(seq)
    return None if guilty is None else batcher.running[guilty]


def separate(batcher: Batcher) -> None:
    """A step went well. Was it a trial, and are others still under suspicion, then its rows stay out of the next."""
    if batcher.isolation.active:
        for seq in [seq for seq in batcher.running.values() if seq.state == "decode"]:
            batcher.hold(seq)


def distrust(batcher: Batcher, seq: Sequence) -> None:
    """The model gave ``seq`` no number: nobody may find what it read or wrote, or the next one fails on it too.

    Who has read the same blocks and has not given a token since may have written no numbers either, and would only
    find out at its own first token: it computes its prompt again, on blocks of its own.
    """
    shared = set(seq.table)
    silent = [s for s in batcher.running.values() if s.state == "prefill" and not shared.isdisjoint(s.table)]
    for other in [seq, *silent]:
        for block in other.table:
            batcher.pool.unpublish(block)
    for other in silent:
        if other is not seq:
            batcher.put_back(other)

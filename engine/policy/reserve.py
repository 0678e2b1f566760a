"""How many blocks must stay free when a sequence is taken in: for the tokens to come, for growth, and for critical.

What runs *owes*: the blocks that it may still ask for until it reaches ``max_tokens``. ``full`` keeps all of them free,
so nobody is ever put back for another one's growth; ``none`` keeps none; ``ratio`` keeps a share of them, which decays
with every step that went well and jumps up with every victim of a shortage (SGLang's idea; the form is our own: linear
down, a fixed part of the way to 1 up, so that repeated shortages end in ``full``).

Besides, a *watermark* stays free while anything else runs, or what was taken in would be put back by the next row that
grows. A sequence that was put back gets no exemption: it was put back because there was too little, and what lets it
in must last. With nothing else running there is no watermark, so the head always gets in: something always runs.
Critical may use the watermark and the blocks reserved for it, but owes like everybody.
"""

from __future__ import annotations

from collections.abc import Iterable

from engine.config import BatcherConfig, PrefixConfig
from engine.policy.sequence import Sequence
from engine.units import ceil_div

ONE = 1_000_000  # shares are whole millionths: nothing drifts over a week of sale


class Reserve:
    """Owned by a Batcher, told of each change; every call is O(1)."""

    def __init__(self, config: BatcherConfig, prefix: PrefixConfig) -> None:
        self._moves = config.reserve == "ratio"
        start = {"full": 1.0, "ratio": config.reserve_start, "none": 0.0}[config.reserve]
        self.share = round(start * ONE)  # of what is owed that stays free, in millionths
        self._least, self._jump = round(config.reserve_least * ONE), round(config.reserve_jump * ONE)
        self._decay = ceil_div(ONE, config.reserve_decay_steps)
        self._critical_only, self._watermark = config.reserved_blocks, int(config.watermark * prefix.blocks)
        self._block_tokens = prefix.block_tokens
        self.owed = 0  # blocks that what runs may still ask for

    def to_come(self, seq: Sequence) -> int:
        """Blocks that it may ask for beyond those of its known tokens; its last output needs none."""
        most_tokens = seq.ask.prompt_tokens + seq.ask.max_tokens - 1
        return ceil_div(most_tokens, self._block_tokens) - ceil_div(seq.known, self._block_tokens)

    def kept(self, seq: Sequence, beside: int, without: Iterable[Sequence] = ()) -> int:
        """Blocks that must stay free once it runs ``beside`` so many others. ``without``: those that it would evict."""
        owed = self.owed - sum(victim.owes for victim in without) + self.to_come(seq)
        future = ceil_div(owed * self.share, ONE)
        if seq.priority == 0:
            return future
        return future + max(self._critical_only, self._watermark if beside else 0)

    # ------------------------------------------------------------ what happened

    def entered(self, seq: Sequence) -> None:
        """It runs now."""
        seq.owes = self.to_come(seq)
        self.owed += seq.owes

    def grew(self, rows: list[Sequence]) -> None:
        """Each of them was given one block."""
        self.owed -= len(rows)
        for seq in rows:
            seq.owes -= 1

    def left(self, seq: Sequence) -> None:
        """It runs no more."""
        self.owed -= seq.owes
        seq.owes = 0

    def went_well(self, steps: int) -> None:
        """Rows have decoded in so many steps and nobody was put back for want of a block: a smaller share will do."""
        if self._moves:
            self.share = min(self.share, max(self._least, self.share - steps * self._decay))

    def ran_short(self) -> None:
        """A row was put back for another one's growth, or its own."""
        if self._moves:
            self.share += ceil_div((ONE - self.share) * self._jump, ONE)

    def check(self, running: Iterable[Sequence], available: int) -> None:
        """Invariants, against all that run and the blocks that are free."""
        size = self._block_tokens
        for seq in running:
            room = ceil_div(seq.ask.prompt_tokens + seq.ask.max_tokens - 1, size) - len(seq.table)
            assert seq.owes == room >= 0, "reserve: what may still be asked for, up to max_tokens"
        assert self.owed == sum(seq.owes for seq in running), "reserve: the sum of what each may ask for"
        assert 0 <= self.share <= ONE, "reserve: a share"
        if self.share == ONE and not self._moves:
            assert available >= self.owed, "reserve full: whatever runs finds its blocks"

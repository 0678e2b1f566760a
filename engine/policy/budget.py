"""How many prompt tokens a step may still take: a number of tokens, and a time where a step's cost is known.

The decode rows come first and are never cut. Chunks fill the rest in strict order; the first that must be cut ends the
step. By time, a chunk is the longest for which the predicted step stays within ``max_step_ms`` less a margin
(``engine/stepcost.py``; monotone in the chunk, so a bisection with the exact formula finds it). Whatever the rows take,
the first chunk gets one block's worth of tokens, as far as the token budget lets it: a prompt comes to its end however
slow the steps are.

A critical arrival waits for the step in flight and then runs in its own: both bound its first token. So its own is
kept short, with no lower prompt beside it; and other steps leave room for what decode rows will add to it, all that are
there when they have run: that time is off ``max_step_ms`` too. First token under load is then first token unloaded plus
``max_step_ms``, unless the rows alone take half of that.
"""

from __future__ import annotations

from engine.config import ReplicaConfig
from engine.events import StepShape


class StepBudget:
    """Of one step. What has been taken so far is its shape."""

    def __init__(self, config: ReplicaConfig, decode_rows: int, decode_kv_tokens: int, by_time: bool = True) -> None:
        """``by_time`` False: tokens alone count, as in a trial after a step that raised, which is a part of that."""
        self._by_time = by_time
        self._cost, self._max_ns = config.cost if by_time else None, config.batcher.step_limit_ns
        self._least = config.prefix.block_tokens
        self._decode_rows, self._decode_kv = decode_rows, decode_kv_tokens
        self._critical = False  # a critical chunk has been taken
        self.left_tokens = config.batcher.step_tokens - decode_rows
        self.tokens = self.rows = self.area = 0
        self._contexts = 0  # tokens in KV of the chunks' prompts when the step has run

    def most(self, computed: int, left: int, critical: bool = False) -> int:
        """The longest chunk of a prompt with ``computed`` tokens in KV and ``left`` to go; 0 when none fits."""
        if self._critical and not critical and self._by_time:
            return 0
        wanted = max(0, min(self.left_tokens, left))
        if self._within(computed, wanted, critical):
            return wanted
        fits, too_many = 0, wanted
        while too_many - fits > 1:
            middle = (fits + too_many) // 2
            if self._within(computed, middle, critical):
                fits = middle
            else:
                too_many = middle
        return fits if self.rows else max(fits, min(wanted, self._least))

    def take(self, computed: int, tokens: int, critical: bool = False) -> None:
        """A chunk is in the step."""
        self._critical |= critical
        self.left_tokens -= tokens
        self.tokens += tokens
        self.rows += 1
        self.area += _area(computed, tokens)
        self._contexts += computed + tokens

    def shape(self, decode_rows: int, decode_kv_tokens: int) -> StepShape:
        """Of the step as it came to be: with the rows that are left, should some have been put back meanwhile."""
        return StepShape(self.tokens, self.rows, decode_rows, decode_kv_tokens, self.area)

    def _within(self, computed: int, tokens: int, critical: bool) -> bool:
        if self._cost is None or not tokens:
            return True
        shape = StepShape(
            self.tokens + tokens, self.rows + 1, self._decode_rows, self._decode_kv,
            self.area + _area(computed, tokens),
        )
        left_ns = self._max_ns - self._cost.ns(shape)
        if critical:
            return left_ns >= 0
        rows = self._decode_rows + self.rows + 1
        context = self._decode_kv + self._decode_rows + self._contexts + computed + tokens
        return left_ns >= self._cost.ns(StepShape(0, 0, rows, context, 0)) - self._cost.ns(StepShape())


def _area(computed: int, tokens: int) -> int:
    return tokens * (2 * computed + tokens)

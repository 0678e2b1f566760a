"""The rows of one forward, as every way to attend understands them. No tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(slots=True)
class Span:
    """One sequence's new tokens in the flat batch: ``length`` of them after ``past`` tokens in the KV of ``table``."""

    length: int
    past: int
    table: list[int]

    @property
    def keys(self) -> int:
        """Tokens that its last row attends to, itself included."""
        return self.past + self.length

    def slots(self, block_tokens: int) -> list[int]:
        """Where the K and V of its new tokens go, as token numbers of the pool."""
        table = self.table
        if self.length == 1:
            return [table[self.past // block_tokens] * block_tokens + self.past % block_tokens]
        return [table[i // block_tokens] * block_tokens + i % block_tokens for i in range(self.past, self.keys)]


class Flavour(NamedTuple):
    """How one layer attends."""

    scale: float
    window: int = 0  # keys that a row sees, itself included; 0 = all before it
    softcap: float = 0.0  # logits become softcap * tanh(logits / softcap); 0 = as they are

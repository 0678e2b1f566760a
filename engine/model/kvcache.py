"""The paged KV pool: per layer K and V of ``[num_blocks, block_tokens, kv_heads, head_dim]``.

Memory only: which block belongs to whom is decided by the replica machine and arrives as block tables. Zeroed, and
cleared again for each owner, because a masked key still adds ``0 * value`` to its row, and ``0 * nan`` is nan.
Method: PagedAttention (Kwon et al. 2023).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from engine.model.native import Kernels

POISON = 1e30  # huge but finite: it shows in a sum, and a masked zero times it is still zero


class KVPool:
    """``keys[layer]`` and ``values[layer]`` are pages; ``key_slots`` and ``value_slots`` see the same by token."""

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        block_tokens: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        native: Kernels | None = None,
        deterministic: bool = False,
        softcap: bool = False,
    ) -> None:
        self.native = native  # kernels that attend on these pages, where there are any for them
        self.deterministic = deterministic  # on CUDA: a row's attention sums in one order whatever its neighbours are
        self.softcap = softcap  # some layer has one: not every kernel does
        self.num_blocks, self.block_tokens = num_blocks, block_tokens
        shape = (num_blocks, block_tokens, kv_heads, head_dim)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.key_slots = [pages.view(-1, kv_heads, head_dim) for pages in self.keys]
        self.value_slots = [pages.view(-1, kv_heads, head_dim) for pages in self.values]
        self.device, self.dtype = self.keys[0].device, dtype
        self._gathered = tuple(self.keys[0].new_empty((0, *shape[1:])) for _ in range(2))
        self.block_bytes = 2 * num_layers * block_tokens * kv_heads * head_dim * dtype.itemsize

    def gather(self, layer: int, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """K and V of ``blocks`` side by side, ``[n, block_tokens, kv_heads, head_dim]``; valid until the next call."""
        n = blocks.shape[0]
        if n > self._gathered[0].shape[0]:
            # kept, because memory fresh from the system costs three times the copy itself in page faults
            self._gathered = tuple(pages.new_empty((n, *pages.shape[1:])) for pages in self._gathered)
        k, v = (buffer[:n] for buffer in self._gathered)
        torch.index_select(self.keys[layer], 0, blocks, out=k)
        torch.index_select(self.values[layer], 0, blocks, out=v)
        return k, v

    @property
    def bytes(self) -> int:
        """Bytes of the whole pool."""
        return self.num_blocks * self.block_bytes

    def clear(self, blocks: Iterable[int]) -> None:
        """Zero ``blocks`` for a new owner: the last one may have left nan behind."""
        self._fill(blocks, 0.0)

    def poison(self, blocks: Iterable[int]) -> None:
        """Fill ``blocks`` with a value that no computation survives: tests prove that nobody reads a foreign block."""
        self._fill(blocks, POISON)

    def _fill(self, blocks: Iterable[int], value: float) -> None:
        where = torch.tensor(list(blocks), dtype=torch.long, device=self.device)
        for pages in (*self.keys, *self.values):
            pages.index_fill_(0, where, value)

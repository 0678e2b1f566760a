"""The whole mixed batch in one call of torch's ``varlen_attn`` over the pages: half precision on CUDA.

The kernel takes pages of multiples of 256 tokens (FlashAttention 2) and no soft-cap. ``num_splits=1`` makes a row's
result independent of its neighbours, at some cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from engine.model.kvcache import KVPool
from engine.model.spans import Flavour, Span

BLOCK_TOKENS = 256


def suits(pool: KVPool) -> bool:
    """Device and type are those of the kernel; its pages are another question."""
    half = pool.dtype in (torch.float16, torch.bfloat16)
    return pool.device.type == "cuda" and half and not pool.softcap


def refusal(pool: KVPool) -> str | None:
    """The kernel's own words if it does not take the pool's pages; None where it does, or is not asked."""
    if not suits(pool):
        return None
    heads, dim = pool.keys[0].shape[2:]
    query = torch.zeros(1, heads, dim, dtype=pool.dtype, device=pool.device)
    try:
        plan(pool, [Span(1, 0, [0])]).attend(pool, 0, query, torch.empty_like(query), Flavour(1.0))
    except (RuntimeError, ValueError) as error:
        return str(error)
    return None


@dataclass(slots=True)
class Varlen:
    """The spans in the terms of ``varlen_attn``."""

    borders: Tensor  # [N + 1] of the spans in the flat batch
    keys: Tensor  # [N] of each span
    table: Tensor  # [N, width]
    max_queries: int
    max_keys: int

    def attend(self, pool: KVPool, layer: int, query: Tensor, out: Tensor, flavour: Flavour) -> None:
        """Query ``[T, heads, dim]`` to ``out`` likewise."""
        from torch.nn.attention.varlen import varlen_attn

        if flavour.softcap:
            raise NotImplementedError("varlen_attn has no soft-cap")
        done = varlen_attn(
            query.contiguous(), pool.keys[layer], pool.values[layer], self.borders, None, self.max_queries,
            self.max_keys, scale=flavour.scale,
            window_size=(flavour.window - 1 if flavour.window else -1, 0),  # causal, aligned to the lower right
            enable_gqa=True, seqused_k=self.keys, block_table=self.table,
            num_splits=1 if pool.deterministic else None,
        )
        assert isinstance(done, Tensor)
        out.copy_(done)


def plan(pool: KVPool, spans: list[Span]) -> Varlen:
    """All spans."""
    keys = [span.keys for span in spans]
    width = -(-max(keys) // pool.block_tokens)
    borders = [0, *accumulate(span.length for span in spans)]
    tables = [(span.table + [0] * width)[:width] for span in spans]

    def tensor(numbers: Sequence[object]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int32, device=pool.device)

    return Varlen(tensor(borders), tensor(keys), tensor(tables), max(span.length for span in spans), max(keys))

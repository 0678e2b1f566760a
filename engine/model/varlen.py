"""The whole mixed batch in one call of torch's ``varlen_attn_out`` over the pages: half precision on CUDA.

The kernel that torch brings along (FlashAttention 2) takes pages of multiples of 256 tokens, wants the keys' borders
beside their numbers, and has no soft-cap. ``num_splits=1`` keeps a row's sums in one order whatever its neighbours are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from engine.errors import UserError
from engine.model.kvcache import KVPool
from engine.model.spans import Flavour, Span
from engine.units import ceil_div

BLOCK_TOKENS = 256


def suits(pool: KVPool) -> bool:
    """Device and type are those of the kernel; its pages are another question."""
    half = pool.dtype in (torch.float16, torch.bfloat16)
    return pool.device.type == "cuda" and half and not pool.softcap


def refusal(pool: KVPool) -> UserError | None:
    """In the kernel's own words, if it does not take the pool's pages; None where it does, or is not asked."""
    if not suits(pool):
        return None
    heads, dim = pool.keys[0].shape[2:]
    query = torch.zeros(1, heads, dim, dtype=pool.dtype, device=pool.device)
    try:
        plan(pool, [Span(1, 0, [0])]).attend(pool, 0, query, torch.empty_like(query), Flavour(1.0))
    except (RuntimeError, ValueError) as error:
        why = str(error).split("\n")[0]
        if pool.block_tokens % BLOCK_TOKENS:
            what = f"the CUDA attention kernel takes no pages of {pool.block_tokens} tokens"
            return UserError(what, "prefix.block_tokens", why, f"--set prefix.block_tokens={BLOCK_TOKENS}")
        if pool.deterministic:
            what = "the CUDA attention kernel cannot keep its sums in one order"
            return UserError(what, "model.deterministic", why, "--set model.deterministic=false")
        what = "the CUDA attention kernel does not take this model"
        return UserError(what, "model.dtype", why, "--set model.dtype=float32")
    return None


@dataclass(slots=True)
class Varlen:
    """The spans in the terms of ``varlen_attn_out``. All tensors int32."""

    borders: Tensor  # [N + 1] of the spans in the flat batch
    keys: Tensor  # [N] of each span
    key_borders: Tensor  # [N + 1] as if the keys lay one after the other; FlashAttention 2 asks, and reads ``keys``
    table: Tensor  # [N, width]
    max_queries: int
    max_keys: int

    def attend(self, pool: KVPool, layer: int, query: Tensor, out: Tensor, flavour: Flavour) -> None:
        """Query ``[T, heads, dim]`` to ``out`` likewise."""
        from torch.nn.attention.varlen import varlen_attn_out

        if flavour.softcap:
            raise NotImplementedError("varlen_attn has no soft-cap")
        varlen_attn_out(
            out, query.contiguous(), pool.keys[layer], pool.values[layer], self.borders, self.key_borders,
            self.max_queries, self.max_keys, scale=flavour.scale,
            window_size=(flavour.window - 1 if flavour.window else -1, 0),  # causal, aligned to the lower right
            enable_gqa=True, seqused_k=self.keys, block_table=self.table,
            num_splits=1 if pool.deterministic else None,
        )


def plan(pool: KVPool, spans: list[Span]) -> Varlen:
    """All spans."""
    keys = [span.keys for span in spans]
    width = ceil_div(max(keys), pool.block_tokens)
    tables = [(span.table + [0] * width)[:width] for span in spans]

    def tensor(numbers: Sequence[object]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int32, device=pool.device)

    borders, key_borders = [0, *accumulate(span.length for span in spans)], [0, *accumulate(keys)]
    longest = max(span.length for span in spans)
    return Varlen(tensor(borders), tensor(keys), tensor(key_borders), tensor(tables), longest, max(keys))

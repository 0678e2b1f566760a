"""Paged attention for any transformers model: one function in its ``AttentionInterface``, one step context.

The context travels as keyword ``paged`` of ``model(...)``; there is no global state. In every layer all K and V of the
step are written before anything is read, so a sequence may use a prefix that another computes in this very step.
Causality is ours: transformers builds no mask for a name that it does not know (and takes any name with "flash" in it
for a kernel of its own). Knows no sequences, only rows of tables. Method: PagedAttention (Kwon et al. 2023), by SDPA
over gathered blocks on any device, or by one ``varlen_attn`` call where CUDA kernels take pages of this size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

from engine.model.kvcache import KVPool

NAME = "doorbuster_paged"
VARLEN_BLOCK_TOKENS = 256  # FlashAttention 2 reads pages in multiples of this
BUCKET_BLOCKS = 8  # decode rows whose tables differ by less than this many blocks share a padded batch
REFUSED = ("softcap", "s_aux", "head_mask", "position_bias")  # keywords that change the formula


@dataclass(slots=True)
class Span:
    """One sequence's new tokens in the flat batch: ``length`` of them after ``past`` tokens in the KV of ``table``."""

    length: int
    past: int
    table: list[int]


@dataclass(slots=True)
class _Decodes:
    """Rows with one query token and tables of like length, attended to in one padded batch."""

    rows: Tensor  # [n] in the flat batch
    blocks: Tensor  # [n * width] block ids, short tables padded
    mask: Tensor  # [n, 1, 1, width * block_tokens], true where a key may be seen


@dataclass(slots=True)
class _Prefill:
    start: int
    stop: int
    blocks: Tensor | None = None  # None: no past, the step's own keys are all there is
    mask: Tensor | None = None  # [length, past + length], lower right


@dataclass(slots=True)
class _Varlen:
    """The whole mixed batch in the terms of ``varlen_attn``."""

    borders: Tensor  # [N + 1] of the spans in the flat batch
    keys: Tensor  # [N] of each span
    table: Tensor  # [N, width]
    max_queries: int
    max_keys: int


@dataclass(slots=True)
class Paged:
    """What every layer of one forward needs to know, built once a step by ``plan``."""

    pool: KVPool
    slots: Tensor  # [T] where each token's K and V go
    decodes: list[_Decodes] = field(default_factory=list)
    prefills: list[_Prefill] = field(default_factory=list)
    varlen: _Varlen | None = None  # instead of decodes and prefills
    calls: int = 0  # layers that attended: the loader refuses a model that passes some by


def plan(pool: KVPool, spans: list[Span]) -> Paged:
    """The context of one forward over ``spans``, laid out one after the other."""
    slots: list[int] = []
    for span in spans:
        first, last = span.past, span.past + span.length
        if last > len(span.table) * pool.block_tokens:
            raise ValueError(f"{last} tokens do not fit the {len(span.table)} blocks of their table")
        slots += _slots(span.table, first, last, pool.block_tokens)
    paged = Paged(pool, torch.tensor(slots, dtype=torch.long, device=pool.device))
    half = pool.dtype in (torch.float16, torch.bfloat16)
    if pool.device.type == "cuda" and half and pool.block_tokens % VARLEN_BLOCK_TOKENS == 0:
        paged.varlen = _plan_varlen(spans, pool.block_tokens, pool.device)
    else:
        _plan_gathered(paged, spans)
    return paged


def _slots(table: list[int], first: int, last: int, size: int) -> list[int]:
    if last == first + 1:
        return [table[first // size] * size + first % size]
    return [table[i // size] * size + i % size for i in range(first, last)]


def _plan_gathered(paged: Paged, spans: list[Span]) -> None:
    size, device = paged.pool.block_tokens, paged.pool.device
    singles: list[tuple[int, int, Span]] = []
    row = 0
    for span in spans:
        keys = span.past + span.length
        width = -(-keys // size)
        if span.length == 1:
            singles.append((width, row, span))
        elif span.past == 0:
            paged.prefills.append(_Prefill(row, row + span.length))
        else:
            mask = torch.ones(span.length, keys, dtype=torch.bool, device=device).tril(span.past)
            blocks = torch.tensor(span.table[:width], device=device)
            paged.prefills.append(_Prefill(row, row + span.length, blocks, mask))
        row += span.length
    singles.sort(key=lambda single: single[:2])
    while singles:
        limit = singles[0][0] + BUCKET_BLOCKS
        bucket = [single for single in singles if single[0] < limit]
        del singles[: len(bucket)]
        paged.decodes.append(_bucket(bucket, size, device))


def _bucket(bucket: list[tuple[int, int, Span]], size: int, device: torch.device) -> _Decodes:
    widest = bucket[-1][0]
    blocks: list[int] = []
    for width, _, span in bucket:
        blocks += span.table[:width]
        blocks += [span.table[width - 1]] * (widest - width)  # its own: another's nan would pass the mask
    rows = torch.tensor([row for _, row, _ in bucket], device=device)
    keys = torch.tensor([span.past + 1 for _, _, span in bucket], device=device)
    mask = torch.arange(widest * size, device=device) < keys[:, None]
    return _Decodes(rows, torch.tensor(blocks, device=device), mask[:, None, None, :])


def _plan_varlen(spans: list[Span], size: int, device: torch.device) -> _Varlen:
    keys = [span.past + span.length for span in spans]
    width = -(-max(keys) // size)
    borders = [0, *accumulate(span.length for span in spans)]
    tables = [(span.table + [0] * width)[:width] for span in spans]

    def tensor(numbers: Sequence[object]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int32, device=device)

    return _Varlen(tensor(borders), tensor(keys), tensor(tables), max(span.length for span in spans), max(keys))


def paged_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    paged: Paged | None = None,
    **other: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer: query ``[1, Hq, T, D]``, key and value ``[1, Hkv, T, D]``, out ``[1, T, Hq, D]``."""
    if paged is None:
        raise RuntimeError(f"a model with {NAME} attention was called without the keyword paged")
    if attention_mask is not None or dropout or any(other.get(name) is not None for name in REFUSED):
        raise NotImplementedError("paged attention has no mask, dropout, soft-cap, sink or bias")
    layer: int = module.layer_idx  # type: ignore[assignment]
    pool = paged.pool
    paged.calls += 1
    pool.key_slots[layer].index_copy_(0, paged.slots, key[0].transpose(0, 1))
    pool.value_slots[layer].index_copy_(0, paged.slots, value[0].transpose(0, 1))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if paged.varlen is not None:
        return _attend_varlen(paged.varlen, pool, layer, query, scale), None
    return _attend_gathered(paged, layer, query, key, value, scale), None


def _attend_gathered(paged: Paged, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    heads, tokens, dim = query.shape[1:]
    kv_heads = key.shape[1]
    group = heads // kv_heads
    q = query.view(kv_heads, group, tokens, dim)
    out = query.new_empty(tokens, kv_heads, group, dim)
    for d in paged.decodes:
        n = d.rows.shape[0]
        k, v = (x.view(n, -1, kv_heads, dim).transpose(1, 2) for x in paged.pool.gather(layer, d.blocks))
        one = q.index_select(2, d.rows).permute(2, 0, 1, 3)  # the group takes the query axis: K is read once for it
        out[d.rows] = F.scaled_dot_product_attention(one, k, v, d.mask, scale=scale)
    for p in paged.prefills:
        if p.blocks is None:
            k, v = key[0, :, None, p.start : p.stop], value[0, :, None, p.start : p.stop]
        else:
            seen = p.mask.shape[1]  # type: ignore[union-attr]
            pages = paged.pool.gather(layer, p.blocks)
            k, v = (x.view(-1, kv_heads, dim)[:seen].transpose(0, 1)[:, None] for x in pages)
        # KV heads take the batch axis and are spread over their group by a stride of zero: nothing is copied
        k, v = k.expand(-1, group, -1, -1), v.expand(-1, group, -1, -1)
        some = q[:, :, p.start : p.stop]
        y = F.scaled_dot_product_attention(some, k, v, p.mask, is_causal=p.mask is None, scale=scale)
        out[p.start : p.stop] = y.permute(2, 0, 1, 3)
    return out.view(1, tokens, heads, dim)


def _attend_varlen(v: _Varlen, pool: KVPool, layer: int, query: Tensor, scale: float) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    out = varlen_attn(
        query[0].transpose(0, 1).contiguous(),
        pool.keys[layer],
        pool.values[layer],
        v.borders,
        None,
        v.max_queries,
        v.max_keys,
        scale=scale,
        window_size=(-1, 0),  # causal, aligned to the lower right
        enable_gqa=True,
        seqused_k=v.keys,
        block_table=v.table,
    )
    assert isinstance(out, Tensor)
    return out[None]


AttentionInterface.register(NAME, paged_attention)

"""Attention by gathered blocks and SDPA: any device, any type, any page size.

Decode rows of like length are attended to in one padded batch, the GQA group on the query axis, so that K is read once
for it; prompt chunks go one by one. Pads must be blocks of the row itself: another's nan would pass the mask.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.model.kvcache import KVPool
from engine.model.spans import Flavour, Span
from engine.units import ceil_div

BUCKET_BLOCKS = 8  # decode rows whose tables differ by less than this many blocks share a padded batch


@dataclass(slots=True)
class _Decodes:
    """Rows with one query token and tables of like length."""

    rows: Tensor  # [n] in the flat batch
    blocks: Tensor  # [n * width] block ids, short tables padded
    keys: Tensor  # [n]
    width_tokens: int
    masks: dict[int, Tensor] = field(default_factory=dict)  # by window: [n, 1, 1, width_tokens], true where seen

    def mask(self, window: int) -> Tensor:
        """Layers with one window share it."""
        if window not in self.masks:
            at = torch.arange(self.width_tokens, device=self.keys.device)
            seen = at < self.keys[:, None]
            if window:
                seen &= at >= self.keys[:, None] - window
            self.masks[window] = seen[:, None, None, :]
        return self.masks[window]


@dataclass(slots=True)
class _Prefill:
    """One chunk of a prompt."""

    start: int
    span: Span
    blocks: Tensor
    masks: dict[int, Tensor] = field(default_factory=dict)  # by window: [length, keys], lower right

    def mask(self, window: int) -> Tensor | None:
        """None where plain causality of a square will do."""
        if not self.span.past and (not window or window >= self.span.keys):
            return None
        if window not in self.masks:
            shape = (self.span.length, self.span.keys)
            seen = torch.ones(shape, dtype=torch.bool, device=self.blocks.device).tril(self.span.past)
            self.masks[window] = seen.triu(self.span.past - window + 1) if window else seen
        return self.masks[window]


@dataclass(slots=True)
class Gathered:
    """Rows by how they are attended to."""

    decodes: list[_Decodes]
    prefills: list[_Prefill]

    def attend(self, pool: KVPool, layer: int, query: Tensor, out: Tensor, flavour: Flavour) -> None:
        """Query ``[T, heads, dim]`` to ``out`` likewise."""
        tokens, heads, dim = query.shape
        kv_heads = pool.keys[layer].shape[2]
        q = query.view(tokens, kv_heads, heads // kv_heads, dim)
        to = out.view(q.shape)
        for d in self.decodes:
            n = d.rows.shape[0]
            k, v = (x.view(n, -1, kv_heads, dim).transpose(1, 2) for x in pool.gather(layer, d.blocks))
            to[d.rows] = _sdpa(q.index_select(0, d.rows), k, v, d.mask(flavour.window), flavour)
        for p in self.prefills:
            pages = pool.gather(layer, p.blocks)
            k, v = (x.view(-1, kv_heads, dim)[: p.span.keys].transpose(0, 1)[:, None] for x in pages)
            # KV heads take the batch axis and are spread over their group by a stride of zero: nothing is copied
            k, v = (x.expand(-1, q.shape[2], -1, -1) for x in (k, v))
            stop = p.start + p.span.length
            some = q[p.start : stop].permute(1, 2, 0, 3)
            to[p.start : stop] = _sdpa(some, k, v, p.mask(flavour.window), flavour).permute(2, 0, 1, 3)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, flavour: Flavour) -> Tensor:
    """``[n, heads, rows, dim]``; without a mask causal."""
    if not flavour.softcap:
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=flavour.scale)
    scores = (q @ k.transpose(-1, -2)).float() * flavour.scale
    scores = flavour.softcap * torch.tanh(scores / flavour.softcap)
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    return scores.masked_fill(~mask, float("-inf")).softmax(-1).to(v.dtype) @ v


def plan(pool: KVPool, spans: list[Span]) -> Gathered:
    """All rows of the spans."""
    singles: list[tuple[int, int, Span]] = []
    prefills: list[_Prefill] = []
    row = 0
    for span in spans:
        width = ceil_div(span.keys, pool.block_tokens)
        if span.length == 1:
            singles.append((width, row, span))
        else:
            prefills.append(_Prefill(row, span, torch.tensor(span.table[:width], device=pool.device)))
        row += span.length
    singles.sort(key=lambda single: single[:2])
    decodes: list[_Decodes] = []
    while singles:
        limit = singles[0][0] + BUCKET_BLOCKS
        bucket = [single for single in singles if single[0] < limit]
        del singles[: len(bucket)]
        decodes.append(_bucket(pool, bucket))
    return Gathered(decodes, prefills)


def _bucket(pool: KVPool, bucket: list[tuple[int, int, Span]]) -> _Decodes:
    widest = bucket[-1][0]
    blocks: list[int] = []
    for width, _, span in bucket:
        blocks += span.table[:width]
        blocks += [span.table[width - 1]] * (widest - width)
    rows = torch.tensor([row for _, row, _ in bucket], device=pool.device)
    keys = torch.tensor([span.keys for _, _, span in bucket], device=pool.device)
    return _Decodes(rows, torch.tensor(blocks, device=pool.device), keys, widest * pool.block_tokens)

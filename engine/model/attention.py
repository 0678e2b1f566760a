"""Paged attention for any transformers model: one function in its ``AttentionInterface``, one step context.

The context travels as keyword ``paged`` of ``model(...)``; there is no global state. In every layer all K and V of the
step are written before anything is read, so a sequence may use a prefix that another computes in this very step.
Causality is ours: transformers builds no mask for a name that it does not know (and takes any name with "flash" in it
for a kernel of its own). Three ways to attend, chosen once a step: ``native`` kernels (fp32 on a CPU), ``varlen`` (half
precision on CUDA), ``gathered`` blocks and SDPA (everything else). Method: PagedAttention (Kwon et al. 2023).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from engine.model import gathered, native_rows, varlen
from engine.model.kvcache import KVPool
from engine.model.spans import Flavour, Span

__all__ = ["NAME", "Flavour", "Paged", "Span", "paged_attention", "plan"]

NAME = "doorbuster_paged"
REFUSED = ("s_aux", "head_mask", "position_bias", "attention_bias")  # keywords that change the formula

Way = native_rows.NativeRows | varlen.Varlen | gathered.Gathered


@dataclass(slots=True)
class Paged:
    """What every layer of one forward needs to know, built once a step by ``plan``."""

    pool: KVPool
    slots: Tensor  # [T] where each token's K and V go
    way: Way
    calls: int = 0  # layers that attended: the loader refuses a model that passes some by

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:
        """K and V ``[T, kv_heads, dim]`` to the pages."""
        self.pool.key_slots[layer].index_copy_(0, self.slots, key)
        self.pool.value_slots[layer].index_copy_(0, self.slots, value)

    def attend(self, layer: int, query: Tensor, flavour: Flavour) -> Tensor:
        """Over what is written: query and result ``[T, heads, dim]``."""
        self.calls += 1
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        self.way.attend(self.pool, layer, query, out, flavour)
        return out


def plan(pool: KVPool, spans: list[Span]) -> Paged:
    """The context of one forward over ``spans``, laid out one after the other."""
    slots: list[int] = []
    for span in spans:
        if span.keys > len(span.table) * pool.block_tokens:
            raise ValueError(f"{span.keys} tokens do not fit the {len(span.table)} blocks of their table")
        slots += span.slots(pool.block_tokens)
    way: Way
    if varlen.suits(pool):
        way = varlen.plan(pool, spans)
    elif pool.native is not None:
        way = native_rows.plan(pool, spans)
    else:
        way = gathered.plan(pool, spans)
    return Paged(pool, torch.tensor(slots, dtype=torch.long, device=pool.device), way)


def paged_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    paged: Paged | None = None,
    **other: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer: query ``[1, Hq, T, D]``, key and value ``[1, Hkv, T, D]``, out ``[1, T, Hq, D]``."""
    if paged is None:
        raise RuntimeError(f"a model with {NAME} attention was called without the keyword paged")
    strange = [name for name in REFUSED if other.get(name) is not None]
    if attention_mask is not None or dropout or strange:
        raise NotImplementedError(f"paged attention has no {', '.join(strange) or 'mask or dropout'}")
    layer: int = module.layer_idx  # type: ignore[assignment]
    paged.write(layer, key[0].transpose(0, 1), value[0].transpose(0, 1))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    flavour = Flavour(scale, sliding_window or 0, softcap or 0.0)
    return paged.attend(layer, query[0].transpose(0, 1), flavour)[None], None


AttentionInterface.register(NAME, paged_attention)

"""What torch's ``varlen_attn_out`` takes and gives, in plain torch: the CUDA kernel's stand-in where there is no GPU.

After its documentation, the checks in the C++ of FlashAttention 2, and torch's own test of it (which always gives the
keys' borders: without them that kernel refuses pages). torch's fake kernel checks none of this.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

PAGE_TOKENS = 256


def complaint(
    out: Tensor, query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor | None, max_q: int,
    max_k: int, *, scale: float | None = None, window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False,
    seqused_k: Tensor | None = None, block_table: Tensor | None = None, num_splits: int | None = None,
    page_tokens: int = PAGE_TOKENS,
) -> str | None:
    """What the kernel would find wrong with shapes, types and places; it looks at no numbers."""
    if cu_seq_k is None:
        return "cumulative_sequence_length_q and cumulative_sequence_length_k must be both set or both not set"
    if seqused_k is None or block_table is None:
        return "pages need seqused_k and block_table"
    if query.dim() != 3 or key.dim() != 4 or key.shape != value.shape or key.shape[3] != query.shape[2]:
        return f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if out.shape != query.shape or {out.dtype, key.dtype, value.dtype} != {query.dtype}:
        return "query, key, value and out must have one dtype, query and out one shape"
    count = cu_seq_q.shape[0] - 1
    for name, tensor, shape in (
        ("cu_seqlens_q", cu_seq_q, (count + 1,)), ("cu_seqlens_k", cu_seq_k, (count + 1,)),
        ("seqused_k", seqused_k, (count,)), ("block_table", block_table, (count, block_table.shape[-1])),
    ):  # fmt: skip
        if tensor.dtype != torch.int32:
            return f"{name} must have dtype int32"
        if tuple(tensor.shape) != shape:
            return f"{name} must have shape {shape}, not {tuple(tensor.shape)}"
        if tensor.stride(-1) != 1 or (name != "block_table" and not tensor.is_contiguous()):
            return f"{name} must be contiguous"
    if len({tensor.device for tensor in (out, query, key, value, cu_seq_q, cu_seq_k, seqused_k, block_table)}) > 1:
        return "all tensors must be on one device"
    if key.shape[1] % page_tokens:
        return f"Paged KV cache block size must be divisible by {page_tokens}"
    if query.shape[1] % key.shape[2] or (query.shape[1] != key.shape[2] and not enable_gqa):
        return "Number of heads in key/value must divide number of heads in query"
    if query.shape[2] % 8 or query.shape[2] > 256 or query.stride(-1) != 1:
        return "head_size must be a multiple of 8, at most 256"
    if not (isinstance(max_q, int) and isinstance(max_k, int) and isinstance(scale, float)):
        return "max_q and max_k must be int, scale float"
    if num_splits not in (None, 1):
        return "num_splits > 1 is not supported for varlen paged KV"
    return None


@dataclass
class StandIn:
    """Called as the kernel; keeps what it was told by name."""

    page_tokens: int = PAGE_TOKENS
    told: list[dict[str, Any]] = field(default_factory=list)

    def __call__(
        self, out: Tensor, query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor | None,
        max_q: int, max_k: int, **named: Any,
    ) -> Tensor:
        why = complaint(
            out, query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, **named, page_tokens=self.page_tokens
        )
        if why is not None:
            raise RuntimeError(why)
        self.told.append({"max_q": max_q, "max_k": max_k, **named})
        out.fill_(float("nan"))
        borders, keys = cu_seq_q.tolist(), named["seqused_k"].tolist()
        group = query.shape[1] // key.shape[2]
        left, right = named["window_size"]
        if max(keys) > max_k or borders[-1] != query.shape[0]:
            raise RuntimeError(f"{max(keys)} keys, max_k {max_k}; borders {borders} of {query.shape[0]} rows")
        for i, used in enumerate(keys):
            start, stop = borders[i], borders[i + 1]
            length = stop - start
            pages = named["block_table"][i, : -(-used // key.shape[1])].long()
            k, v = (x[pages].flatten(0, 1)[:used].float().repeat_interleave(group, 1) for x in (key, value))
            row = torch.arange(length, device=query.device)[:, None] + used - length  # aligned to the lower right
            at = torch.arange(used, device=query.device)[None, :]
            hidden = torch.zeros(length, used, dtype=torch.bool, device=query.device)
            if right >= 0:
                hidden |= at > row + right
            if left >= 0:
                hidden |= at < row - left
            scores = torch.einsum("qhd,khd->hqk", query[start:stop].float(), k) * named["scale"]
            seen = torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, float("-inf")).softmax(-1), v)
            out[start : min(stop, start + max_q)] = seen[:max_q].to(out.dtype)  # no thread runs for later rows
        return out

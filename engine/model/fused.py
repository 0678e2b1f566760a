"""Decoder layers of the Llama kind on four matrix products and four native calls, in place of some forty small ones.

Pre-norm, rotary attention, gated SiLU: Llama, Mistral, Qwen2, Qwen3 and SmolLM3 differ only in what is absent. The
query, key and value weights are packed as one, gate and up too. The residual stream is updated in place. A layer that
is not quite of this kind keeps transformers' own forward; the loader holds a fused model against it before it is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.model.attention import Paged
from engine.model.native import HEAD_DIMS, Kernels
from engine.model.packing import PackedLinear
from engine.model.spans import Flavour

KINDS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer", "SmolLM3DecoderLayer")
GATE_LANES = 16  # of the native gate


class FusedLayer(nn.Module):
    """Stands in for one decoder layer; called as transformers calls it, with ``paged`` among the keywords."""

    def __init__(self, layer: Any, kernels: Kernels, dtype: torch.dtype) -> None:
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        self._kernels = kernels
        self._layer: int = attention.layer_idx
        self._dim: int = attention.head_dim
        self._kv_width = attention.k_proj.out_features
        self._flavour = Flavour(attention.scaling, _window(attention))
        self._rotates = bool(getattr(attention, "use_rope", True))
        self.qkv = PackedLinear(_stacked([attention.q_proj, attention.k_proj, attention.v_proj]), dtype)
        self.o_proj = PackedLinear(attention.o_proj, dtype)
        self.gate_up = PackedLinear(_stacked([mlp.gate_proj, mlp.up_proj]), dtype)
        self.down_proj = PackedLinear(mlp.down_proj, dtype)
        self.norm_in, self.norm_mid = layer.input_layernorm, layer.post_attention_layernorm
        self._head_norms: tuple[Tensor, Tensor] | None = None
        self._head_eps = 0.0
        if hasattr(attention, "q_norm"):
            self._head_norms = (attention.q_norm.weight.detach(), attention.k_norm.weight.detach())
            self._head_eps = attention.q_norm.variance_epsilon

    def forward(
        self, hidden_states: Tensor, *, position_embeddings: tuple[Tensor, Tensor], paged: Paged | None = None,
        **_: Any,
    ) -> Tensor:
        """``[1, T, hidden]`` to the same, in place."""
        if paged is None:
            raise RuntimeError("a fused layer was called without the keyword paged")
        kernels, pool, layer = self._kernels, paged.pool, self._layer
        x = hidden_states[0]
        qkv = self.qkv(kernels.add_norm(x, None, self.norm_in.weight, self.norm_in.variance_epsilon))
        rotation = (position_embeddings[0][0], position_embeddings[1][0]) if self._rotates else None
        kernels.write_kv(
            qkv, pool.keys[layer], pool.values[layer], paged.slots, rotation, self._head_norms, self._head_eps
        )
        query = qkv[:, : qkv.shape[1] - 2 * self._kv_width].view(x.shape[0], -1, self._dim)
        seen = paged.attend(layer, query, self._flavour)
        mixed = self.o_proj(seen.view(x.shape[0], -1))
        both = self.gate_up(kernels.add_norm(x, mixed, self.norm_mid.weight, self.norm_mid.variance_epsilon))
        x += self.down_proj(kernels.gate(both))
        return hidden_states


def fuse(model: Any, kernels: Kernels, dtype: torch.dtype = torch.float32) -> int:
    """Replace every layer that can be in place; how many. The model is fp32 and on the CPU; products in ``dtype``."""
    layers = getattr(getattr(model, "model", None), "layers", None)
    if layers is None:
        return 0
    count = 0
    with torch.inference_mode():
        for number, layer in enumerate(layers):
            if _suits(layer):
                layers[number] = FusedLayer(layer, kernels, dtype)
                count += 1
    return count


def _suits(layer: nn.Module) -> bool:
    if type(layer).__name__ not in KINDS:
        return False
    attention, mlp = cast(Any, layer).self_attn, cast(Any, layer).mlp
    linears = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    linears += [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    return (
        all(type(linear) is nn.Linear and linear.weight.dtype == torch.float32 for linear in linears)
        and attention.head_dim in HEAD_DIMS
        and _is_silu(mlp.act_fn)
        and mlp.gate_proj.out_features % GATE_LANES == 0
    )


def _is_silu(function: Any) -> bool:  # transformers has classes of its own for it
    x = torch.linspace(-4, 4, 9)
    return bool(torch.equal(function(x), F.silu(x)))


def _window(attention: Any) -> int:
    """As the layer's own forward passes it on: Mistral reads its config there, the others have looked before."""
    holder = attention.config if type(attention).__name__ == "MistralAttention" else attention
    return getattr(holder, "sliding_window", None) or 0


def _stacked(linears: Sequence[nn.Linear]) -> nn.Linear:
    """One linear that gives their outputs side by side."""
    rows = sum(linear.out_features for linear in linears)
    biased = linears[0].bias is not None
    out = nn.Linear(linears[0].in_features, rows, bias=biased, device="meta")
    out.weight = nn.Parameter(torch.cat([linear.weight for linear in linears]), requires_grad=False)
    if biased:
        out.bias = nn.Parameter(torch.cat([linear.bias for linear in linears]), requires_grad=False)
    return out

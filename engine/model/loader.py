"""From a model folder to a model that runs on paged attention, or a refusal that names what cannot be honoured.

Any transformers causal LM that follows the attention interface will do; a short paged forward at load proves that
every layer attends through us. On a CPU in fp32 the linears are packed and layers fused, if the logits stay the same.
Knows nothing of requests, blocks or steps.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from engine.errors import UserError
from engine.model import attention, varlen
from engine.model.attention import Span
from engine.model.folder import ModelFolder, cache_dir, prepare
from engine.model.fused import fuse
from engine.model.kvcache import KVPool
from engine.model.native import HEAD_DIMS, Kernels, kernels
from engine.model.packing import multiplies_bfloat16, pack
from engine.model.smalllm import small_model

log = logging.getLogger(__name__)

# Deviation of the probe's logits, in their own standard deviations: other orders of sums give 1e-4, rounded weights
# 0.12 (SmolLM2, whose first tokens have outliers; its perplexity rises by 0.02 %), a layer that is wrong 1 and more.
SAME = {torch.float32: 1e-2, torch.bfloat16: 0.3}

__all__ = ["LoadedModel", "ModelFolder", "cache_dir", "load", "load_plain", "prepare"]


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model in eval mode with paged attention, and the numbers that a runner needs."""

    model: PreTrainedModel
    name: str
    digest: str
    device: torch.device
    dtype: torch.dtype  # of activations and KV
    linears: torch.dtype
    eos_ids: tuple[int, ...]
    num_layers: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_context: int  # tokens
    softcap: bool
    native: Kernels | None  # that attend on its pools
    deterministic: bool = False  # on CUDA: neighbours never change the order of the sums in a row's attention
    cuda_graphs: bool = False  # decode steps run at fixed shapes

    def pool(self, num_blocks: int, block_tokens: int) -> KVPool:
        """A KV pool in this model's shape; UserError where the device's kernel takes no such pages."""
        shape = (self.num_kv_heads, self.head_dim)
        size = (self.num_layers, num_blocks, block_tokens, *shape)
        pool = KVPool(*size, self.dtype, self.device, self.native, self.deterministic, self.softcap)
        refused = varlen.refusal(pool)
        if refused is not None:
            raise refused
        return pool


def load(
    folder: ModelFolder, device: str = "cpu", dtype: str = "auto", threads: int = 1, native: bool = True,
    deterministic: bool = False, cuda_graphs: bool = False,
) -> LoadedModel:
    """Load for serving. ``device``: cpu, cuda or auto; ``dtype``: float32, bfloat16 or auto.

    auto is bfloat16 on CUDA and float32 on a CPU, where bfloat16 is for the linears alone and a choice: twice as fast
    on processors that have it, but the last bits then depend on how many rows a step has. ``native``: with the compiled
    kernels where they can be had. ``deterministic`` and ``cuda_graphs`` are for CUDA: see ``LoadedModel``.
    """
    torch.set_num_threads(threads)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        loaded, _ = _paged(folder, _read(folder, torch.float32 if dtype == "float32" else torch.bfloat16).to(device))
    else:
        loaded = _on_cpu(folder, dtype, native)
    loaded = replace(loaded, deterministic=deterministic, cuda_graphs=cuda_graphs)
    if cuda_graphs and not varlen.suits(loaded.pool(1, varlen.BLOCK_TOKENS)):
        raise UserError(
            f"decode steps of {folder.name} cannot be CUDA graphs", "model.cuda_graphs",
            "they need the attention kernel for half precision on CUDA, which has no soft-cap",
            "--set model.cuda_graphs=false",
        )
    return loaded


def _on_cpu(folder: ModelFolder, dtype: str, native: bool) -> LoadedModel:
    linears = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    if linears == torch.bfloat16 and not multiplies_bfloat16():
        raise UserError(
            "this processor cannot multiply in bfloat16", "model.dtype", "emulated, it takes 20 times longer",
            "--set model.dtype=float32",
        )
    model = _read(folder)
    _, logits = _paged(folder, model)
    made = kernels() if native else None
    if made is not None:
        fuse(model, made, linears)
    pack(model, linears)
    packed, again = _paged(folder, model, made, linears)
    if (logits - again).std() <= SAME[linears] * logits.std():
        return packed
    log.warning("%s gives other numbers with packed and fused layers: it runs without them", folder.name)
    return _paged(folder, _read(folder))[0]


def _paged(
    folder: ModelFolder, model: Any, made: Kernels | None = None, linears: torch.dtype | None = None
) -> tuple[LoadedModel, Tensor]:
    """Ready to serve, and the probe's logits; UserError when it cannot be served."""
    why = refusal(model)
    if why is None:
        model.set_attn_implementation(attention.NAME)
        loaded = _describe(folder, model, made, linears)
        found = _probe(loaded)
        if isinstance(found, Tensor):
            return loaded, found
        why = found
    raise UserError(f"the model {folder.name} cannot be served", str(folder.path or ""), why)


def load_plain(folder: ModelFolder, dtype: str = "float32", attn: str = "sdpa") -> PreTrainedModel:
    """The reference: transformers' own attention and cache on the same linears, on the CPU."""
    model: PreTrainedModel = _read(folder, getattr(torch, dtype))
    pack(model)
    model.set_attn_implementation(attn)
    return model


def refusal(model: Any) -> str | None:
    """Why paged attention would compute something else than this model means; None when it would not."""
    config = model.config.get_text_config()
    if config.is_encoder_decoder or getattr(config, "add_cross_attention", False):
        return "it has cross attention"
    if getattr(config, "kv_lora_rank", None):
        return "its attention is latent (MLA)"
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds or getattr(config, "attention_chunk_size", None):
        return f"it has layers that are no plain attention: {', '.join(sorted(kinds)) or 'chunked attention'}"
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kinds = {part.get("rope_type", part.get("type")) for part in (rope, *rope.values()) if isinstance(part, dict)}
    if kinds & {"dynamic", "longrope"}:
        return "its rotation depends on the longest sequence in the batch (dynamic or long RoPE)"
    if getattr(config, "use_bidirectional_attention", False):
        return "its attention is not causal"
    if not model.is_backend_compatible():
        return f"{type(model).__name__} does not follow transformers' attention interface"
    if not model._supports_logits_to_keep():
        return f"{type(model).__name__} has no logits_to_keep"
    return None


def _read(folder: ModelFolder, dtype: torch.dtype = torch.float32) -> Any:
    # Any, because transformers' own types are too loose to say more
    if folder.path is None:
        return cast(Any, small_model()).to(dtype)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(folder.path, dtype=dtype, local_files_only=True)
        return model.eval()
    except (OSError, ValueError) as error:
        raise UserError("transformers cannot load the model", str(folder.path), str(error)) from error


def _describe(
    folder: ModelFolder, model: PreTrainedModel, made: Kernels | None, linears: torch.dtype | None
) -> LoadedModel:
    config = model.config.get_text_config()
    eos = model.generation_config.eos_token_id if model.generation_config else config.eos_token_id
    heads = config.num_attention_heads
    parameter = next(model.parameters())
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return LoadedModel(
        model=model,
        name=folder.name,
        digest=folder.digest,
        device=parameter.device,
        dtype=parameter.dtype,
        linears=linears or parameter.dtype,
        eos_ids=() if eos is None else tuple(eos) if isinstance(eos, list | tuple) else (eos,),
        num_layers=config.num_hidden_layers,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=head_dim,
        vocab_size=config.vocab_size,
        max_context=config.max_position_embeddings,
        softcap=bool(getattr(config, "attn_logit_softcapping", None)),
        native=made if head_dim in HEAD_DIMS else None,
    )


def _probe(loaded: LoadedModel) -> Tensor | str:
    """Three tokens at once, then one more on top: both kinds of row, through every layer. Logits, or what is wrong."""
    pool = loaded.pool(1, varlen.BLOCK_TOKENS if loaded.device.type == "cuda" else 4)
    try:
        with torch.inference_mode():
            for past, ids in ((0, [1, 2, 3]), (3, [4])):
                paged = attention.plan(pool, [Span(len(ids), past, [0])])
                positions = torch.arange(past, past + len(ids), device=loaded.device)[None]
                tokens = torch.tensor([ids], device=loaded.device)
                logits: Tensor = loaded.model(
                    input_ids=tokens, position_ids=positions, use_cache=False, logits_to_keep=1, paged=paged
                ).logits
                if paged.calls != loaded.num_layers:
                    return f"only {paged.calls} of its {loaded.num_layers} layers attend through the interface"
    except Exception as error:  # whatever a foreign model does with a keyword that it was not written for
        return f"{type(error).__name__}: {error}"
    return logits if logits.isfinite().all() else "its logits are not finite"

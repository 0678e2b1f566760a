"""From a model folder to a model that runs on paged attention, or a refusal that names what cannot be honoured.

Any transformers causal LM that follows the attention interface will do; a short paged forward at load proves that
every layer attends through us. On a CPU in fp32 the linears are packed. Knows nothing of requests, blocks or steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from engine.errors import UserError
from engine.model import attention
from engine.model.attention import Span
from engine.model.folder import ModelFolder, cache_dir, prepare
from engine.model.kvcache import KVPool
from engine.model.packing import pack
from engine.model.smalllm import small_model

__all__ = ["LoadedModel", "ModelFolder", "cache_dir", "load", "load_plain", "prepare"]


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model in eval mode with paged attention, and the numbers that a runner needs."""

    model: PreTrainedModel
    name: str
    digest: str
    device: torch.device
    dtype: torch.dtype
    eos_ids: tuple[int, ...]
    num_layers: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_context: int  # tokens; a sliding window is honoured by serving no context longer than it
    packed: int  # linears

    def pool(self, num_blocks: int, block_tokens: int) -> KVPool:
        """A KV pool in this model's shape."""
        shape = (self.num_kv_heads, self.head_dim)
        return KVPool(self.num_layers, num_blocks, block_tokens, *shape, self.dtype, self.device)


def load(folder: ModelFolder, device: str = "cpu", dtype: str = "auto", threads: int = 1) -> LoadedModel:
    """Load for serving. ``device``: cpu, cuda or auto; ``dtype``: a torch name, auto = fp32 on a CPU, bf16 on CUDA."""
    torch.set_num_threads(threads)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else "bfloat16"
    model = _read(folder, getattr(torch, dtype))
    config = model.config.get_text_config()
    why = refusal(model)
    if why is None:
        packed = pack(model) if device == "cpu" else 0
        model.to(device)
        model.set_attn_implementation(attention.NAME)
        loaded = _describe(folder, model, config, packed)
        why = _probe(loaded)
    if why is not None:
        raise UserError(f"the model {folder.name} cannot be served", str(folder.path or ""), why)
    return loaded


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
    if getattr(config, "attn_logit_softcapping", None):
        return "its attention logits are soft-capped"
    if getattr(config, "kv_lora_rank", None):
        return "its attention is latent (MLA)"
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds or getattr(config, "attention_chunk_size", None):
        return f"it has layers that are no plain attention: {', '.join(sorted(kinds)) or 'chunked attention'}"
    if not model.is_backend_compatible():
        return f"{type(model).__name__} does not follow transformers' attention interface"
    if not model._supports_logits_to_keep():
        return f"{type(model).__name__} has no logits_to_keep"
    return None


def _read(folder: ModelFolder, dtype: torch.dtype) -> Any:  # transformers' own types are too loose to say more
    if folder.path is None:
        return cast(Any, small_model()).to(dtype)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(folder.path, dtype=dtype, local_files_only=True)
        return model.eval()
    except (OSError, ValueError) as error:
        raise UserError("transformers cannot load the model", str(folder.path), str(error)) from error


def _describe(folder: ModelFolder, model: PreTrainedModel, config: Any, packed: int) -> LoadedModel:
    eos = model.generation_config.eos_token_id if model.generation_config else config.eos_token_id
    heads = config.num_attention_heads
    parameter = next(model.parameters())
    context = config.max_position_embeddings
    return LoadedModel(
        model=model,
        name=folder.name,
        digest=folder.digest,
        device=parameter.device,
        dtype=parameter.dtype,
        eos_ids=() if eos is None else tuple(eos) if isinstance(eos, list | tuple) else (eos,),
        num_layers=config.num_hidden_layers,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        vocab_size=config.vocab_size,
        max_context=min(context, getattr(config, "sliding_window", None) or context),
        packed=packed,
    )


def _probe(loaded: LoadedModel) -> str | None:
    """Three tokens at once, then one more on top: both kinds of row, through every layer."""
    pool = loaded.pool(1, 4)
    try:
        with torch.inference_mode():
            for past, ids in ((0, [1, 2, 3]), (3, [4])):
                paged = attention.plan(pool, [Span(len(ids), past, [0])])
                positions = torch.arange(past, past + len(ids), device=loaded.device)[None]
                tokens = torch.tensor([ids], device=loaded.device)
                logits = loaded.model(
                    input_ids=tokens, position_ids=positions, use_cache=False, logits_to_keep=1, paged=paged
                ).logits
                if paged.calls != loaded.num_layers:
                    return f"only {paged.calls} of its {loaded.num_layers} layers attend through the interface"
    except Exception as error:  # whatever a foreign model does with a keyword that it was not written for
        return f"{type(error).__name__}: {error}"
    return None if logits.isfinite().all() else "its logits are not finite"

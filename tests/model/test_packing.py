"""A packed linear is the linear it stands for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from engine.model.packing import PackedLinear, can_pack, multiplies_bfloat16, pack

pytestmark = pytest.mark.skipif(not can_pack(), reason="this torch has no oneDNN")


@pytest.mark.parametrize("rows", [1, 2, 8, 33])
@pytest.mark.parametrize("bias", [True, False])
def test_it_computes_the_same(rows: int, bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(64, 48, bias=bias)
    x = torch.randn(1, rows, 64)
    with torch.inference_mode():
        torch.testing.assert_close(PackedLinear(linear)(x), linear(x), rtol=0, atol=1e-5)


@pytest.mark.skipif(not multiplies_bfloat16(), reason="this processor has no instructions for bfloat16")
@pytest.mark.parametrize("rows", [1, 8])
def test_in_bfloat16_it_computes_the_same_but_for_rounding(rows: int) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(64, 48)
    x = torch.randn(1, rows, 64)
    with torch.inference_mode():
        packed = PackedLinear(linear, torch.bfloat16)(x)
        assert packed.dtype == torch.float32
        rounded = nn.functional.linear(x.bfloat16().float(), linear.weight.bfloat16().float(), linear.bias)
        torch.testing.assert_close(packed, rounded, rtol=0.01, atol=0.01)
        assert not torch.equal(packed, linear(x))


def test_a_packed_weight_is_a_copy() -> None:
    linear = nn.Linear(16, 16)
    x = torch.randn(3, 16)
    with torch.inference_mode():
        packed = PackedLinear(linear)
        before = packed(x)
        linear.weight.zero_()
        torch.testing.assert_close(packed(x), before)


def test_every_fp32_linear_is_replaced_and_nothing_else() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Embedding(4, 8), nn.Linear(8, 4).half()), nn.LayerNorm(8))
    assert pack(model) == 1
    assert [type(m).__name__ for m in model.modules()] == [
        "Sequential", "PackedLinear", "Sequential", "Embedding", "Linear", "LayerNorm",
    ]


def test_a_tied_head_is_packed_and_its_embedding_stays(tiny, plain) -> None:
    for model in (tiny.model, plain):
        assert isinstance(model.get_output_embeddings(), PackedLinear)
        assert isinstance(model.get_input_embeddings(), nn.Embedding)
        assert not [m for m in model.modules() if isinstance(m, nn.Linear)]

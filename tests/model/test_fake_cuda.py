"""The CUDA branch without a GPU: every shape, type and argument on fake cuda tensors, up to the kernel's door.

Fake tensors have everything but numbers; the numbers of the same code are in ``test_cuda.py``. torch's fake kernel
checks nothing, so what it is given is first held against what the real one asks for (``varlen_standin.complaint``).
Run: ``pytest tests/model/test_fake_cuda.py``. Breaks that it caught: int64 tables or keys, the keys' borders left out,
no GQA, no ``seqused_k``, window off by one, ``num_splits`` not passed on, half precision not asked for.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn.attention import varlen as kernel

from engine.errors import UserError
from engine.model import attention, loader, varlen
from engine.model.folder import ModelFolder
from engine.model.gathered import Gathered
from engine.model.graphs import DecodeGraphs
from engine.model.kvcache import KVPool
from engine.model.loader import LoadedModel
from engine.model.spans import Flavour, Span
from engine.model.varlen import Varlen
from tests.model.families import FAMILIES, WINDOW
from tests.model.varlen_standin import complaint

CPU, CUDA = 0, 1  # torch's numbers of devices
BLOCKS = 9
MIXED = [Span(300, 0, [3, 1]), Span(1, 700, [4, 5, 6]), Span(7, 250, [2, 7]), Span(1, 0, [8])]
TOKENS = sum(span.length for span in MIXED)


@pytest.fixture
def fake() -> Iterator[FakeTensorMode]:
    """Fake tensors on cuda. A torch that was built without CUDA has no guard for its devices: it gets the CPU's.

    Where CUDA is built in but no device is there, the mode itself does the same.
    """
    if torch.cuda.is_available():
        pytest.skip("there is a real CUDA device: see test_cuda.py")
    c10 = ctypes.CDLL(str(next((Path(torch.__file__).parent / "lib").glob("*c10.*"))))
    guards = (ctypes.c_void_p * 2).in_dll(c10, "_ZN3c104impl26device_guard_impl_registryE")
    before, guards[CUDA] = guards[CUDA], guards[CUDA] or guards[CPU]
    try:
        with FakeTensorMode() as mode:
            yield mode
    finally:
        guards[CUDA] = before


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Keywords of every call of the kernel; one that the real kernel would refuse raises."""
    calls: list[dict[str, Any]] = []
    traced = kernel.varlen_attn_out

    def door(*tensors: Any, **named: Any) -> Any:
        why = complaint(*tensors, **named)
        assert why is None, why
        assert tensors[0].is_cuda
        calls.append({"max_q": tensors[6], "max_k": tensors[7], **named})
        return traced(*tensors, **named)

    monkeypatch.setattr(kernel, "varlen_attn_out", door)
    return calls


def on_fake_cuda(family: str, dtype: torch.dtype = torch.bfloat16) -> LoadedModel:
    """The family's tiny model, its weights fake."""
    kind, shape = FAMILIES[family]
    made: dict[int, Tensor] = {}
    model = transformers.AutoModelForCausalLM.from_config(kind(**shape))
    for module in model.modules():
        for owned in (module._parameters, module._buffers):
            for name, tensor in owned.items():
                if tensor is not None:
                    new = made.setdefault(id(tensor), torch.empty(tensor.shape, dtype=dtype, device="cuda"))
                    owned[name] = nn.Parameter(new, requires_grad=False) if owned is module._parameters else new
    model.eval().set_attn_implementation(attention.NAME)
    return loader._describe(ModelFolder(family, None, ""), model, None, None)


def pool_of(dtype: torch.dtype = torch.bfloat16, block_tokens: int = 256, **more: bool) -> KVPool:
    return KVPool(2, BLOCKS, block_tokens, 2, 16, dtype, "cuda", **more)


def rows(pool: KVPool, heads: int) -> Tensor:
    """As a layer hands them over: heads before tokens in memory."""
    return torch.empty(heads, TOKENS, 16, dtype=pool.dtype, device="cuda").transpose(0, 1)


def test_a_mixed_batch_is_one_call(fake: FakeTensorMode, told: list[dict[str, Any]]) -> None:
    pool = pool_of()
    paged = attention.plan(pool, MIXED)
    assert isinstance(paged.way, Varlen)
    assert (paged.slots.dtype, tuple(paged.slots.shape), paged.slots.is_cuda) == (torch.long, (TOKENS,), True)
    for layer in (0, 1):
        paged.write(layer, rows(pool, 2), rows(pool, 2))
        out = paged.attend(layer, rows(pool, 4), Flavour(0.25))
        assert (tuple(out.shape), out.dtype, out.is_cuda) == ((TOKENS, 4, 16), torch.bfloat16, True)
    assert len(told) == 2 and paged.calls == 2
    call = told[0]
    assert (call["max_q"], call["max_k"], call["scale"]) == (300, 701, 0.25)
    assert (call["window_size"], call["enable_gqa"], call["num_splits"]) == ((-1, 0), True, None)
    assert tuple(call["block_table"].shape) == (4, 3)


def test_a_window_and_the_deterministic_switch_arrive(fake: FakeTensorMode, told: list[dict[str, Any]]) -> None:
    pool = pool_of(deterministic=True)
    attention.plan(pool, MIXED).attend(0, rows(pool, 4), Flavour(1.0, window=WINDOW))
    assert told[0]["window_size"] == (WINDOW - 1, 0), "itself is one of its window's keys"
    assert told[0]["num_splits"] == 1


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gemma2"])
def test_a_whole_model(fake: FakeTensorMode, told: list[dict[str, Any]], family: str) -> None:
    loaded = on_fake_cuda(family)
    assert (loaded.device.type, loaded.dtype, loaded.softcap) == ("cuda", torch.bfloat16, False)
    paged = attention.plan(loaded.pool(BLOCKS, 256), MIXED)
    told.clear()
    with torch.inference_mode():
        logits = loaded.model(
            input_ids=torch.zeros(1, TOKENS, dtype=torch.long, device="cuda"),
            position_ids=torch.zeros(1, TOKENS, dtype=torch.long, device="cuda"),
            use_cache=False, logits_to_keep=torch.tensor([299, 300, 307], device="cuda"), paged=paged,
        ).logits
    assert (tuple(logits.shape), logits.dtype, logits.is_cuda) == ((1, 3, 1000), torch.bfloat16, True)
    assert paged.calls == len(told) == 3
    windows = {"mistral": [WINDOW] * 3, "gemma3": [WINDOW, 0, WINDOW]}.get(family, [0, 0, 0])
    assert [call["window_size"] for call in told] == [(w - 1 if w else -1, 0) for w in windows]


def test_decode_at_fixed_shapes(fake: FakeTensorMode, told: list[dict[str, Any]]) -> None:
    loaded = on_fake_cuda("mistral")
    pool = loaded.pool(BLOCKS + 1, 256)
    graphs = DecodeGraphs(loaded, pool, BLOCKS, record=False)
    for lengths in ((1, 300, 40), (301, 41, 9, 1, 2)):
        told.clear()
        logits = graphs.run([5] * len(lengths), [Span(1, past, [3, 4]) for past in lengths])
        assert (tuple(logits.shape), logits.is_cuda) == ((len(lengths), 1000), True)
        padded = 4 if len(lengths) == 3 else 8
        assert [tuple(call["block_table"].shape) for call in told] == [(padded, 2)] * 3
        assert [(call["max_q"], call["max_k"]) for call in told] == [(1, 512)] * 3, "the same for every step"


def test_soft_caps_and_full_precision_are_gathered(fake: FakeTensorMode) -> None:
    loaded = on_fake_cuda("gemma2")
    assert loaded.softcap
    assert isinstance(attention.plan(loaded.pool(BLOCKS, 16), [Span(20, 0, [3, 1])]).way, Gathered)
    pool = pool_of(torch.float32, 16)
    paged = attention.plan(pool, [Span(20, 5, [3, 1])])
    assert isinstance(paged.way, Gathered) and varlen.refusal(pool) is None
    query = torch.empty(20, 4, 16, device="cuda")
    assert tuple(paged.attend(0, query, Flavour(1.0, window=8)).shape) == (20, 4, 16)
    assert tuple(paged.attend(0, query, Flavour(1.0, softcap=2.0)).shape) == (20, 4, 16)
    half = pool_of()
    with pytest.raises(NotImplementedError, match="soft-cap"):
        attention.plan(half, MIXED).attend(0, rows(half, 4), Flavour(1.0, softcap=2.0))


REFUSALS = {
    "prefix.block_tokens": ({"block_tokens": 16}, "Paged KV cache block size must be divisible by 256"),
    "model.deterministic": ({"deterministic": True}, "num_splits requires another kernel"),
    "model.dtype": ({}, "FlashAttention only supports Ampere GPUs or newer."),
}


@pytest.mark.parametrize("key", REFUSALS)
def test_what_the_kernel_refuses_is_said_at_start(fake: FakeTensorMode, monkeypatch, key: str) -> None:
    more, why = REFUSALS[key]
    loaded = replace(on_fake_cuda("llama"), deterministic=more.get("deterministic", False))
    assert loaded.pool(2, 256).num_blocks == 2

    def refuses(*tensors: Any, **named: Any) -> None:
        raise RuntimeError(f"{complaint(*tensors, **named) or why}\nException raised from somewhere (in C++)")

    monkeypatch.setattr(kernel, "varlen_attn_out", refuses)
    with pytest.raises(UserError, match=why) as error:
        loaded.pool(2, more.get("block_tokens", 256))
    assert error.value.where == key and f"--set {key}=" in error.value.fix and "C++" not in str(error.value)

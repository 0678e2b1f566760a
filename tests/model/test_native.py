"""The compiled kernels against torch: attention on pages, norms, rotation, gating; and how they are had or not had."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.model import compiling
from engine.model.kvcache import KVPool
from engine.model.native import HEAD_DIMS, Kernels, kernels
from engine.model.native_rows import plan
from engine.model.spans import Flavour, Span

pytestmark = pytest.mark.skipif(not compiling.compiler(), reason="no C++ compiler here: torch attends instead")


@pytest.fixture(scope="module")
def made() -> Kernels:
    found = kernels()
    assert found is not None
    return found


def plainly(pool: KVPool, spans: list[Span], query: Tensor, flavour: Flavour) -> Tensor:
    """Row by row in double precision, straight from the definition."""
    out, row = torch.empty_like(query), 0
    keys, values = pool.keys[0].double(), pool.values[0].double()
    for span in spans:
        k, v = (x[torch.tensor(span.table)].flatten(0, 1) for x in (keys, values))
        for last in range(span.past + 1, span.keys + 1):
            first = max(0, last - flavour.window) if flavour.window else 0
            group = query.shape[1] // k.shape[1]
            for head in range(query.shape[1]):
                scores = k[first:last, head // group] @ query[row, head].double() * flavour.scale
                if flavour.softcap:
                    scores = flavour.softcap * torch.tanh(scores / flavour.softcap)
                out[row, head] = (scores.softmax(0) @ v[first:last, head // group]).float()
            row += 1
    return out


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 1 << 30),
    shapes=st.lists(st.tuples(st.integers(1, 5), st.integers(0, 70)), min_size=1, max_size=6),
    block=st.sampled_from([1, 4, 16, 24, 64]),
    dim=st.sampled_from(HEAD_DIMS),
    group=st.integers(1, 7),
    window=st.sampled_from([0, 1, 5, 16, 40]),
    softcap=st.sampled_from([0.0, 3.0]),
    threads=st.sampled_from([1, 2]),
)
def test_attention_is_that_of_the_definition(
    seed: int, shapes: list[tuple[int, int]], block: int, dim: int, group: int, window: int, softcap: float,
    threads: int,
) -> None:
    draw = torch.Generator().manual_seed(seed)
    needed = [-(-(length + past) // block) for length, past in shapes]
    ids = torch.randperm(sum(needed), generator=draw).tolist()
    pool = KVPool(1, sum(needed), block, 2, dim, native=kernels())
    pool.keys[0].normal_(generator=draw)
    pool.values[0].normal_(generator=draw)
    sized = zip(shapes, needed, strict=True)
    spans = [Span(length, past, [ids.pop() for _ in range(n)]) for (length, past), n in sized]
    query = torch.randn(sum(length for length, _ in shapes), 2 * group, dim, generator=draw)
    flavour = Flavour(dim**-0.5, window, softcap)
    out = torch.full_like(query, float("nan"))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        plan(pool, spans).attend(pool, 0, query, out, flavour)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(out, plainly(pool, spans, query, flavour), rtol=1e-4, atol=1e-5)


def test_a_row_with_nan_in_its_keys_is_nan_and_its_neighbours_are_not(made: Kernels) -> None:
    pool = KVPool(1, 2, 16, 1, 16, native=made)
    pool.keys[0][0, 3, 0, 5] = float("nan")
    out = torch.zeros(2, 1, 16)
    plan(pool, [Span(1, 9, [0]), Span(1, 9, [1])]).attend(pool, 0, torch.ones(2, 1, 16), out, Flavour(0.25))
    assert out[0].isnan().all() and out[1].isfinite().all()


def test_tokens_behind_the_last_are_never_read(made: Kernels) -> None:
    pool = KVPool(1, 1, 16, 1, 16, native=made)
    pool.keys[0].normal_()
    pool.values[0].normal_()
    query, outs = torch.ones(1, 1, 16), []
    for rest in (0.0, float("nan")):
        pool.keys[0][0, 7:] = pool.values[0][0, 7:] = rest
        out = torch.empty(1, 1, 16)
        plan(pool, [Span(1, 6, [0])]).attend(pool, 0, query, out, Flavour(0.25))
        outs.append(out)
    assert torch.equal(*outs)


def test_a_head_size_that_it_was_not_made_for_is_an_error(made: Kernels) -> None:
    pool = KVPool(1, 1, 16, 1, 48, native=made)
    with pytest.raises(ValueError, match="heads of 48"):
        plan(pool, [Span(1, 0, [0])]).attend(pool, 0, torch.ones(1, 1, 48), torch.empty(1, 1, 48), Flavour(1.0))


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_norms_and_gates_are_torch_s(made: Kernels, rows: int) -> None:
    torch.manual_seed(rows)
    x, delta, weight = torch.randn(rows, 50), torch.randn(rows, 50), torch.randn(50)
    total = x + delta
    out = made.add_norm(x, delta, weight, 1e-5)
    torch.testing.assert_close(x, total)
    torch.testing.assert_close(out, F.rms_norm(total, (50,), weight, 1e-5))
    both = 30 * torch.randn(rows, 96)
    both[0, :3] = torch.tensor([200.0, -200.0, float("nan")])
    wanted = F.silu(both[:, :48]) * both[:, 48:]
    torch.testing.assert_close(made.gate(both), wanted, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("rotated", [True, False])
@pytest.mark.parametrize("normed", [True, False])
def test_keys_and_values_are_rotated_normed_and_written_to_their_slots(
    made: Kernels, rotated: bool, normed: bool
) -> None:
    torch.manual_seed(0)
    rows, heads, kv_heads, dim = 5, 4, 2, 16
    qkv = torch.randn(rows, (heads + 2 * kv_heads) * dim)
    q, k, v = (x.view(rows, -1, dim) for x in qkv.clone().split([heads * dim, kv_heads * dim, kv_heads * dim], 1))
    angles = torch.randn(rows, dim // 2).repeat(1, 2)
    cosine, sine = angles.cos(), angles.sin()
    norms = (torch.randn(dim), torch.randn(dim))
    if normed:
        q, k = F.rms_norm(q, (dim,), norms[0], 1e-6), F.rms_norm(k, (dim,), norms[1], 1e-6)
    if rotated:
        q, k = (x * cosine[:, None] + torch.cat((-x[..., 8:], x[..., :8]), -1) * sine[:, None] for x in (q, k))
    keys, values = torch.zeros(3, 4, kv_heads, dim), torch.zeros(3, 4, kv_heads, dim)
    slots = torch.tensor([7, 0, 11, 3, 4])
    made.write_kv(qkv, keys, values, slots, (cosine, sine) if rotated else None, norms if normed else None, 1e-6)
    torch.testing.assert_close(qkv[:, : heads * dim].view(q.shape), q)
    torch.testing.assert_close(keys.view(-1, kv_heads, dim)[slots], k)
    torch.testing.assert_close(values.view(-1, kv_heads, dim)[slots], v)
    assert int((keys.view(-1, kv_heads * dim) != 0).any(1).sum()) == rows


def test_it_is_compiled_once_and_by_whoever_is_named(made: Kernels, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DOORBUSTER_CACHE", str(tmp_path))
    first = compiling.library()
    written = first.stat().st_mtime_ns
    assert compiling.library() == first and first.stat().st_mtime_ns == written
    assert [path.name for path in first.parent.iterdir()] == [first.name]


@pytest.mark.parametrize(
    ("compiler", "says"), [("/nowhere/c++", "nowhere"), ("false", "false"), ("echo", "kernels.so")]
)
def test_without_a_compiler_that_works_there_are_none_and_the_log_says_why(
    monkeypatch, tmp_path: Path, caplog, compiler: str, says: str
) -> None:
    monkeypatch.setenv("DOORBUSTER_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", compiler)
    assert kernels.__wrapped__() is None
    assert "slow" in caplog.text and says in caplog.text


def test_kernels_that_compute_something_else_are_not_used(made: Kernels, monkeypatch, tmp_path: Path, caplog) -> None:
    wrong = tmp_path / "kernels.cpp"
    wrong.write_text(compiling.SOURCE.read_text().replace("acc[g][d] / mass[g]", "acc[g][d]"))
    monkeypatch.setenv("DOORBUSTER_CACHE", str(tmp_path))
    monkeypatch.setattr(compiling, "SOURCE", wrong)
    assert kernels.__wrapped__() is None
    assert "another result" in caplog.text

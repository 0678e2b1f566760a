"""Sampling is greedy in fp32, or a draw that only its own row, seed and position decide; what the draws follow.

The reference of the filters is transformers' own chain of warpers. Run: python -m pytest tests/model/test_sampler.py -q
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from engine.model.sampler import FEW, SamplingParams, draw, logprobs_of, sample, uniform
from engine.model.stepping import MAX_TOP_LOGPROBS

GRID = 2000  # evenly spaced "random" numbers: frequencies are then exact to one in GRID


def draws(logits: torch.Tensor, count: int, **params: float) -> list[int | None]:
    rows = logits.expand(count, -1)
    return sample(rows, [SamplingParams(**params)] * count, list(range(count)))  # type: ignore[arg-type]


def random_logits(seed: int, rows: int, vocab: int, spread: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * spread


def test_greedy_takes_the_best_and_the_first_of_equals() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0], [5.0, 3.0, -1.0, 1.0]])
    assert sample(logits, [SamplingParams()] * 2, [0, 0]) == [1, 0]


def test_greedy_compares_in_fp32_whatever_comes_in() -> None:
    assert sample(torch.tensor([[1.0, 2.0]], dtype=torch.bfloat16), [SamplingParams()], [0]) == [1]


@pytest.mark.parametrize("more", [{}, {"top_k": 2}, {"top_p": 0.9}, {"top_k": 2, "top_p": 0.5}])
def test_a_row_with_nan_or_inf_gives_none_and_others_are_unharmed(more: dict[str, float]) -> None:
    logits = torch.tensor([[0.0, 1.0], [float("nan"), 1.0], [0.0, float("inf")], [-float("inf"), 1.0], [-math.inf] * 2])
    for params in (SamplingParams(), SamplingParams(temperature=1.0, **more)):  # type: ignore[arg-type]
        got = sample(logits, [params] * 5, [0] * 5)
        assert got[1:] == [None, None, 1, None] and got[0] in (0, 1)


def filtered_softmax(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """transformers' chain, in double: ``[vocab]`` to probabilities."""
    scores = TemperatureLogitsWarper(params.temperature)(None, logits.double()[None])  # type: ignore[arg-type]
    if params.top_k:
        scores = TopKLogitsWarper(params.top_k)(None, scores)  # type: ignore[arg-type]
    if params.top_p < 1:
        scores = TopPLogitsWarper(params.top_p)(None, scores)  # type: ignore[arg-type]
    return torch.softmax(scores[0], -1)


@pytest.mark.parametrize("vocab", [50, 5000])
@pytest.mark.parametrize("spread", [0.1, 2.0, 8.0])  # flat: the nucleus is wide; steep: it is a handful
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(1.0), SamplingParams(0.3), SamplingParams(2.0, top_k=7), SamplingParams(0.8, top_k=1),
        SamplingParams(1.0, 0.9), SamplingParams(0.7, 0.3), SamplingParams(1.3, 0.8, top_k=40),
        SamplingParams(1.0, 0.95, top_k=600), SamplingParams(1.0, 0.5, top_k=10**6), SamplingParams(1.5, 0.999),
    ],
)
def test_frequencies_are_those_of_the_filtered_softmax(vocab: int, spread: float, params: SamplingParams) -> None:
    logits = random_logits(vocab, 1, vocab, spread)[0]
    want = filtered_softmax(logits, params)
    rows = (logits - logits.max()).expand(GRID, -1)
    drawn = draw(rows, [params] * GRID, [(i + 0.5) / GRID for i in range(GRID)])
    got = torch.bincount(torch.tensor(drawn), minlength=vocab)
    assert not got[want == 0].any(), "nothing that a filter removed"
    # a token's share of [0, 1) is one interval, so that a grid misses by one point at most; and rounding by another
    assert (got - want * GRID).abs().max() < 2


@pytest.mark.parametrize("many", [False, True])
def test_of_equals_at_the_edge_of_a_nucleus_some_stay(many: bool) -> None:
    """A whole row of equals is the worst of it: no more than the share that was asked for."""
    size = 2 * FEW if many else 20
    logits = torch.full((2 * size,), -30.0)
    logits[1::2] = 0.0
    got = set(draws(logits, 20 * size, temperature=1.0, top_p=0.52))
    assert len(got) == math.ceil(0.52 * size) and all(token is not None and token % 2 for token in got)
    assert len(set(draws(logits, 20 * size, temperature=1.0, top_k=size // 2))) == size // 2


def test_frequencies_of_real_draws_follow_the_softmax() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0])
    got = draws(logits, 4000, temperature=0.7)
    want = torch.softmax(logits / 0.7, 0)
    for token in range(3):
        assert abs(got.count(token) / 4000 - want[token].item()) < 0.025


def test_the_nucleus_is_the_fewest_tokens_that_reach_top_p() -> None:
    logits = torch.tensor([0.1, 0.5, 0.15, 0.25]).log()
    assert set(draws(logits, 300, temperature=1.0, top_p=0.7)) == {1, 3}
    assert set(draws(logits, 300, temperature=1.0, top_p=0.8)) == {1, 2, 3}
    assert set(draws(logits, 300, temperature=1.0, top_p=0.0)) == {1}


def test_top_k_comes_before_top_p_and_temperature_before_both() -> None:
    logits = torch.tensor([0.1, 0.5, 0.15, 0.25]).log()
    # of the best two, 0.5 and 0.25, the first alone has 2/3: enough for 0.6, though it has only half of the whole
    assert set(draws(logits, 300, temperature=1.0, top_p=0.6)) == {1, 3}
    assert set(draws(logits, 300, temperature=1.0, top_p=0.6, top_k=2)) == {1}
    # squared, it has 0.25 of 0.345: enough for 0.7, which it had not before
    assert set(draws(logits, 300, temperature=0.5, top_p=0.7)) == {1}


def test_a_temperature_near_zero_is_greedy() -> None:
    logits = random_logits(1, 1, 300)[0]
    for temperature in (5e-324, 1e-30, 1e-6, 1e-4):
        assert set(draws(logits, 20, temperature=temperature)) == {int(logits.argmax())}


PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.2, 1.0, 2.0]),
    top_p=st.sampled_from([1.0, 0.999, 0.9, 0.4]),
    seed=st.integers(-5, 5),
    top_k=st.sampled_from([0, 1, 20, FEW, FEW + 1, 1500]),
)


WIDE, NARROW = SamplingParams(0.2, 0.999), SamplingParams(0.2, top_k=FEW + 1)


@settings(deadline=None, max_examples=100)
@example(batch=[(WIDE, 0, 0.05), (NARROW, 0, 0.05)], seed=0)  # one that is tried twice meets one that is not
@given(
    batch=st.lists(st.tuples(PARAMS, st.integers(0, 99), st.sampled_from([0.05, 1.0, 6.0])), min_size=2, max_size=9),
    seed=st.integers(0, 10**6),
)
def test_neighbours_never_change_a_sample(batch: list[tuple[SamplingParams, int, float]], seed: int) -> None:
    logits = random_logits(seed, len(batch), 2500, 1.0) * torch.tensor([spread for *_, spread in batch])[:, None]
    together = sample(logits, [params for params, *_ in batch], [position for _, position, _ in batch])
    alone = [sample(logits[i : i + 1], [params], [at])[0] for i, (params, at, _) in enumerate(batch)]
    assert together == alone
    assert sample(logits.flip(0), [b[0] for b in batch[::-1]], [b[1] for b in batch[::-1]]) == alone[::-1]


def test_a_sample_depends_on_seed_and_position_alone() -> None:
    logits = random_logits(0, 1, 50, 1.0)[0]
    assert len(set(draws(logits, 200, temperature=1.0, seed=3))) > 20, "positions differ"
    assert draws(logits, 200, temperature=1.0, seed=3) == draws(logits, 200, temperature=1.0, seed=3)
    assert draws(logits, 200, temperature=1.0, seed=3) != draws(logits, 200, temperature=1.0, seed=4)


def test_uniform_is_uniform() -> None:
    numbers = sorted(uniform(1, i) for i in range(2000))
    assert numbers[0] >= 0.0 and numbers[-1] < 1.0
    assert max(abs(u - i / 2000) for i, u in enumerate(numbers)) < 0.04  # Kolmogorov-Smirnov, far out


def test_logprobs_are_the_raw_log_softmax_best_first() -> None:
    logits = random_logits(4, 3, 400).to(torch.bfloat16)
    table = torch.log_softmax(logits.float(), -1)
    got = logprobs_of(logits, [5, 0, 399], [0, 3, MAX_TOP_LOGPROBS])
    for row, (said, token, count) in enumerate(zip(got, [5, 0, 399], [0, 3, MAX_TOP_LOGPROBS], strict=True)):
        assert said.logprob == table[row, token].item()
        assert [log for _, log in said.top] == table[row].sort(descending=True).values[:count].tolist()
        assert all(table[row, other].item() == log for other, log in said.top)
    assert logprobs_of(logits[1:2], [0], [3]) == got[1:2], "whoever is beside"
    assert logprobs_of(torch.zeros(1, 3), [1], [20])[0].top[2][1] == pytest.approx(math.log(1 / 3))

"""Sampling is greedy in fp32 or a draw that only its own seed and position decide."""

from __future__ import annotations

import torch

from engine.model.sampler import SamplingParams, sample, uniform


def draws(logits: torch.Tensor, count: int, **params: float) -> list[int | None]:
    rows = logits.expand(count, -1)
    return sample(rows, [SamplingParams(**params)] * count, list(range(count)))  # type: ignore[arg-type]


def test_greedy_takes_the_best_and_the_first_of_equals() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0], [5.0, 3.0, -1.0, 1.0]])
    assert sample(logits, [SamplingParams()] * 2, [0, 0]) == [1, 0]


def test_greedy_compares_in_fp32_whatever_comes_in() -> None:
    assert sample(torch.tensor([[1.0, 2.0]], dtype=torch.bfloat16), [SamplingParams()], [0]) == [1]


def test_a_row_with_nan_or_inf_gives_none_and_others_are_unharmed() -> None:
    logits = torch.tensor([[0.0, 1.0], [float("nan"), 1.0], [0.0, float("inf")], [-float("inf"), 1.0]])
    for params in (SamplingParams(), SamplingParams(temperature=1.0)):
        assert sample(logits, [params] * 4, [0] * 4)[1:] == [None, None, 1]


def test_frequencies_follow_the_softmax() -> None:
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


def test_a_sample_depends_on_seed_and_position_alone() -> None:
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0))
    params = SamplingParams(temperature=1.0, seed=3)
    alone = sample(logits[None], [params], [7])
    beside = sample(torch.stack([-logits, logits]), [SamplingParams(temperature=2.0, seed=9), params], [1, 7])
    assert beside[1] == alone[0]
    assert len(set(draws(logits, 200, temperature=1.0, seed=3))) > 20, "positions differ"
    assert draws(logits, 200, temperature=1.0, seed=3) != draws(logits, 200, temperature=1.0, seed=4)


def test_uniform_is_uniform() -> None:
    numbers = sorted(uniform(1, i) for i in range(2000))
    assert numbers[0] >= 0.0 and numbers[-1] < 1.0
    assert max(abs(u - i / 2000) for i, u in enumerate(numbers)) < 0.04  # Kolmogorov-Smirnov, far out

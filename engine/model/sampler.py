"""Logits to tokens: greedy in fp32, or temperature and nucleus sampling (Holtzman et al. 2020).

The one random number of a token is a hash of (seed, position): neither neighbours in the batch nor a preemption can
change a sample. Knows nothing of sequences.
"""

from __future__ import annotations

from hashlib import blake2b

import torch
from torch import Tensor

from engine.model.stepping import SamplingParams

__all__ = ["SamplingParams", "sample"]


def sample(logits: Tensor, params: list[SamplingParams], positions: list[int]) -> list[int | None]:
    """One token a row of ``logits`` ``[N, vocab]``, or ``None`` for a row with nan or +inf in it.

    ``positions`` is the index of each row's new token in its sequence.
    """
    logits = logits.float()
    best, where = logits.max(dim=-1)  # max lets nan through, so it is also the check
    sound: list[bool] = best.isfinite().tolist()
    chosen: list[int | None] = [token if ok else None for token, ok in zip(where.tolist(), sound, strict=True)]
    for row, (param, position) in enumerate(zip(params, positions, strict=True)):
        if param.temperature > 0 and sound[row]:
            chosen[row] = _draw(logits[row], param, uniform(param.seed, position))
    return chosen


def _draw(logits: Tensor, params: SamplingParams, u: float) -> int:
    probs, order = torch.softmax(logits.double() / params.temperature, dim=-1).sort(descending=True, stable=True)
    mass = probs.cumsum(0)
    # the nucleus: the fewest likely tokens whose mass reaches top_p, never fewer than one
    last = min(int(torch.searchsorted(mass, params.top_p)), len(mass) - 1)
    pick = int(torch.searchsorted(mass[: last + 1], u * mass[last].item(), right=True))
    return int(order[min(pick, last)])


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on nothing but its two arguments."""
    raw = blake2b(f"{seed}:{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(raw, "little") >> 11) * 2.0**-53

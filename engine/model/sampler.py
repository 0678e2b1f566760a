"""Logits to tokens: greedy in fp32, or a draw after temperature, top-k and top-p, in this order (vLLM, transformers).

Top-p counts mass inside the top-k, renormalised; nucleus sampling is Holtzman et al. 2020. The one random number of a
token is a hash of (seed, position), and what a row costs and gives follows from that row alone: neither neighbours in
the batch nor a preemption can change a sample. No row is sorted with its indices; the values alone are where a
nucleus reaches beyond the ``FEW`` best. Knows nothing of sequences.
"""

from __future__ import annotations

from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor

from engine.model.stepping import MAX_TOP_LOGPROBS, SamplingParams, TokenLogprobs

__all__ = ["SamplingParams", "logprobs_of", "sample", "uniform"]

FEW = 128  # the best logits: a top-k up to here needs no more, and most nuclei are among them
COLDEST = 1e-5  # below this temperature a draw is the best token (as in vLLM); fp32 could not hold the quotients


def sample(logits: Tensor, params: list[SamplingParams], positions: list[int]) -> list[int | None]:
    """One token a row of ``logits`` ``[N, vocab]``, or ``None`` for a row with nan or +inf in it.

    ``positions`` is the index of each row's new token in its sequence.
    """
    logits = logits.float()
    best, where = logits.max(dim=-1)  # max lets nan through, so it is also the check
    sound: list[bool] = best.isfinite().tolist()
    chosen: list[int | None] = [token if ok else None for token, ok in zip(where.tolist(), sound, strict=True)]
    rows = [row for row, param in enumerate(params) if param.temperature >= COLDEST and sound[row]]
    if rows:
        numbers = [uniform(params[row].seed, positions[row]) for row in rows]
        drawn = draw(logits[rows] - best[rows, None], [params[row] for row in rows], numbers)
        for row, token in zip(rows, drawn, strict=True):
            chosen[row] = token
    return chosen


def draw(logits: Tensor, params: list[SamplingParams], numbers: list[float]) -> list[int]:
    """A token a row of ``logits`` ``[N, vocab]`` (fp32, each row's best is 0), where ``numbers`` in [0, 1) decide."""
    vocab = logits.shape[-1]
    scaled = logits / _column([param.temperature for param in params], logits)
    u = _column(numbers, logits, torch.float64)
    free: list[int] = []
    few: list[int] = []
    many: list[int] = []
    for row, param in enumerate(params):
        limit = _limit(param, vocab)
        if limit == vocab and param.top_p >= 1:
            free.append(row)
        else:
            (few if vocab > FEW and (limit == vocab or limit <= FEW) else many).append(row)
    tokens = [0] * len(params)
    if few:
        found = _among_best(scaled[few], [params[row] for row in few], u[few])
        many += [row for row, token in zip(few, found, strict=True) if token is None]
        for row, best in zip(few, found, strict=True):
            tokens[row] = best or 0
    if many:
        scaled[many] = _filtered(scaled[many], [params[row] for row in many])
    if rest := free + many:
        for row, token in zip(rest, _anywhere(scaled[rest], u[rest]), strict=True):
            tokens[row] = token
    return tokens


def _limit(param: SamplingParams, vocab: int) -> int:
    return param.top_k if 0 < param.top_k < vocab else vocab


def _anywhere(scaled: Tensor, u: Tensor) -> list[int]:
    """Every token that is there may come: no order is needed."""
    mass = torch.softmax(scaled, dim=-1).cumsum(-1, dtype=torch.float64)
    return _pick(mass, u, mass[:, -1:].contiguous())


def _among_best(scaled: Tensor, params: list[SamplingParams], u: Tensor) -> list[int | None]:
    """A token a row; ``None`` where the nucleus reaches beyond the ``FEW`` best."""
    vocab = scaled.shape[-1]
    values, order = scaled.topk(FEW, dim=-1)
    limit = _column([_limit(param, vocab) for param in params], scaled, torch.int64)
    chances = _chances(values, limit)
    if any(_limit(param, vocab) == vocab for param in params):  # those count their mass over the whole row
        whole = torch.softmax(scaled, dim=-1).gather(-1, order).double()
        chances = torch.where(limit == vocab, whole, chances)
    mass = chances.cumsum(-1)
    wanted = _column([param.top_p for param in params], scaled, torch.float64)
    last = torch.searchsorted(mass, wanted).clamp_(max=FEW - 1)
    enough = ((mass[:, -1:] >= wanted) | (limit <= FEW)).flatten().tolist()
    places = _pick(mass, u, mass.gather(-1, last))
    tokens = order.gather(-1, torch.tensor(places, device=order.device)[:, None]).flatten().tolist()
    return [token if ok else None for token, ok in zip(tokens, enough, strict=True)]


def _filtered(scaled: Tensor, params: list[SamplingParams]) -> Tensor:
    """The rows with all but their top-k's nucleus at -inf. Of equals at its edge the first stay.

    Values alone are sorted, by numpy: torch's sort carries the indices along.
    """
    if scaled.is_cuda:
        values = scaled.sort(dim=-1, descending=True).values
    else:
        values = torch.from_numpy(np.sort(scaled.numpy(), axis=-1)).flip(-1)
    limit = _column([_limit(param, scaled.shape[-1]) for param in params], scaled, torch.int64)
    mass = _chances(values, limit).cumsum(-1)
    wanted = _column([param.top_p for param in params], scaled, torch.float64)
    # the nucleus: the fewest likely tokens whose mass reaches top_p, never fewer than one
    count = torch.minimum(torch.searchsorted(mass, wanted) + 1, limit)
    edge = values.gather(-1, count - 1)
    level = scaled == edge
    first = level.cumsum(-1) <= count - (values > edge).sum(-1, keepdim=True)
    return scaled.masked_fill(~((scaled > edge) | (level & first)), -torch.inf)


def _chances(values: Tensor, limit: Tensor) -> Tensor:
    """Probabilities in fp64 of ``values`` ``[N, W]``, best first, of which the first ``limit`` count."""
    beyond = torch.arange(values.shape[-1], device=values.device) >= limit
    return torch.softmax(values.masked_fill(beyond, -torch.inf).double(), dim=-1)


def _pick(mass: Tensor, u: Tensor, total: Tensor) -> list[int]:
    """Columns where the running ``mass`` ``[N, W]`` passes ``u * total``; never one that adds nothing to it."""
    at = torch.searchsorted(mass, u * total, right=True)
    last = torch.searchsorted(mass, total)  # rounding may carry u * total to the total itself
    return torch.minimum(at, last).flatten().tolist()


def _column(numbers: list[float] | list[int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.tensor(numbers, dtype=dtype or like.dtype, device=like.device)[:, None]


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on nothing but its two arguments."""
    raw = blake2b(f"{seed}:{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(raw, "little") >> 11) * 2.0**-53


def logprobs_of(logits: Tensor, tokens: list[int], counts: list[int]) -> list[TokenLogprobs]:
    """Log-softmax in fp32 of the raw ``logits`` ``[N, vocab]``: of each row's token, and of its ``counts`` best.

    Raw: before temperature, top-k and top-p, so that they say what the model thinks and not how it was asked.
    """
    table = torch.log_softmax(logits.float(), dim=-1)
    own = table.gather(-1, torch.tensor(tokens, device=table.device)[:, None]).flatten().tolist()
    if not any(counts):
        return [TokenLogprobs(logprob) for logprob in own]
    values, order = table.topk(min(MAX_TOP_LOGPROBS, table.shape[-1]), dim=-1)  # one width, whoever is beside
    best = [list(zip(ids, logs, strict=True)) for ids, logs in zip(order.tolist(), values.tolist(), strict=True)]
    return [TokenLogprobs(logprob, top[:count]) for logprob, top, count in zip(own, best, counts, strict=True)]

"""Prompts and what a plain greedy loop says after each: no cache, no batch, no blocks, one whole forward a token."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

LONGEST = 20  # tokens of an answer
LEVEL = 1e-3  # two best logits nearer than this might change places with another order of sums


@dataclass(frozen=True)
class Known:
    """A prompt, and ``LONGEST`` tokens after it, end tokens taken for words."""

    prompt: list[int]
    answer: list[int]

    def cut(self, max_tokens: int, ends: tuple[int, ...]) -> tuple[list[int], str]:
        """What a request for so many tokens gets, and why it ends."""
        for at, token in enumerate(self.answer[:max_tokens]):
            if token in ends:
                return self.answer[:at], "stop"
        return self.answer[:max_tokens], "length"


def known_prompts(plain: PreTrainedModel, count: int, below: int) -> list[Known]:
    """Seeded; with openings in common, and some of less than a block. None whose answer hangs on a rounding error.

    No token of prompts and answers is ``below`` or more: these are left for mischief.
    """
    rng = random.Random(11)
    openings = [[rng.randrange(3, below) for _ in range(length)] for length in (16, 27, 48)]
    found: list[Known] = []
    while len(found) < count:
        opening = rng.choice([*openings, *openings, []])
        prompt = opening + [rng.randrange(3, below) for _ in range(rng.randint(1, 40))]
        answer = greedy(plain, prompt)
        if answer is not None and max(answer) < below:
            found.append(Known(prompt, answer))
    return found


def greedy(plain: PreTrainedModel, prompt: list[int]) -> list[int] | None:
    """``LONGEST`` tokens; None where the two best were level somewhere."""
    tokens = list(prompt)
    with torch.inference_mode():
        for _ in range(LONGEST):
            best = plain(torch.tensor([tokens]), use_cache=False, logits_to_keep=1).logits[0, -1].topk(2)
            if float(best.values[0] - best.values[1]) < LEVEL:
                return None
            tokens.append(int(best.indices[0]))
    return tokens[len(prompt) :]


def end_tokens(known: list[Known]) -> tuple[int, ...]:
    """Tokens to be taken for the end: in the middle of some answers."""
    return tuple(sorted({one.answer[LONGEST // 2] for one in known[::6]}))

"""What the tests of the live model share: the tiny model, its transformers reference, and a hand that plans steps."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads would slow the tests beside these
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache

import pytest
import torch
from transformers import PreTrainedModel

from engine.events import Chunk, Filled, Grow, RunStep, SeqStart, StepDone, StepShape
from engine.model.blockhash import Hasher
from engine.model.loader import LoadedModel, load, load_plain, prepare
from engine.model.runner import TorchRunner
from engine.model.stepping import SamplingParams

BLOCK = 16
BLOCKS = 96


def permuted(count: int, seed: int = 1) -> list[int]:
    """Block ids in no order at all: nothing may depend on neighbours in a table being neighbours in memory."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


@dataclass
class Hand:
    """Plays the replica machine by hand: gives out blocks, plans steps, keeps what came back."""

    runner: TorchRunner
    hasher: Hasher
    free: list[int] = field(default_factory=lambda: permuted(BLOCKS))
    out: dict[int, list[int]] = field(default_factory=dict)
    ended: dict[int, str] = field(default_factory=dict)
    first: list[int] = field(default_factory=list)
    filled: list[Filled] = field(default_factory=list)
    steps: int = 0

    def __post_init__(self) -> None:
        self.runner.pool.poison(self.free)

    def take(self, tokens: int) -> tuple[int, ...]:
        """Blocks for so many tokens."""
        count = -(-tokens // BLOCK)
        taken, self.free = self.free[:count], self.free[count:]
        assert len(taken) == count, "the test wants more blocks than there are"
        return tuple(taken)

    def give(self, blocks: Sequence[int]) -> None:
        """Back to the free ones, poisoned: whoever still reads them gets nonsense."""
        self.runner.pool.poison(blocks)
        self.free += blocks

    def submit(
        self, sid: int, prompt: list[int], max_tokens: int = 12, params: SamplingParams | None = None, salt: str = "t"
    ) -> None:
        blocks = self.hasher.chain(self.hasher.root(salt, "tiny"), prompt)
        self.runner.submit(sid, prompt, max_tokens, blocks, params or SamplingParams())

    def step(
        self,
        start: Sequence[SeqStart] = (),
        chunks: Sequence[tuple[int, int]] = (),
        stop: Sequence[int] = (),
        grow: Sequence[Grow] = (),
        at_most: int = 1,
        waits: Callable[[], bool] = lambda: False,
    ) -> StepDone:
        """One RunStep; what it yields is added up."""
        told = tuple(Chunk(sid, tokens) for sid, tokens in chunks)
        plan = RunStep(self.steps, StepShape(), tuple(start), tuple(grow), tuple(stop), told, at_most)
        result = self.runner.run(plan, waits)
        assert isinstance(result.done, StepDone), result.done
        for sid, tokens in result.tokens:
            self.out.setdefault(sid, []).extend(tokens)
        self.ended |= {end.sid: end.reason for end in result.done.ended}
        self.first += result.done.first
        self.filled += result.done.filled
        self.steps += result.done.steps
        return result.done

    def finish(self, *sids: int, at_most: int = 1) -> None:
        """Decode until all of ``sids`` have ended."""
        while not set(sids) <= set(self.ended):
            self.step(at_most=at_most)

    def whole(self, sid: int, prompt: list[int], max_tokens: int = 12, params: SamplingParams | None = None) -> None:
        """Submit and start with the whole prompt in one chunk."""
        self.submit(sid, prompt, max_tokens, params)
        self.step([SeqStart(sid, 0, self.take(len(prompt) + max_tokens))], [(sid, len(prompt))])


@pytest.fixture(scope="session")
def tiny() -> LoadedModel:
    return load(prepare("tiny", lambda line: None))


@pytest.fixture(scope="session")
def plain() -> PreTrainedModel:
    return load_plain(prepare("tiny", lambda line: None))


@pytest.fixture
def hand(tiny: LoadedModel) -> Hand:
    return hand_on(tiny)


def hand_on(model: LoadedModel) -> Hand:
    hasher = Hasher(b"k" * 16, BLOCK)
    return Hand(TorchRunner(model, BLOCKS, BLOCK, hasher), hasher)


@pytest.fixture(scope="session")
def reference(plain: PreTrainedModel) -> Callable[[list[int], int], list[int]]:
    """Greedy output of transformers' own generate(), end token left out."""

    @cache
    def generate(prompt: tuple[int, ...], max_tokens: int) -> list[int]:
        out = plain.generate(torch.tensor([prompt]), max_new_tokens=max_tokens, do_sample=False)
        new: list[int] = out[0, len(prompt) :].tolist()
        return new[:-1] if new[-1] == 2 else new

    return lambda prompt, max_tokens: generate(tuple(prompt), max_tokens)


def prompt_of(seed: int, length: int) -> list[int]:
    """Random tokens, no special ones among them."""
    return torch.randint(3, 2000, (length,), generator=torch.Generator().manual_seed(seed)).tolist()

"""A hand that plans steps for a runner, in place of the replica machine, and what its tests share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from engine.events import Chunk, Filled, Grow, RunStep, SeqStart, StepDone, StepShape
from engine.model.blockhash import Hasher
from engine.model.loader import LoadedModel
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

    def start(self, sid: int, tokens: int, computed: int = 0) -> SeqStart:
        """Into the running set with blocks for so many tokens."""
        return SeqStart(sid, computed, self.take(tokens))

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
        self.step([self.start(sid, len(prompt) + max_tokens)], [(sid, len(prompt))])


def hand_on(model: LoadedModel) -> Hand:
    hasher = Hasher(b"k" * 16, BLOCK)
    return Hand(TorchRunner(model, BLOCKS, BLOCK, hasher), hasher)


def prompt_of(seed: int, length: int) -> list[int]:
    """Random tokens, no special ones among them."""
    return torch.randint(3, 2000, (length,), generator=torch.Generator().manual_seed(seed)).tolist()

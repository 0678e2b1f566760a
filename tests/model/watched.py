"""A real runner that is watched: what every KV slot holds, taken from what the model was really given to write.

The KV of a position depends on its token and on all tokens before it; ``follow`` folds them into one number. So a slot
is known by one number, written where a span is written and compared wherever a sequence is said to have KV already.
A block that nobody holds and nobody can find is poisoned at once, and so is a fresh one before its owner has it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from engine.events import ReplicaAction, ReplicaEvent, RunStep, SeqStart, StepDone, Submit
from engine.model import attention
from engine.model.blockhash import Hasher
from engine.model.kvcache import KVPool
from engine.model.loader import LoadedModel
from engine.model.runner import TorchRunner
from engine.model.spans import Span
from engine.model.stepping import Emit, SamplingParams, StepResult
from engine.policy.replica import Replica
from tests.policy.worlds import follow


@dataclass
class Asked:
    """One submission's tokens, as the client's side knows them."""

    submit: Submit
    tokens: list[int]  # prompt, and what came out so far
    chain: list[bytes]


class Saboteur:
    """Makes the model raise: where ``guilty`` is read, always; at a forward that is counted down to, once."""

    def __init__(self, guilty: int) -> None:
        self.guilty = guilty
        self.countdown, self.late = 0, False  # late: the model has already written when it raises
        self.raised: Counter[str] = Counter()

    def arm(self, countdown: int, late: bool) -> None:
        """The ``countdown``-th forward from now on raises; 0 = none."""
        self.countdown, self.late, self._first = countdown, late, countdown == 1

    def look(self, ids: list[int], late: bool) -> None:
        """Called before the model runs, and after."""
        if not late and self.guilty in ids:
            raise ValueError("a prompt that no kernel survives")
        if self.countdown and late == self.late:
            self.countdown -= 1
            if not self.countdown:
                self.raised["before it wrote" if not late else "after it wrote"] += 1
                self.raised["in the middle of several steps"] += not self._first
                raise RuntimeError("the hardware stumbled")


@dataclass
class Books:
    """What each slot and block holds. ``seen`` counts what happened."""

    size: int  # tokens a block
    hasher: Hasher
    pool: KVPool
    slots: list[int | None]  # what the KV there was computed from; None = nothing that may be trusted
    asked: dict[int, Asked] = field(default_factory=dict)
    owner: dict[int, str] = field(default_factory=dict)  # block -> the tenant that it was given to
    name: dict[int, bytes] = field(default_factory=dict)  # block -> the digest that it may be found by
    spoiled: set[int] = field(default_factory=set)
    spans: list[Span] = field(default_factory=list)  # of the forward that is about to run
    seen: Counter[str] = field(default_factory=Counter)

    def slot(self, table: list[int] | tuple[int, ...], position: int) -> int:
        return table[position // self.size] * self.size + position % self.size

    def spoil(self, blocks: list[int]) -> None:
        """Whoever reads them from now on gets nonsense."""
        if blocks:
            self.pool.poison(blocks)
            self.spoiled.update(blocks)
            self.seen["poisoned"] += len(blocks)
            for block in blocks:
                self.slots[block * self.size : (block + 1) * self.size] = [None] * self.size

    def sweep(self, replica: Replica) -> None:
        """Spoil all that has come free; what can be found by its name is kept, for it may be revived."""
        blocks = replica.batcher.pool
        free = [block for block in range(blocks.total) if not blocks.references(block) and block not in self.spoiled]
        named = {block for block in free if blocks.match([self.name.get(block, b"")], self.size + 1) == [block]}
        self.spoil([block for block in free if block not in named])

    # ------------------------------------------------------------ around a step

    def before(self, step: RunStep) -> None:
        """Fresh blocks change hands, full of poison."""
        for start in step.start:
            asked, done = self.asked[start.sid], -(-start.computed // self.size)
            self._give(asked, start.blocks[done:])
            for block, digest in zip(start.blocks[done:], asked.chain[done:], strict=False):
                self.name[block] = digest
        for grow in step.grow:
            self._give(self.asked[grow.sid], grow.blocks)

    def _give(self, asked: Asked, blocks: tuple[int, ...]) -> None:
        self.spoil(list(blocks))
        self.spoiled.difference_update(blocks)
        for block in blocks:
            self.owner[block] = asked.submit.tenant
            self.name.pop(block, None)

    def after(self, step: RunStep, result: StepResult, tables: dict[int, list[int]]) -> None:
        """Whoever was said to have KV already has the KV of its own tokens, from a block of its own tenant."""
        if not isinstance(result.done, StepDone):
            self.seen["failed steps"] += 1
            self.seen["failed steps of one row"] += len(self.spans) == 1
            return
        self.seen["multi-steps"] += result.done.steps > 1
        fresh = {block for start in step.start for block in start.blocks[start.computed // self.size :]}
        for start in step.start:
            if start.computed:
                self._compare(start)
                self.seen["hits"] += 1
                self.seen["hits on this step's blocks"] += not fresh.isdisjoint(
                    start.blocks[: start.computed // self.size]
                )
        for filled in result.done.filled:
            self.asked[filled.sid].chain[filled.index :] = [filled.digest]
            self.name[tables[filled.sid][filled.index]] = filled.digest

    def _compare(self, start: SeqStart) -> None:
        asked, state = self.asked[start.sid], 0
        for position, token in enumerate(asked.tokens[: start.computed]):
            state = follow(state, token)
            found = self.slots[self.slot(start.blocks, position)]
            assert found == state, f"hit: position {position} of sequence {start.sid} holds its own token's KV"
        owners = {self.owner[block] for block in start.blocks[: start.computed // self.size]}
        assert owners <= {asked.submit.tenant}, "hit: never another tenant's block"

    # ------------------------------------------------------------ around a forward

    def written(self, ids: list[int]) -> None:
        """The model has run: each span's slots hold its tokens, on top of what its table held before."""
        todo, at = [], 0
        for span in self.spans:
            todo.append((span, ids[at : at + span.length]))
            at += span.length
        while todo:  # a span may read what another of the same forward has written
            ready = [(span, new) for span, new in todo if self._under(span) is not None]
            assert ready, "forward: every row reads KV that was written, by a step that did not fail"
            for span, new in ready:
                state = self._under(span)
                for position, token in enumerate(new, span.past):
                    state = self.slots[self.slot(span.table, position)] = follow(state or 0, token)
            todo = [(span, new) for span, new in todo if not any(span is done for done, _ in ready)]

    def _under(self, span: Span) -> int | None:
        return self.slots[self.slot(span.table, span.past - 1)] if span.past else 0

    def begin(self, spans: list[Span]) -> None:
        """A forward is about to write: until it has, what stood there before is gone."""
        self.spans = [replace(span, table=list(span.table)) for span in spans]
        for span in self.spans:
            for position in range(span.past, span.keys):
                self.slots[self.slot(span.table, position)] = None


class WatchedModel:
    """The model, and what it was given to write."""

    def __init__(self, model: Any, books: Books, saboteur: Saboteur) -> None:
        self.model, self.books, self.saboteur = model, books, saboteur

    def __call__(self, **keywords: Any) -> Any:
        ids = keywords["input_ids"][0].tolist()
        self.saboteur.look(ids, late=False)
        out = self.model(**keywords)
        self.saboteur.look(ids, late=True)
        self.books.written(ids)
        return out

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


class WatchedRunner:
    """A ``stepping.Runner`` around the real one."""

    def __init__(self, model: LoadedModel, blocks: int, hasher: Hasher, guilty: int) -> None:
        size = hasher.block_tokens
        self.runner = TorchRunner(model, blocks, size, hasher)
        self.books = Books(size, hasher, self.runner.pool, [None] * (blocks * size))
        self.saboteur = Saboteur(guilty)
        self.runner.model = replace(model, model=WatchedModel(model.model, self.books, self.saboteur))  # type: ignore
        self.tables: dict[int, list[int]] = {}

    def submit(
        self, sid: int, prompt: list[int], max_tokens: int, blocks: tuple[bytes, ...], params: SamplingParams
    ) -> None:
        self.runner.submit(sid, prompt, max_tokens, blocks, params)

    def forget(self, sid: int) -> None:
        self.runner.forget(sid)
        self.tables.pop(sid, None)

    def run(self, step: RunStep, message_waits: Callable[[], bool], emit: Emit | None = None) -> StepResult:
        for start in step.start:
            self.tables[start.sid] = list(start.blocks)
        for grow in step.grow:
            self.tables[grow.sid] += grow.blocks
        self.books.before(step)
        result = self.runner.run(step, message_waits, emit)
        self.books.after(step, result, self.tables)
        return result


class CheckedReplica(Replica):
    """Says after every single event whether its books are in order; then what came free is spoiled."""

    books: Books

    def handle(self, now_ns: int, event: ReplicaEvent) -> list[ReplicaAction]:
        out = super().handle(now_ns, event)
        self.check()
        self.books.sweep(self)
        self.books.seen["events"] += 1
        return out


@contextmanager
def watched(runner: WatchedRunner) -> Iterator[None]:
    """Inside, the books hear of every forward's spans."""
    real = attention.plan

    def plan(pool: KVPool, spans: list[Span], *rest: Any, **more: Any) -> Any:
        runner.books.begin(spans)
        return real(pool, spans, *rest, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "plan", plan)
        yield

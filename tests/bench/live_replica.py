"""The real replica in this process: machine, driver, runner, the real clock; a list of arrivals instead of sockets.

As ``engine/model/process.py`` does it: messages are taken in between two steps, and a run of decode steps ends when
one waits. Times count from the moment a request was due, so waiting for the step in flight is part of them.
"""

from __future__ import annotations

import time
from bisect import insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import msgspec

from engine.config import ReplicaConfig
from engine.events import Ended, FirstToken, StepDone, StepShape, Submit
from engine.model.blockhash import Hasher
from engine.model.loader import LoadedModel
from engine.model.runner import TorchRunner
from engine.model.stepping import SamplingParams
from engine.model.wire import Work
from engine.model.worker import ReplicaDriver
from engine.policy.replica import Replica
from engine.units import MS_NS, s_to_ns

FOREVER_NS = s_to_ns(86_400)


class Ask(NamedTuple):
    """A request to come."""

    prompt: list[int]
    max_tokens: int
    priority: int = 1
    blocks: tuple[bytes, ...] = ()


@dataclass(slots=True)
class Answered:
    """What became of one."""

    due_ns: int
    taken_ns: int = 0  # when the step in flight was over
    tokens: list[int] = field(default_factory=list)
    times_ns: list[int] = field(default_factory=list)  # of each token
    cached_tokens: int = 0

    @property
    def flight_ms(self) -> float:
        """Of the first token's time: the rest of the step in flight when it was due."""
        return (self.taken_ns - self.due_ns) / MS_NS

    @property
    def ttft_ms(self) -> float:
        """From due to its first token."""
        return (self.times_ns[0] - self.due_ns) / MS_NS

    @property
    def e2e_ms(self) -> float:
        """From due to its last token."""
        return (self.times_ns[-1] - self.due_ns) / MS_NS


class StepTime(NamedTuple):
    """One step of the model as it was run."""

    shape: StepShape
    ns: int
    cpu_ns: int  # of all threads: on a busy machine this says what the step itself took


class Mark(NamedTuple):
    """A border between two steps."""

    wall_ns: int
    cpu_ns: int


class LiveReplica:
    """Ask, then ``turn`` until what you wait for has come."""

    def __init__(self, model: LoadedModel, config: ReplicaConfig, hasher: Hasher) -> None:
        runner = TorchRunner(model, config.prefix.blocks, config.prefix.block_tokens, hasher)
        self.driver = ReplicaDriver(Replica(config), runner)
        self.answers: dict[int, Answered] = {}  # all that were ever asked for
        self.open: set[int] = set()  # those that have not ended
        self.steps: list[StepTime] = []
        self._due: list[tuple[int, Work]] = []

    def ask(self, ask: Ask, due_ns: int | None = None) -> int:
        """It will be there at ``due_ns`` (monotonic), by default now."""
        sid = len(self.answers)
        due_ns = time.monotonic_ns() if due_ns is None else due_ns
        submit = Submit(
            sid, sid, "local", f"priority-{ask.priority}", ask.priority, due_ns, due_ns + FOREVER_NS, len(ask.prompt),
            ask.max_tokens, ask.blocks,
        )
        self.answers[sid] = Answered(due_ns)
        self.open.add(sid)
        work = Work(submit, ask.prompt, SamplingParams(ignore_eos=True))
        insort(self._due, (due_ns, work), key=lambda due: due[0])
        return sid

    def turn(self) -> None:
        """What is due comes in, a step is planned and run, or a run of steps; sleeps where there is nothing to run."""
        began_ns = time.monotonic_ns()
        step, output = self.driver.begin(began_ns, list(self._take(began_ns)))
        self._hear(output.events if output else [])
        if step is None:
            if self._due:
                time.sleep(max(0, self._due[0][0] - time.monotonic_ns()) / 1e9)
            return
        marks = [_now()]
        result = self.driver.runner.run(step, self._somebody_waits, lambda tokens: self._keep(tokens, marks))
        self._keep(result.tokens, marks)
        assert isinstance(result.done, StepDone), result.done
        for later, (before, after) in enumerate(pairwise(marks)):
            kv_tokens = step.shape.decode_kv_tokens + later * step.shape.decode_rows
            shape = msgspec.structs.replace(step.shape, decode_kv_tokens=kv_tokens)
            self.steps.append(StepTime(shape, after.wall_ns - before.wall_ns, after.cpu_ns - before.cpu_ns))
        output = self.driver.finish(time.monotonic_ns(), result)
        self._hear(output.events if output else [])

    def until(self, done: Callable[[], bool]) -> None:
        """Turn while it is not so."""
        while not done():
            self.turn()

    def answer(self, *asks: Ask) -> list[Answered]:
        """All at once, until the last has ended."""
        sids = [self.ask(ask) for ask in asks]
        self.until(lambda: self.open.isdisjoint(sids))
        return [self.answers[sid] for sid in sids]

    def _take(self, now_ns: int) -> Iterator[Work]:
        while self._due and self._due[0][0] <= now_ns:
            _, work = self._due.pop(0)
            self.answers[work.submit.sid].taken_ns = now_ns
            yield work

    def _somebody_waits(self) -> bool:
        return bool(self._due) and self._due[0][0] <= time.monotonic_ns()

    def _keep(self, tokens: list[tuple[int, list[int]]], marks: list[Mark]) -> None:
        marks.append(_now())
        for sid, ids in tokens:
            self.answers[sid].tokens += ids
            self.answers[sid].times_ns += [marks[-1].wall_ns] * len(ids)

    def _hear(self, events: list) -> None:  # type: ignore[type-arg]
        for event in events:
            match event:
                case FirstToken(sid=sid):
                    self.answers[sid].cached_tokens = event.cached_tokens
                case Ended(sid=sid):
                    assert event.reason == "length", f"{sid} ended: {event.reason}"
                    self.open.discard(sid)


def _now() -> Mark:
    return Mark(time.monotonic_ns(), time.process_time_ns())

"""What lies ahead of a newcomer, against a sum over everything. The exact part is checked after every event here.

Mutations it caught: hits of who waits not subtracted; a stampede's prefix counted for each; one that ended kept; one
that was put back not looked at again; chunks that were computed still counted.
"""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config import BatcherConfig, PrefixConfig, ReplicaConfig
from engine.events import Abort, Plan, Pressure, RunStep, StepFailed, Submit
from engine.model.blockhash import Hasher
from engine.model.counting import CountingRunner
from engine.policy.replica import Replica
from engine.units import MS_NS

SIZE = 4
HASHER = Hasher(b"k" * 16, SIZE)


class World:
    """A replica, a runner that counts, and a list of all that was asked."""

    def __init__(self, slots: int = 4, step_tokens: int = 12, blocks: int = 60) -> None:
        batcher = BatcherConfig(step_tokens=step_tokens, slots=slots, reserved_slots=0, reserved_blocks=0, age_ms=5)
        prefix = PrefixConfig(block_tokens=SIZE, blocks=blocks, pinned_blocks=0)
        self.machine = Replica(ReplicaConfig(batcher=batcher, prefix=prefix, forecast=True))
        self.runner = CountingRunner(HASHER)
        self.now_ns, self.step = 0, None
        self.said = Pressure(0, -1, 0)
        self.sid = 0

    def submit(self, tokens: list[int], priority: int = 1, answer: int = 3) -> int:
        self.sid += 1
        self.runner.add(self.sid, len(tokens), answer, answer)
        blocks = HASHER.chain(b"root", tokens)
        self.tell(Submit(self.sid, self.sid, "t", "c", priority, self.now_ns, 1 << 60, len(tokens), answer, blocks))
        return self.sid

    def tell(self, event: Submit | Abort | StepFailed) -> None:
        self.machine.handle(self.now_ns, event)

    def plan(self) -> RunStep | None:
        self.step = None
        for action in self.machine.handle(self.now_ns, Plan()):
            if isinstance(action, RunStep):
                self.step = action
            elif isinstance(action, Pressure):
                self.said = action
        return self.step

    def turn(self, ns: int = 10 * MS_NS, fails: bool = False) -> bool:
        """Plan and run one step; the plan's word is heard."""
        step = self.plan()
        if step is None:
            return False
        self.now_ns += ns
        done = StepFailed("") if fails else self.runner.advance(step, 1)
        self.machine.handle(self.now_ns, done)
        for sid in [end.sid for end in getattr(done, "ended", ())]:
            self.runner.forget(sid)
        return True


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_the_backlog_is_the_sum_of_what_is_to_compute(seed: int) -> None:
    r = random.Random(seed)
    world = World(slots=r.choice([2, 5]), step_tokens=r.choice([5, 12, 40]), blocks=r.choice([14, 60]))
    sent: list[int] = []
    for _ in range(r.randrange(5, 60)):
        match r.choice(["submit", "submit", "turn", "turn", "abort", "fail"]):
            case "submit":
                tokens = [r.randrange(3)] * r.choice([4, 9]) + [r.randrange(100) for _ in range(r.randrange(1, 12))]
                sent.append(world.submit(tokens, r.randrange(3)))
            case "abort" if sent:
                world.tell(Abort(sent.pop(r.randrange(len(sent)))))
            case "turn" | "fail" as what:
                world.turn(fails=what == "fail" and r.random() < 0.3)
            case _:
                continue
        world.machine.check()
        todo = [0, 0, 0]
        for seq in world.machine.batcher.sequences.values():
            todo[seq.ask.priority] += seq.queued if seq.state != "decode" else 0
        assert all(0 <= ours <= whole for ours, whole in zip(world.machine.backlog.tokens, todo, strict=True))
        waits = any(seq.state == "waiting" for seq in world.machine.batcher.sequences.values())
        assert waits or world.machine.backlog.tokens == todo, "exact, but for those that wait"
    while world.turn():
        world.machine.check()
    assert world.machine.backlog.tokens == [0, 0, 0]


def test_hits_and_chunks_are_not_ahead_of_anybody() -> None:
    world = World()
    system = [1] * 16
    world.submit([*system, 2, 3])
    world.plan()
    assert world.said.backlog_tokens == (0, 18, 0)
    world.turn() if world.step is None else world.machine.handle(10, world.runner.advance(world.step, 1))
    world.plan()
    assert world.said.backlog_tokens == (0, 6, 0), "a chunk of 12 is done"
    world.machine.handle(20, world.runner.advance(world.step, 1))  # type: ignore[arg-type]
    world.submit([*system, 4, 5, 6])
    assert world.machine.backlog.tokens == [0, 3, 0], "its system prompt is cached"


def test_a_stampede_for_one_new_prefix_counts_it_once() -> None:
    world = World()
    for n in range(10):
        world.submit([1] * 40 + [n, n])
    assert world.machine.backlog.tokens == [0, 42 + 9 * 2, 0]
    computed = 0
    while world.turn():
        computed += world.step.shape.prefill_tokens if world.step else 0
    assert computed == 42 + 9 * 2, "and it is computed once"


def test_a_stampede_whose_first_is_gone_is_not_made_light_of_for_long() -> None:
    world = World()
    first = world.submit([1] * 40 + [2])
    world.submit([1] * 40 + [3])
    world.tell(Abort(first))
    assert world.machine.backlog.tokens == [0, 1, 0], "estimated when it came"
    world.plan()
    assert world.machine.backlog.tokens == [0, 41, 0], "exact from the plan on that takes it in"

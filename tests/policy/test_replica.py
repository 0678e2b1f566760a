"""The replica machine in a world that knows every token and what every KV block holds (``worlds.ReplicaWorld``).

Mutations it caught:
"""

from __future__ import annotations

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.config import BatcherConfig, PrefixConfig, ReplicaConfig
from tests.policy.worlds import NEVER_NS, ReplicaWorld

SIZE = 3  # tokens a block: small, so that borders, full blocks and rests all come often


def shape(
    step_tokens: int = 12, slots: int = 4, reserved_slots: int = 1, reserved_blocks: int = 3, multi: int = 8,
    blocks: int = 40, pinned: int = 4, ttl_s: float = 1e-5, enabled: bool = True,
) -> ReplicaConfig:
    return ReplicaConfig(
        batcher=BatcherConfig(
            step_tokens=step_tokens, slots=slots, reserved_slots=reserved_slots, reserved_blocks=reserved_blocks,
            max_multi_steps=multi,
        ),
        prefix=PrefixConfig(enabled=enabled, block_tokens=SIZE, blocks=blocks, pinned_blocks=pinned, pin_ttl_s=ttl_s),
    )


def prompt(family: int, question: int, length: int) -> list[int]:
    """A system prompt that a family shares, and a question that comes again and again."""
    return [100 + family] * (7 * family) + [1000 * question + i for i in range(length)]


def ask(world: ReplicaWorld, family: int, question: int, length: int, tenant: str, follow_up: int, **more: int) -> None:
    tokens = prompt(family, question, length)
    if follow_up < len(world.finished):  # the same conversation goes on
        tenant, tokens = world.finished[follow_up][0], world.finished[follow_up][1] + [question]
    late_ns, within_ns = more.pop("late_ns"), more.pop("within_ns")
    world.submit(
        tokens, tenant=tenant, late_ns=late_ns, start_by_ns=world.now_ns + within_ns if within_ns else NEVER_NS,
        endless=bool(more.pop("endless")), **more,
    )


class ReplicaMachine(RuleBasedStateMachine):
    """Short traces that shrink well."""

    @initialize(
        step_tokens=st.sampled_from([4, 9, 30]), slots=st.integers(2, 4), reserved_slots=st.integers(0, 1),
        reserved_blocks=st.sampled_from([0, 3]), multi=st.sampled_from([1, 8]), blocks=st.sampled_from([18, 26, 40]),
        pinned=st.sampled_from([0, 3]), enabled=st.sampled_from([True, True, True, False]),
    )
    def start(self, **config: int) -> None:
        self.world = ReplicaWorld(shape(**config))  # type: ignore[arg-type]

    @rule(
        family=st.integers(0, 3), question=st.integers(0, 2), length=st.integers(1, 14), tenant=st.sampled_from("ab"),
        follow_up=st.integers(0, 15), max_tokens=st.integers(1, 12), priority=st.integers(0, 2),
        pinned_blocks=st.integers(0, 3), late_ns=st.sampled_from([0, 0, 5_000]),
        within_ns=st.sampled_from([0, 0, 3_000]), endless=st.integers(0, 1),
    )
    def submit(self, **asked: int) -> None:
        ask(self.world, **asked)  # type: ignore[arg-type]

    @rule(want=st.sampled_from([1, 1, 3, 99]))
    def turn(self, want: int) -> None:
        self.world.turn(want)

    @rule(fault=st.sampled_from(["step", "nan"]), pick=st.integers(0, 3), want=st.sampled_from([1, 4]))
    def turn_badly(self, fault: str, pick: int, want: int) -> None:
        self.world.turn(want, fault, pick)

    @rule(back=st.integers(0, 8))
    def abort(self, back: int) -> None:
        self.world.abort(self.world.submitted - back)

    @rule(ns=st.sampled_from([1, 1_000, 20_000]))
    def time_passes(self, ns: int) -> None:
        self.world.now_ns += ns

    @precondition(lambda self: len(self.world.endings) > 20)
    @rule()
    def drain(self) -> None:
        self.world.drain()

    @invariant()
    def check(self) -> None:
        if hasattr(self, "world"):
            self.world.check()

    def teardown(self) -> None:
        if hasattr(self, "world") and self.world.step is None:  # else a step has failed already
            self.world.finish()
            self.world.check()


ReplicaMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestReplica = ReplicaMachine.TestCase


def wander(world: ReplicaWorld, seed: int, steps: int, crowd: int, drain_at: int | None = None) -> None:
    """A long random trace: bursts, lulls, aborts, faults; every step checked."""
    r = random.Random(seed)
    for step in range(steps):
        world.now_ns += r.choice([1, 500, 1_000, 30_000])
        for _ in range(r.choice([0, 0, 1, 2, 3]) if len(world.open) < crowd else 0):
            ask(
                world, family=r.randrange(4), question=r.randrange(3), length=r.randrange(1, 15), tenant=r.choice("aab"),
                follow_up=r.randrange(24), max_tokens=r.randrange(1, 13), priority=r.choice([0, 1, 1, 2, 2]),
                pinned_blocks=r.choice([0, 0, 2]), late_ns=r.choice([0, 0, 0, 5_000]),
                within_ns=r.choice([0, 0, 0, 10_000]), endless=r.randrange(2),
            )
        if r.random() < 0.15:
            world.abort(r.randrange(world.submitted + 2) if r.random() < 0.1 or not world.open else r.choice([*world.open]))
        if step == drain_at:
            world.drain()
        world.turn(r.choice([1, 99]), fault=r.choice(["step", "nan"]) if r.random() < 0.05 else "", pick=r.randrange(4))
        world.check()


@pytest.mark.parametrize("seed", range(6))
def test_long_random_traces(seed: int) -> None:
    r = random.Random(seed)
    world = ReplicaWorld(
        shape(
            step_tokens=r.choice([8, 16, 40]), slots=r.choice([4, 8]), reserved_slots=r.choice([0, 1, 2]),
            reserved_blocks=r.choice([0, 4]), blocks=r.choice([30, 45, 60]), multi=r.choice([4, 16]),
            pinned=r.choice([0, 4, 6]), ttl_s=r.choice([1e-5, 1e-3]),
        )
    )
    wander(world, seed, 700, crowd=r.choice([6, 14, 30]), drain_at=660)
    world.finish(want=99)
    world.check()
    print(world.counts)

"""The replica machine in a world that knows every token and what every KV block holds (``worlds.ReplicaWorld``).

Mutations it caught:
- shape: budget without the decode rows; area of half a context; decode context not lowered at an end
- order: no priority; no age; equals preempt each other; the most important row pays; preempted ones queue at the back
- reserve: slots or blocks given to all; reserved blocks kept from critical too; one slot too many
- tables: border one step late or early; next border late; short by a block; hits counted into computed wrongly
- content: partial blocks published; names kept after a failed step, or after nan; hits up to the last token
- runner: preempted ones not stopped; stale calendar entries after a preemption (epoch)
- books: outputs, known, computed, queued tokens or unseen lost or leaked; recomputation a hit; the end token an output
- steps: many while something waits; beyond a border, a limit or the cap
- ends: none on abort; two; deadline at its very instant, or for what has run; drain ignored; what cannot fit accepted
- failed step: its tokens counted; its stops or starts not said again; the group's order is another than the step's; a
  cleared row stays in the next trial; newcomers in a trial; a sharer blamed, or left with what nobody wrote; the whole
  batch fails; silent readers of nan left as they are
- pressure: every time; once only; not the oldest; no acknowledgement; evictable blocks not free; order by string hash
- pins: never set; never let go
"""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.config import BatcherConfig, FairnessConfig, PrefixConfig, ReplicaConfig
from engine.policy.replica import Replica
from tests.policy.fair_world import FairWorld
from tests.policy.worlds import NEVER_NS, ReplicaWorld, digest_of, replayed_elsewhere

SIZE = 3  # tokens a block: small, so that borders, full blocks and rests all come often


def shape(
    step_tokens: int = 12, slots: int = 4, reserved_slots: int = 1, reserved_blocks: int = 3, multi: int = 8,
    blocks: int = 40, pinned: int = 4, ttl_s: float = 1e-5, enabled: bool = True, fair: bool = True,
) -> ReplicaConfig:
    return ReplicaConfig(
        batcher=BatcherConfig(
            step_tokens=step_tokens, slots=slots, reserved_slots=reserved_slots, reserved_blocks=reserved_blocks,
            max_multi_steps=multi,
        ),
        prefix=PrefixConfig(enabled=enabled, block_tokens=SIZE, blocks=blocks, pinned_blocks=pinned, pin_ttl_s=ttl_s),
        fairness=FairnessConfig(enabled=fair), weights={"b": 3.0},
    )


def world_of(config: ReplicaConfig) -> ReplicaWorld:
    """With fairness off, age alone decides, whoever asks."""
    return FairWorld(config) if config.fairness.enabled else ReplicaWorld(config)


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
        pinned=st.sampled_from([0, 3]), enabled=st.sampled_from([True, True, True, False]), fair=st.booleans(),
    )
    def start(self, **config: int) -> None:
        self.world = world_of(shape(**config))  # type: ignore[arg-type]

    @rule(
        family=st.integers(0, 3), question=st.integers(0, 2), length=st.integers(1, 14), tenant=st.sampled_from("abc"),
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


ReplicaMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestReplica = ReplicaMachine.TestCase


def wander(world: ReplicaWorld, seed: int, steps: int, crowd: int, drain_at: int | None = None) -> None:
    """A long random trace: bursts, lulls, aborts, faults; every step checked."""
    r = random.Random(seed)
    for step in range(steps):
        world.now_ns += r.choice([1, 500, 1_000, 30_000])
        for _ in range(r.choice([0, 0, 1, 2, 3]) if len(world.open) < crowd else 0):
            ask(
                world, family=r.randrange(4), question=r.randrange(3), length=r.randrange(1, 15),
                tenant=r.choice("aabc"), follow_up=r.randrange(24), max_tokens=r.randrange(1, 13),
                priority=r.choice([0, 1, 1, 2, 2]), pinned_blocks=r.choice([0, 0, 2]),
                late_ns=r.choice([0, 0, 0, 5_000]), within_ns=r.choice([0, 0, 0, 10_000]), endless=r.randrange(2),
            )
        if r.random() < 0.15:
            world.abort(r.choice([*world.open] if world.open and r.random() < 0.9 else range(world.submitted + 2)))
        if step == drain_at:
            world.drain()
        world.turn(r.choice([1, 99]), fault=r.choice(["step", "nan"]) if r.random() < 0.05 else "", pick=r.randrange(4))
        world.check()


@pytest.mark.parametrize("fair", [True, False])
@pytest.mark.parametrize("seed", range(6))
def test_long_random_traces(seed: int, fair: bool) -> None:
    r = random.Random(seed)
    world = world_of(
        shape(
            step_tokens=r.choice([8, 16, 40]), slots=r.choice([4, 8]), reserved_slots=r.choice([0, 1, 2]),
            reserved_blocks=r.choice([0, 4]), blocks=r.choice([30, 45, 60]), multi=r.choice([4, 16]),
            pinned=r.choice([0, 4, 6]), ttl_s=r.choice([1e-5, 1e-3]), fair=fair,
        )
    )
    wander(world, seed, 1_000, crowd=r.choice([6, 14, 30]), drain_at=960)
    world.finish(want=99)
    world.check()
    for event in ("hit", "resumed mid-answer", "preempted prefill", "step failed", "end failed", "abort decode"):
        assert world.counts[event], f"the trace has been through it: {event}"


def test_quiet_traces_decode_several_steps_at_once() -> None:
    world = FairWorld(shape(slots=3, blocks=40, multi=16))
    wander(world, 0, 400, crowd=2)
    world.finish(want=99)
    world.check()
    assert world.counts["multi"] > 20


# ---------------------------------------------------------------- every state, by hand


def quiet(**config: int) -> ReplicaWorld:
    return ReplicaWorld(shape(**{"reserved_slots": 0, "reserved_blocks": 0, "pinned": 0, **config}))


def test_abort_in_every_state() -> None:
    world = quiet(slots=2, step_tokens=6, blocks=12)
    decoding = world.submit([1, 2], max_tokens=9, endless=True)
    world.turn()
    prefilling = world.submit([3] * 12)
    waiting = world.submit([4] * 3)
    world.turn()
    assert world.open[decoding].decoding and world.open[prefilling].running and not world.open[waiting].running
    world.submit([5] * 20, priority=0)
    world.turn()
    preempted = prefilling
    assert world.open[preempted].preemptions == 1 and not world.open[preempted].running
    for sid in (waiting, preempted, decoding):
        world.abort(sid)
        world.check()
        world.abort(sid)  # has just ended: nothing more
    assert [world.endings[sid].reason for sid in (waiting, preempted, decoding)] == ["aborted"] * 3
    world.abort(77)
    world.finish()
    world.check()


def test_abort_while_prefilling_leaves_what_was_computed_to_be_found() -> None:
    world = quiet(step_tokens=6, blocks=12)
    first = world.submit([1] * 12)
    world.turn()
    world.abort(first)
    second = world.submit([1] * 12)
    world.finish()
    assert world.endings[second].cached_tokens == 6
    assert world.endings[second].computed_tokens == 6


def test_a_deadline_is_for_those_that_no_step_has_held() -> None:
    world = quiet(slots=1, blocks=12)
    world.now_ns = 100
    held = world.submit([1] * 3, max_tokens=6, endless=True, start_by_ns=100, late_ns=50)
    just = world.submit([2] * 3, start_by_ns=200)
    late = world.submit([3] * 3, start_by_ns=199)
    world.turn()
    world.now_ns = 200
    critical = world.submit([4] * 3, priority=0)
    world.turn()
    assert world.endings[late].reason == "deadline" and world.endings[late].queue_ns == 0
    world.now_ns = 201
    world.turn()
    assert world.endings[just].reason == "deadline"
    world.now_ns = 9_999
    world.finish()
    assert world.endings[held].reason == "length", "put back long after its deadline, it still comes to its end"
    assert world.endings[held].preemptions == 1 and world.endings[held].queue_ns == 50
    assert world.endings[critical].queue_ns == 0


def test_drain_refuses_what_is_new_and_finishes_what_it_has() -> None:
    world = quiet(slots=2, blocks=12)
    has = [world.submit([n] * 4) for n in range(4)]
    world.turn()
    world.drain()
    new = world.submit([9] * 4)
    assert world.endings[new].reason == "draining"
    world.finish()
    assert {world.endings[sid].reason for sid in has} <= {"stop", "length"}


def test_what_can_never_fit_is_refused_at_once() -> None:
    world = ReplicaWorld(shape(blocks=20, pinned=4, reserved_blocks=3))
    fits = world.submit([1] * 30, max_tokens=9)  # 13 blocks of 3
    assert world.endings == {}
    world.submit([1] * 30, max_tokens=10)
    assert [e.reason for e in world.endings.values()] == ["failed"]
    world.finish()
    assert world.endings[fits].output_tokens


def test_pressure_names_the_oldest_even_when_gateways_are_heard_out_of_order() -> None:
    world = quiet(slots=1, blocks=20)
    world.now_ns = 1_000
    world.submit([1] * 3, max_tokens=9, endless=True)
    world.submit([2] * 3, late_ns=100)
    world.submit([3] * 3, late_ns=700)
    world.submit([4] * 3, late_ns=300)
    world.turn()  # the oldest runs
    pressure = world.journal[-2][2][-1]
    assert (pressure.waiting[0].count, pressure.waiting[0].oldest_ns) == (3, 700)
    world.finish()


def test_a_step_that_raises_alone_takes_its_prefix_along_but_not_those_that_sat_it_out() -> None:
    world = quiet(slots=3, step_tokens=6, blocks=30)
    first = world.submit([1] * 30)
    world.turn()
    waits = world.submit([2] * 9, priority=2)
    world.turn(fault="step")
    assert world.endings[first].reason == "failed" and world.endings[first].computed_tokens == 6
    again = world.submit([1] * 30)
    world.finish()
    assert world.endings[again].cached_tokens == 6, "only what the first step wrote"
    assert world.endings[waits].reason in ("stop", "length")


def test_a_step_that_raises_once_costs_two_trials_and_nobodys_answer() -> None:
    world, calm = (quiet(slots=8, step_tokens=40, blocks=60) for _ in range(2))
    for each in (world, calm):
        for n in range(8):
            each.submit([10 + n] * 4, max_tokens=9, endless=True)
        each.turn()
        each.turn()
    world.turn(fault="step")
    world.finish()
    calm.finish()
    assert world.answers == calm.answers and set(world.answers) == set(range(8))
    assert {end.reason for end in world.endings.values()} == {"length"}
    assert (world.counts["trial"], world.counts["step failed"]) == (2, 1)
    assert {end.computed_tokens for end in world.endings.values()} == {4}, "no prompt is computed twice"


def test_nobody_is_blamed_for_a_prefix_that_another_was_to_write_in_the_same_step() -> None:
    world = quiet(slots=4, step_tokens=40, blocks=40)
    owner = world.submit([1] * 7)
    sharer = world.submit([1] * 6 + [2])
    world.poison[sharer] = 6
    world.turn()
    assert world.counts["misled"] == 1 and not world.endings
    world.finish()
    assert world.endings[owner].reason in ("stop", "length")
    assert (world.endings[sharer].reason, world.endings[sharer].output_tokens) == ("failed", 0)


def test_those_under_suspicion_may_leave_and_the_rest_goes_on() -> None:
    world = quiet(slots=4, step_tokens=40, blocks=40)
    sids = [world.submit([10 + n] * 4, max_tokens=6, endless=True) for n in range(4)]
    world.turn(fault="step")
    world.turn()  # the first half is cleared
    for sid in sids[2:]:
        world.abort(sid)
    late = world.submit([9] * 4)
    world.finish()
    assert [world.endings[sid].reason for sid in sids] == ["length", "length", "aborted", "aborted"]
    assert world.endings[late].reason in ("stop", "length")


def test_on_hardware_that_fails_every_step_everybody_has_failed_soon() -> None:
    world = quiet(slots=8, step_tokens=40, blocks=60)
    for n in range(19):
        world.submit([10 + n] * 4, max_tokens=9)
    turns = 0
    while world.turn(fault="step"):
        turns += 1
    assert turns <= 2 * 19, "twice as many steps as sequences"
    assert [end.reason for end in world.endings.values()] == ["failed"] * 19
    world.finish()


@settings(max_examples=120, deadline=None)
@given(seed=st.integers(0, 10**6), fair=st.booleans(), multi=st.sampled_from([1, 8]), tight=st.booleans())
def test_culprits_fail_and_their_neighbours_say_what_they_would_have_said(
    seed: int, fair: bool, multi: int, tight: bool
) -> None:
    r = random.Random(seed)
    config = shape(
        step_tokens=r.choice([10, 24, 60]), slots=r.choice([3, 8]), reserved_slots=0, reserved_blocks=0, multi=multi,
        blocks=24 if tight else 90, pinned=0, fair=fair, enabled=r.random() < 0.8,
    )
    world, calm = world_of(config), world_of(config)
    asked: list[tuple[int, int]] = []
    for _ in range(r.randrange(2, 14)):
        tokens = prompt(r.randrange(3), r.randrange(2), r.randrange(1, 12))
        more = {"max_tokens": r.randrange(1, 9), "priority": r.randrange(3), "tenant": r.choice("ab"), "endless": True}
        sid = world.submit(tokens, **more)  # type: ignore[arg-type]
        assert calm.submit(tokens, **more) == sid  # type: ignore[arg-type]
        asked.append((len(tokens), sid))
    for length, sid in r.sample(asked, r.randrange(1, min(4, len(asked)) + 1)):
        world.poison[sid] = r.randrange(length + 6)
    while world.turn(99):
        world.now_ns += 1_000
        world.check()
        assert world.steps + world.counts["step failed"] < 2_000, "it ends"
    world.finish()
    calm.finish()
    for length, sid in asked:
        said, whole = world.answers.get(sid, []), calm.answers[sid]
        if world.endings[sid].reason == "failed":
            assert sid in world.poison, "only a culprit fails"
            assert said == whole[: len(said)]
            assert not said or world.poison[sid] == length + len(said) - 1
        else:
            assert said == whole, "neighbours say the same"
            at = world.poison.get(sid, -1)
            assert not length - 1 <= at < length + len(whole) - 1, "a culprit that got so far; caches hold no more"
    failed = sum(end.reason == "failed" for end in world.endings.values())
    if not tight and config.prefix.enabled and not world.counts["misled"]:
        depth = (config.batcher.slots - 1).bit_length()
        assert world.counts["step failed"] <= failed * (depth + 1), "one look for each halving"
        assert world.counts["trial"] <= failed * 2 * depth, "two trials for each halving"


def test_a_sequence_that_gave_nan_leaves_nothing_to_be_found() -> None:
    world = quiet(blocks=30, step_tokens=30)
    bad = world.submit([1] * 9 + [2])
    world.turn(fault="nan")
    assert (world.endings[bad].reason, world.endings[bad].output_tokens) == ("failed", 0)
    good = world.submit([1] * 9 + [3])
    world.finish()
    assert world.endings[good].cached_tokens == 0


def test_who_has_read_what_gave_nan_begins_again_and_nothing_of_it_is_found() -> None:
    world = quiet(blocks=60, step_tokens=20)
    bad = world.submit([1] * 6 + [2])
    reads = world.submit([1] * 6 + [3] * 20)  # shares two blocks of this very step, and fills others with what it read
    world.turn(fault="nan")
    assert world.endings[bad].reason == "failed" and world.counts["put back in doubt"] == 1
    third = world.submit([1] * 6 + [3] * 20)
    world.finish()
    for sid in (reads, third):
        assert world.endings[sid].reason in ("stop", "length")
    assert world.endings[reads].preemptions == 1


def test_a_system_prompt_is_pinned_from_its_first_prefill_until_nobody_asks() -> None:
    world = quiet(blocks=24, pinned=2, ttl_s=1e-3)
    system = [1] * (2 * SIZE)
    world.submit([*system, 5], pinned_blocks=2)
    world.turn()
    assert world.machine.stats().prefix.pinned == 2
    for n in range(6):
        world.submit([10 + n] * 40, pinned_blocks=1)  # a flood, with pins of its own beyond the cap
    world.finish()
    world.now_ns = 900_000
    again = world.submit([*system, 6], pinned_blocks=2)
    world.finish()
    assert world.endings[again].cached_tokens == 2 * SIZE
    world.now_ns = 1_800_000  # renewed at 900,000
    world.turn()
    assert world.machine.stats().prefix.pinned == 2
    world.now_ns = 2_000_000
    world.turn()
    assert world.machine.stats().prefix.pinned == 0


def test_a_failed_step_pins_nothing() -> None:
    world = quiet(blocks=20, pinned=2)
    world.submit([1] * 7, pinned_blocks=2)
    world.submit([2] * 4)
    world.plan()
    assert world.machine.stats().prefix.pinned == 2
    world.run(fault="step")
    assert world.machine.stats().prefix.pinned == 0
    world.finish()
    assert {end.reason for end in world.endings.values()} <= {"stop", "length"}


def test_the_same_events_give_the_same_actions_whatever_the_hash_seed() -> None:
    config = shape(slots=4, blocks=30)
    world = FairWorld(config)
    wander(world, 3, 250, crowd=14)
    again = Replica(config)
    assert all(again.handle(now_ns, event) == actions for now_ns, event, actions in world.journal)
    assert {replayed_elsewhere(Replica, config, world.journal, seed) for seed in (1, 2)} == {digest_of(world.journal)}

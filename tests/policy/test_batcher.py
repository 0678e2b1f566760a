"""The batcher's promises one by one, each in a scene of its own; the world checks every step besides.

Mutations it caught:
- prompt blocks not published when planned (stampede); generated blocks not published (conversation)
- no preemption for a slot; none for blocks; blocks that only victims share not counted; hits in victims counted twice
- victims from the wrong end; a growing row put back the most important
- a blocked head stops what is in prefill (a deadlock); a Grow told of a table that is gone
- reserved slots or blocks for all; for nobody; critical rows counted wrongly
- a preempted sequence loses outputs, known tokens or its place; its blocks are not given back
- many steps at once: limits or borders ignored, or while something waits; decode context settled once
"""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config import BatcherConfig, PrefixConfig, ReplicaConfig
from engine.events import RunStep
from tests.policy.worlds import ReplicaWorld

SIZE = 3  # tokens a block


def world_of(
    slots: int = 4, step_tokens: int = 30, blocks: int = 40, reserved_slots: int = 0, reserved_blocks: int = 0,
    multi: int = 8, pinned: int = 0, reserve: str = "none", watermark: float = 0, age_ms: int = 0,
    hold_back_tokens: int = 32,
) -> ReplicaWorld:
    return ReplicaWorld(
        ReplicaConfig(
            batcher=BatcherConfig(
                step_tokens=step_tokens, slots=slots, reserved_slots=reserved_slots, reserved_blocks=reserved_blocks,
                max_multi_steps=multi, reserve=reserve, watermark=watermark, age_ms=age_ms,  # type: ignore[arg-type]
                hold_back_tokens=hold_back_tokens,
            ),
            prefix=PrefixConfig(block_tokens=SIZE, blocks=blocks, pinned_blocks=pinned, pin_ttl_s=1e6),
        )
    )


def running(world: ReplicaWorld) -> list[int]:
    return [sid for sid, asked in world.open.items() if asked.running]


# ---------------------------------------------------------------- the stampede


@pytest.mark.parametrize("step_tokens", [16, 64, 1024])  # many steps, some, or a single one
@pytest.mark.parametrize("arrive_together", [True, False])
def test_a_stampede_computes_a_new_system_prompt_once(step_tokens: int, arrive_together: bool) -> None:
    world = world_of(slots=8, step_tokens=step_tokens, blocks=200)
    system = [7] * (20 * SIZE + 1)  # 20 full blocks and a rest
    sids = []
    for n in range(50):
        sids.append(world.submit([*system, 1000 + n], max_tokens=2))
        if not arrive_together and n % 3 == 0:
            world.turn()
    world.finish()
    computed = sum(world.endings[sid].computed_tokens for sid in sids)
    assert computed == 20 * SIZE + 50 * 2, "the full blocks once, each one's own two tokens every time"
    assert sum(world.endings[sid].cached_tokens for sid in sids) == 49 * 20 * SIZE
    stats = world.machine.stats().prefix
    assert (stats.query_tokens, stats.hit_tokens) == (50 * (20 * SIZE + 2), 49 * 20 * SIZE)


def test_a_step_shares_a_prefix_that_it_is_only_computing() -> None:
    world = world_of()
    world.submit([1] * 7)
    world.submit([1] * 7)
    world.turn()
    step = next(a for _, _, actions in world.journal for a in actions if isinstance(a, RunStep))
    assert [start.computed for start in step.start] == [0, 6]
    assert step.start[0].blocks[:2] == step.start[1].blocks[:2]
    assert step.shape.prefill_tokens == 7 + 1


def test_a_conversation_that_goes_on_finds_its_own_answer() -> None:
    world = world_of()
    world.submit([1] * 4, 8, endless=True)
    world.finish()
    [(_, said)] = world.finished
    second = world.submit([*said, 9, 9])
    world.finish()
    assert world.endings[second].cached_tokens == 9, "11 of the 12 tokens were computed: three full blocks"


# ---------------------------------------------------------------- critical waits for one step at most


def test_critical_preempts_for_a_slot_and_the_least_important_pays() -> None:
    world = world_of(slots=3)
    standard, old, young = (world.submit([n] * 4, 9, priority, endless=True) for n, priority in enumerate((1, 2, 2)))
    world.turn()
    world.now_ns += 1
    critical = world.submit([9] * 4, priority=0)
    world.turn()
    assert running(world) == [standard, old, critical]
    assert world.open[young].preemptions == 1
    world.finish()
    assert world.endings[critical].queue_ns == 0


def test_critical_preempts_for_blocks() -> None:
    world = world_of(slots=4, blocks=12)
    for n in range(3):
        world.submit([n] * 8, 4, priority=2, endless=True)
    world.turn()
    critical = world.submit([9] * 20, priority=0)
    world.turn()
    assert critical in running(world)
    assert len(running(world)) == 2, "no more of them are put back than it takes"
    world.finish()


def test_blocks_that_only_victims_share_come_free_with_the_last_of_them() -> None:
    world = world_of(slots=4, blocks=12)
    for n in range(2):
        world.submit([5] * 24 + [n], 4, priority=2, endless=True)  # 8 shared, 1 of its own each
    world.turn()
    critical = world.submit([9] * 30, priority=0)
    world.turn()
    assert running(world) == [critical]
    world.finish()


def test_what_a_victim_holds_for_the_newcomer_is_not_counted_twice() -> None:
    """A hit in a victim's table costs nothing while the victim runs and one block when it is gone."""
    world = world_of(slots=4, blocks=14)
    old = world.submit([1] * 15, 9, priority=0, endless=True)  # critical: no victim
    world.turn()
    victim = world.submit([5] * 15 + [1], 3, priority=2, endless=True)
    world.turn()
    world.submit([5] * 15 + [2] * 15, 3, priority=0)  # its five hits are the victim's: 5 more are missing
    world.turn()
    assert running(world) == [old, victim], "it could not have been taken in, so nobody paid for it"
    world.finish()


def test_reserved_slots_and_blocks_are_for_critical() -> None:
    world = world_of(slots=4, reserved_slots=1, reserved_blocks=4, blocks=20)
    standard = [world.submit([n] * 3, 9, endless=True) for n in range(4)]
    world.turn()
    assert running(world) == standard[:3]
    critical = world.submit([9] * 3, 2, priority=0, endless=True)
    world.turn()
    assert critical in running(world) and not any(world.open[s].preemptions for s in standard[:3])
    world.finish()
    big = world.submit([1] * 3 * 13, 9)
    small = world.submit([2] * 3 * 4, 2)  # 13 + 4 leave 3 of the 20: one too few
    world.turn()
    assert running(world) == [big]
    critical = world.submit([3] * 3 * 6, 2, priority=0)
    world.turn()
    assert running(world) == [big, critical]
    assert not world.open[small].running
    world.finish()


# ---------------------------------------------------------------- order and preemption


def test_a_preempted_sequence_comes_back_in_its_old_place_and_goes_on() -> None:
    world = world_of(slots=2)
    first = world.submit([1] * 4, 9, endless=True)
    second = world.submit([2] * 4, 9, endless=True)
    world.turn()
    world.turn()
    world.now_ns += 5
    later = world.submit([3] * 4, 9, endless=True)
    world.submit([4] * 4, 1, priority=0, endless=True)
    world.turn()
    assert running(world) == [first]  # critical has run and ended in this step
    assert (world.open[second].preemptions, world.open[second].outputs) == (1, 2)
    world.turn()
    assert running(world) == [first, second], "before the one that came later"
    world.finish()
    assert world.endings[second].output_tokens == 9 and len(world.answers[second]) == 9
    assert world.endings[second].computed_tokens == 4 + 6 - 3, "its first block was still there"
    assert world.endings[second].cached_tokens == 0, "its own recomputation is no hit"
    assert world.endings[later].preemptions == 0


def test_a_blocked_head_does_not_stop_what_is_in_prefill() -> None:
    """Sent earlier but heard later, as from a second gateway: it outranks what holds the blocks that it needs."""
    world = world_of(slots=4, step_tokens=6, blocks=12)
    world.now_ns = 100
    long = world.submit([1] * 30)
    world.turn()
    older = world.submit([2] * 30, late_ns=50)
    world.turn()
    assert world.open[long].computed == 12
    world.finish()
    assert world.endings[older].preemptions == world.endings[long].preemptions == 0


def test_a_blocked_head_stops_all_that_wait_behind_it() -> None:
    world = world_of(slots=4, blocks=12)
    world.submit([1] * 20, 9, endless=True)
    world.turn()
    blocked, small = world.submit([2] * 20), world.submit([3])
    world.turn()
    assert not world.open[blocked].running and not world.open[small].running
    world.finish()


def test_a_row_that_grew_and_was_put_back_and_taken_in_by_one_plan_has_only_its_new_table() -> None:
    world = world_of(slots=4, blocks=6)
    row = world.submit([5] * 7, 10, priority=2, endless=True)
    world.turn()
    twin = world.submit([5] * 6 + [1], 1)  # hits the row's two full blocks, gives nan: they lose their names
    world.turn(fault="nan", pick=1)
    assert world.endings[twin].reason == "failed"
    assert world.open[row].computed == 8
    world.turn()
    assert world.open[row].computed == 3 * SIZE == len(world.open[row].table) * SIZE  # at a border
    above = world.submit([5] * 7, 1, priority=1)  # needs the row's place, and publishes what the row then hits
    world.turn()
    assert world.endings[above].computed_tokens == 7
    assert world.open[row].preemptions == 1 and world.open[row].running and len(world.open[row].table) == 4
    world.finish()
    assert world.endings[row].output_tokens == 10


def test_the_least_important_row_pays_for_another_ones_growth() -> None:
    world = world_of(slots=3, blocks=6)
    first = world.submit([1] * 6, 9, endless=True)
    second = world.submit([2] * 6, 9, endless=True)
    for _ in range(3):
        world.turn()
    assert running(world) == [first, second]
    for _ in range(3):
        world.turn()
    assert running(world) == [first] and world.open[second].preemptions == 1
    world.finish()


# ---------------------------------------------------------------- several steps at once


def script(world: ReplicaWorld, seed: int, want: int) -> None:
    """Arrivals by step index, so that one step or many at a time meet the same world; now is the step index too."""
    r = random.Random(seed)
    arrivals = sorted(
        (r.randrange(120), r.randrange(3), r.randrange(1, 16), r.randrange(1, 20), r.randrange(3)) for _ in range(18)
    )
    while arrivals or world.open:
        world.now_ns = world.steps
        while arrivals and (arrivals[0][0] <= world.steps or not world.open):
            _, family, length, max_tokens, priority = arrivals.pop(0)
            world.submit([family] * 6 + list(range(length)), max_tokens, priority, endless=length % 2 == 0)
        wait = arrivals[0][0] - world.steps if arrivals else want
        world.turn(min(want, wait))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6))
def test_many_steps_at_once_are_as_many_single_steps(seed: int) -> None:
    one, many = (world_of(slots=4, blocks=30, reserved_slots=1, reserved_blocks=2, multi=8) for _ in range(2))
    script(one, seed, 1)
    script(many, seed, 99)
    assert one.steps == many.steps
    assert one.endings == many.endings
    assert one.answers == many.answers
    assert len(many.journal) < len(one.journal)
    pools = [world.pool.take((), world.pool.available) for world in (one, many)]
    assert pools[0] == pools[1], "blocks are given out in the same order afterwards"

"""A step's budget: against a search that tries every length, and on whole replicas with a cost of the step.

Mutations it caught: the rows' context ignored; the area of the chunk ignored; a row free; a token too few; the least
for every row; a head that has no time is taken in all the same.
"""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from engine.config import BatcherConfig, PrefixConfig, ReplicaConfig
from engine.events import Plan, RunStep, StepDone, StepShape, Submit
from engine.policy.budget import StepBudget
from engine.policy.replica import Replica
from engine.stepcost import StepCost
from engine.units import MS_NS
from tests.policy.test_replica import shape, wander, world_of

COST = StepCost(  # the bundled reference, rounded
    fixed_ns=56e6, prefill_token_ns=1.16e6, prefill_row_ns=2.8e6, decode_row_ns=3.07e6, decode_kv_ns=4548, area_ns=376
)
NANOSECONDS = st.floats(0, 1e7)
COSTS = st.builds(
    StepCost, fixed_ns=st.floats(0, 1e8), prefill_token_ns=NANOSECONDS, prefill_row_ns=NANOSECONDS,
    decode_row_ns=NANOSECONDS, decode_kv_ns=st.floats(0, 1e5), area_ns=st.floats(0, 1e4),
)


def config_of(
    cost: StepCost | None, step_tokens: int = 128, max_step_ms: int = 250, block_tokens: int = 16
) -> ReplicaConfig:
    return ReplicaConfig(
        batcher=BatcherConfig(step_tokens=step_tokens, max_step_ms=max_step_ms, step_margin=0.0),
        prefix=PrefixConfig(block_tokens=block_tokens), cost=cost,
    )


@settings(max_examples=300, deadline=None)
@given(
    cost=st.one_of(st.none(), COSTS), rows=st.integers(0, 40), context=st.integers(1, 900),
    step_tokens=st.integers(1, 200), max_step_ms=st.integers(1, 600), block_tokens=st.sampled_from([1, 16]),
    asks=st.lists(st.tuples(st.integers(0, 900), st.integers(1, 300)), min_size=1, max_size=5),
    criticals=st.integers(0, 5),
)
def test_a_chunk_is_the_longest_that_fits(
    cost: StepCost | None, rows: int, context: int, step_tokens: int, max_step_ms: int, block_tokens: int,
    asks: list[tuple[int, int]], criticals: int,
) -> None:
    budget = StepBudget(config_of(cost, step_tokens, max_step_ms, block_tokens), rows, rows * context)
    taken: list[tuple[int, int]] = []

    def step(more: tuple[int, int]) -> StepShape:
        chunks = [*taken, more]
        return StepShape(
            sum(n for _, n in chunks), len(chunks), rows, rows * context, sum(n * (2 * c + n) for c, n in chunks)
        )


    def behind_ns(more: tuple[int, int]) -> int:
        """What all rows that decode after the step add to the next one."""
        assert cost is not None
        chunks = [*taken, more]
        kv = rows * (context + 1) + sum(c + n for c, n in chunks)
        return cost.ns(StepShape(0, 0, rows + len(chunks), kv, 0)) - cost.ns(StepShape())

    for number, (computed, left) in enumerate(asks):
        critical = number < criticals
        if criticals and not critical:
            assert budget.most(computed, left) == 0 or not taken
            break
        room = max(0, step_tokens - rows - sum(n for _, n in taken))
        fits = [n for n in range(1, min(left, room) + 1)
                if cost is None or cost.ns(step((computed, n))) + (not critical) * behind_ns((computed, n))
                <= max_step_ms * MS_NS]
        want = max(fits, default=0)
        if not taken:
            want = max(want, min(left, room, block_tokens))
        assert budget.most(computed, left, critical) == want
        if want:
            budget.take(computed, want, critical)
            taken.append((computed, want))
    total = StepShape(
        sum(n for _, n in taken), len(taken), rows, rows * context, sum(n * (2 * c + n) for c, n in taken)
    )
    assert budget.shape(rows, rows * context) == total


@pytest.mark.parametrize("fair", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_random_traces_under_a_limit_of_time(seed: int, fair: bool) -> None:
    """The world checks each step against the formula: within the time, or no more than a block of one prompt."""
    r = random.Random(seed)
    config = shape(step_tokens=r.choice([16, 40]), slots=8, blocks=r.choice([45, 60]), fair=fair)
    config = replace(config, cost=COST, batcher=replace(config.batcher, max_step_ms=r.choice([62, 75, 100])))
    world = world_of(config)
    wander(world, seed, 500, crowd=14)
    world.finish(want=99)
    world.check()


def test_a_prompt_comes_to_its_end_even_when_the_rows_alone_take_too_long() -> None:
    config = shape(step_tokens=40, slots=8, blocks=60, fair=False, reserved_slots=0, reserved_blocks=0)
    world = world_of(replace(config, cost=COST, batcher=replace(config.batcher, max_step_ms=57, reserve="none")))
    for n in range(5):
        world.submit([n], 60, endless=True)
    for _ in range(5):
        world.turn()
    long = world.submit([9] * 30, 2, endless=True)
    for _ in range(10):
        world.turn()
    assert world.open[long].computed == 30 and len(world.open) == 6, "three tokens a step: a block's worth"
    world.finish()


def test_a_step_that_raised_costs_no_answer_where_time_is_bounded() -> None:
    config = shape(step_tokens=40, slots=8, blocks=60, fair=False, reserved_slots=0, reserved_blocks=0)
    world = world_of(replace(config, cost=COST, batcher=replace(config.batcher, max_step_ms=70)))
    for n in range(8):
        world.submit([n] * 4, 9, endless=True)
    for _ in range(6):
        world.turn()
    world.turn(fault="step")
    world.finish()
    assert {end.reason for end in world.endings.values()} == {"length"}


def test_no_step_is_longer_than_it_may_be_and_the_budget_is_used() -> None:
    """Eight rows decode while long prompts come without end: every step with a prompt is filled up to its time, less
    what the rows would add to a critical prompt's own step: at the end 8 rows and one, 3 ms each, over 4,000 tokens."""
    batcher = BatcherConfig(max_step_ms=150, step_margin=0.0, slots=16)
    config = replace(config_of(COST), batcher=batcher)
    replica = Replica(config)
    for sid in range(12):
        replica.handle(0, Submit(sid, sid, "t", "c", 1, 0, 1 << 62, 500, 24))
    left = dict.fromkeys(range(12), 500)
    longest = shortest = None
    while left:
        step = next(a for a in replica.handle(0, Plan()) if isinstance(a, RunStep))
        first = []
        for chunk in step.chunks:
            left[chunk.sid] -= chunk.tokens
            if not left[chunk.sid]:
                del left[chunk.sid]
                first.append(chunk.sid)
        took_ns = COST.ns(step.shape)
        longest = max(longest or took_ns, took_ns)
        if left:
            shortest = min(shortest or took_ns, took_ns)
        if len(left) < 5:
            break  # before the first answers end
        replica.handle(0, StepDone(1, first=tuple(first)))
    assert longest is not None and shortest is not None
    assert longest <= 150 * MS_NS and shortest >= 100 * MS_NS


def test_first_token_of_a_critical_prompt_is_within_the_step_in_flight_and_its_own() -> None:
    """Whenever it comes: its unloaded time plus ``max_step_ms`` at most, while others' prompts have no end."""
    config = replace(config_of(COST), batcher=BatcherConfig(max_step_ms=250, slots=24, step_tokens=512))
    rows, prompt, sid = 12, 40, 1000
    for seed in range(6):
        rng = random.Random(seed)
        replica = Replica(config)
        for number in range(rows):
            replica.handle(0, Submit(number, number, "t", "c", 1, 0, 1 << 62, 16, 400))
        for number in range(rows, rows + 6):
            replica.handle(0, Submit(number, number, "t", "c", 1, 0, 1 << 62, 400, 400))
        left = dict.fromkeys(range(rows), 16) | dict.fromkeys(range(rows, rows + 6), 400)
        comes_after, waited_ns, came = rng.randint(2, 9), 0, False
        for turn in range(60):
            step = next(a for a in replica.handle(0, Plan()) if isinstance(a, RunStep))
            took_ns = COST.ns(step.shape)
            first = []
            for chunk in step.chunks:
                left[chunk.sid] -= chunk.tokens
                if not left[chunk.sid]:
                    first.append(chunk.sid)
            waited_ns += took_ns if came else 0
            if sid in first:
                break
            replica.handle(0, StepDone(1, first=tuple(first)))
            if turn == comes_after:  # just after this step began: it waits for all of it
                replica.handle(0, Submit(sid, sid, "t", "pay", 0, 0, 1 << 62, prompt, 4))
                left[sid], came, waited_ns = prompt, True, took_ns
        unloaded_ns = COST.ns(StepShape(prompt, 1, 0, 0, prompt * prompt))
        assert came and sid in first
        assert waited_ns <= unloaded_ns + 250 * MS_NS

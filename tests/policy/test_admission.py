"""Who is taken in, and what stays free: ``reserve``, watermark, aging and hold-back on whole replicas.

``ReplicaWorld`` and ``FairWorld`` work out at every step what must be free, who has aged and who may let whom go first;
here are random traces through all settings, and the promises that follow.

Mutations it caught:
- reserve: its own part forgotten; not lowered at an end; never jumps, never decays, jumps for a priority's victims too
- watermark: for nobody; for critical too; with nothing else running (liveness)
- aging: never; to critical; too early after a preemption; only the last wait counts; waits not added up
"""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from engine.config import BatcherConfig, FairnessConfig, PrefixConfig, ReplicaConfig
from tests.policy.fair_world import FairWorld
from tests.policy.test_replica import shape, wander, world_of
from tests.policy.worlds import ReplicaWorld

SIZE = 4  # tokens a block


def world(
    slots: int = 4, step_tokens: int = 64, blocks: int = 40, reserved_blocks: int = 0, fair: bool = True, **more: object
) -> ReplicaWorld:
    config = ReplicaConfig(
        batcher=replace(
            BatcherConfig(
                step_tokens=step_tokens, slots=slots, reserved_slots=0, reserved_blocks=reserved_blocks, watermark=0,
                reserve="none",
            ),
            **more,
        ),
        prefix=PrefixConfig(block_tokens=SIZE, blocks=blocks, pinned_blocks=0),
        fairness=FairnessConfig(enabled=fair),
    )
    return FairWorld(config) if fair else ReplicaWorld(config)


def running(where: ReplicaWorld) -> list[int]:
    return [sid for sid, asked in where.open.items() if asked.running]


# ---------------------------------------------------------------- every setting, at random


@pytest.mark.parametrize("fair", [True, False])
@pytest.mark.parametrize("reserve", ["full", "ratio", "none"])
@pytest.mark.parametrize("seed", range(3))
def test_random_traces_with_everything_on(seed: int, reserve: str, fair: bool) -> None:
    r = random.Random(seed)
    config = shape(
        step_tokens=r.choice([8, 16, 40]), slots=r.choice([4, 8]), reserved_slots=r.choice([0, 1]),
        reserved_blocks=r.choice([0, 4]), blocks=r.choice([34, 45, 60]), fair=fair,
    )
    batcher = replace(
        config.batcher, reserve=reserve, watermark=r.choice([0.0, 0.05, 0.2]), age_ms=r.choice([1, 3]),
        hold_back_tokens=r.choice([3, 6, 32]), reserve_decay_steps=r.choice([20, 600]),
    )
    where = world_of(replace(config, batcher=batcher))
    wander(where, seed, 700, crowd=r.choice([14, 30]))
    where.finish(want=99)
    where.check()


def test_those_traces_meet_the_aged() -> None:
    aged = 0
    for seed in range(6):
        config = shape(step_tokens=10, slots=4, blocks=40, reserved_slots=0, fair=seed % 2 == 0)
        where = world_of(replace(config, batcher=replace(config.batcher, age_ms=1, hold_back_tokens=3)))
        wander(where, seed, 400, crowd=30)
        aged += where.counts["aged"]
    assert aged > 20


# ---------------------------------------------------------------- reserve


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), priority=st.integers(0, 2))
def test_with_full_nobody_is_ever_put_back_for_a_block_by_an_equal(seed: int, priority: int) -> None:
    r = random.Random(seed)
    where = world(slots=r.choice([3, 8]), blocks=r.choice([16, 30]), reserve="full", step_tokens=r.choice([8, 64]))
    for _ in range(80):
        where.now_ns += 1_000
        for _ in range(r.choice([0, 1, 3])):
            tokens = [r.randrange(3)] * r.randrange(8) + [r.randrange(9)] * r.randrange(1, 20)
            where.submit(tokens, r.randrange(1, 30), priority, tenant=r.choice("ab"), endless=True)
        where.turn(r.choice([1, 9]))
        where.check()
    where.finish()
    assert where.machine.stats().preemptions == 0


def test_full_respects_what_a_lower_priority_owes_or_puts_it_back_whole() -> None:
    where = world(slots=4, blocks=20, reserve="full")
    low = where.submit([1] * 8, 40, priority=2, endless=True)  # 12 blocks in the end
    where.turn()
    small = where.submit([2] * 8, 8, priority=0, endless=True)  # 4 blocks: beside it
    where.turn()
    assert running(where) == [low, small] and where.open[low].preemptions == 0
    large = where.submit([3] * 8, 30, priority=0, endless=True)  # 10: not beside both
    where.turn()
    assert running(where) == [small, large] and where.open[low].preemptions == 1
    where.finish()


def scarce(reserve: str, **more: object) -> ReplicaWorld:
    """Many short prompts with long answers, far more than there are blocks for."""
    where = world(slots=8, blocks=24, reserve=reserve, **more)  # type: ignore[arg-type]
    for n in range(40):
        where.submit([n] * 5, 30, endless=True)
    return where


def test_the_more_is_kept_the_fewer_are_put_back() -> None:
    preemptions, computed = {}, {}
    for reserve in ("none", "ratio", "full"):
        where = scarce(reserve)
        where.finish()
        preemptions[reserve] = where.machine.stats().preemptions
        computed[reserve] = sum(end.computed_tokens for end in where.endings.values())
    assert preemptions["full"] == 0 < preemptions["ratio"] < preemptions["none"]
    assert computed["full"] == 40 * 5 < computed["ratio"] < computed["none"], "what was put back is computed again"


def test_a_shortage_moves_the_share_up_and_good_steps_down() -> None:
    where = scarce("ratio", reserve_start=0.2, reserve_least=0.1, reserve_decay_steps=100, reserve_jump=0.5)
    seen = []
    while where.turn():
        where.now_ns += 1_000
        seen.append((where.machine.batcher.reserve.share, where.machine.stats().preemptions))
    assert seen[0][0] == 200_000, "nobody has decoded yet"
    ups = [(two[0] - one[0], two[1] - one[1]) for one, two in pairwise(seen)]
    assert any(victims for _, victims in ups)
    for up, victims in ups:
        assert (up > 0) == (victims > 0), "up with victims only"
        assert victims or up >= -10_000, "a hundredth a step"
    assert min(share for share, _ in seen) >= 100_000


def test_who_is_put_back_for_priority_says_nothing_of_the_share() -> None:
    where = world(slots=2, reserve="ratio", reserve_start=0.5)
    where.submit([1] * 4, 9, priority=2, endless=True)
    where.submit([2] * 4, 9, priority=2, endless=True)
    where.turn()
    where.submit([3] * 4, 9, priority=0, endless=True)
    where.turn()
    assert where.machine.stats().preemptions == 1
    assert where.machine.batcher.reserve.share < 500_000
    where.finish()


# ---------------------------------------------------------------- watermark


def test_the_watermark_stays_free_beside_others_but_not_for_critical() -> None:
    where = world(slots=8, blocks=20, watermark=0.25)  # 5 blocks
    first = where.submit([1] * 32, 4, endless=True)  # 8
    second = where.submit([2] * 28, 4, endless=True)  # 7: leaves 5
    third = where.submit([3] * 4, 4, endless=True)
    where.turn()
    assert running(where) == [first, second]
    critical = where.submit([4] * 12, 4, priority=0, endless=True)  # 3: less than that is left
    where.turn()
    assert running(where) == [first, second, critical] and not where.open[third].running
    where.finish()


def test_with_nothing_else_running_there_is_no_watermark() -> None:
    where = world(blocks=20, watermark=0.9)
    alone = where.submit([1] * 70, 4)
    where.turn()
    assert running(where) == [alone]
    where.finish()


def test_a_row_that_was_put_back_waits_for_the_watermark_too() -> None:
    """Else it would come back into the very shortage that put it out, compute its prompt, and be put out again."""
    victims = {}
    for watermark in (0.0, 0.25):
        where = world(slots=8, blocks=24, watermark=watermark)
        for n in range(30):
            where.submit([n] * 5, 24, endless=True)
        where.finish()
        victims[watermark] = where.machine.stats().preemptions
    assert victims[0.25] < victims[0.0]


# ---------------------------------------------------------------- aging


def flood(where: ReplicaWorld, turns: int, priority: int = 1, until: int | None = None) -> int:
    """Standard work without end, more than there are slots; the number of turns until ``until`` has ended."""
    for turn in range(turns):
        where.now_ns += 1_000_000  # a millisecond a step
        while sum(a.submit.priority == priority for a in where.open.values()) < 8:
            where.submit([turn, len(where.endings)] * 4, 6, priority, tenant="flood", endless=True)
        where.turn()
        if until is not None and until in where.endings:
            return turn
    return turns


def test_strict_priority_alone_starves_and_aging_bounds_it() -> None:
    where = world(age_ms=0)
    flood(where, 3)
    low = where.submit([9] * 8, 6, priority=2, tenant="low", endless=True)
    assert flood(where, 400, until=low) == 400, "strict: never"
    where = world(age_ms=50)
    flood(where, 3)
    low = where.submit([9] * 8, 6, priority=2, tenant="low", endless=True)
    took = flood(where, 400, until=low)
    assert 50 < took <= 50 + 3 * 6 + 6, "its patience, the next slot but for a tie or two, and its own answer"
    assert where.endings[low].preemptions == 0


def test_who_was_put_back_comes_back_and_is_not_put_back_by_standard_again() -> None:
    where = world(age_ms=50)
    low = where.submit([9] * 8, 30, priority=2, tenant="low", endless=True)
    where.turn()
    where.turn()
    took = flood(where, 400, until=low)
    assert where.endings[low].preemptions == 1 and where.counts["aged"] == 1
    assert 50 < took <= 50 + 3 * 6 + 30 + 6


def test_waits_add_up_over_preemptions() -> None:
    """Put back again and again before it is old enough in one go: it is the sum that counts."""
    where = world(age_ms=50, slots=1)
    low = where.submit([9] * 8, 90, priority=2, tenant="low", endless=True)
    rounds = 0
    while where.counts["aged"] == 0:
        rounds += 1
        assert rounds < 9
        where.turn()
        where.submit([rounds] * 4, 19, tenant="flood", endless=True)
        for _ in range(20):
            where.now_ns += 1_000_000
            where.turn()
    assert rounds == 3 and where.open[low].preemptions == 3
    where.finish()


def test_nobody_becomes_critical_however_long_it_waits() -> None:
    where = world(age_ms=1, slots=2)
    waits = [where.submit([9 + n] * 8, 6, priority=1 + n, tenant="low", endless=True) for n in range(2)]
    flood(where, 60, priority=0)
    assert all(not where.open[sid].running for sid in waits)
    assert [where.open[sid].priority for sid in waits] == [1, 1]
    critical = where.submit([7] * 4, 2, priority=0)
    where.finish()
    assert where.endings[critical].queue_ns < where.endings[waits[0]].queue_ns


def test_the_aged_take_turns_by_tenant_like_all_standard_work() -> None:
    """A heap of old sheddable work of one tenant is one more backlog, not a licence: others' turns come as before."""
    where = world(age_ms=20, slots=2)
    for n in range(30):
        where.submit([100 + n] * 8, 6, priority=2, tenant="crawler", endless=True)
    flood(where, 25)  # from now on all that are left have aged
    before = dict(where.charged)  # type: ignore[attr-defined]
    flood(where, 60)
    served = {who: tokens - before.get(who, 0) for who, tokens in where.charged.items()}  # type: ignore[attr-defined]
    ours, theirs = served[1, "crawler"], served[1, "flood"]
    assert abs(ours - theirs) <= 2 * max(8, 2 * 2 * 14), "the paper's bound, though one is older than all of the other"


# ---------------------------------------------------------------- hold-back


def test_an_older_one_heard_late_lets_the_owner_go_first() -> None:
    """From a second gateway: it is older than who is in the middle of computing the prefix that both need."""
    where = world(slots=8, step_tokens=16, blocks=200, fair=False, hold_back_tokens=8)
    where.now_ns = 100
    prefix = [7] * 76
    owner = where.submit([*prefix, 1], 2, endless=True)
    where.turn()
    older = [where.submit([*prefix, 10 + n], 2, late_ns=50, endless=True) for n in range(6)]
    where.finish()
    computed = sum(where.endings[sid].computed_tokens for sid in [owner, *older])
    assert computed == 76 + 7 * 1, "the prefix once, and a token each"
    assert where.counts["held back"] > 0


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=2, max_size=24), st.sampled_from([12, 16, 40]),
    st.booleans(),
)
def test_a_new_prefix_is_computed_once_whoever_comes_when(
    arrivals: list[tuple[int, bool]], step_tokens: int, fair: bool
) -> None:
    where = world(slots=8, step_tokens=step_tokens, blocks=400, hold_back_tokens=16, fair=fair)
    where.now_ns = 10_000
    sids, prefix = [], [7] * 96
    for n, (turns, late) in enumerate(arrivals):
        sids.append(where.submit([*prefix, 100 + n], 3, late_ns=9_000 + n if late else 0, endless=True))
        for _ in range(turns):
            where.now_ns += 1
            where.turn()
    where.finish()
    computed = sum(where.endings[sid].computed_tokens for sid in sids)
    assert computed <= 96 + len(sids) + step_tokens, "once, each one's own token, and a chunk at most"


@pytest.mark.parametrize("fair", [True, False])
def test_random_stampedes_heard_out_of_order(fair: bool) -> None:
    held = 0
    for seed in range(8):
        r = random.Random(seed)
        where = world(slots=8, step_tokens=r.choice([9, 16]), blocks=120, hold_back_tokens=r.choice([4, 8]), fair=fair)
        for turn in range(150):
            where.now_ns += 1_000
            for _ in range(r.choice([0, 0, 0, 1, 2])):
                prefix = [turn // 12] * r.choice([40, 60])
                where.submit(
                    [*prefix, r.randrange(99)], r.randrange(1, 5), r.choice([1, 1, 1, 2, 0]), tenant=r.choice("aab"),
                    late_ns=r.choice([0, 2_500, 7_500]), endless=True,
                )
            where.turn()
            where.check()
        where.finish()
        held += where.counts["held back"]
    assert held > 5


def test_the_one_held_back_goes_on_when_its_owner_is_gone() -> None:
    for how in ("abort", "step", "nan"):
        where = world(slots=8, step_tokens=16, blocks=200, fair=False, hold_back_tokens=16)
        where.now_ns = 100
        owner = where.submit([7] * 80, 2, endless=True)
        where.turn()
        older = where.submit([*[7] * 79, 8], 2, late_ns=50, endless=True)
        where.turn()
        assert not where.open[older].running, "held back"
        if how == "abort":
            where.abort(owner)
        else:
            where.turn(fault=how)
        where.finish()
        assert where.endings[older].reason == "length"
        assert where.endings[older].computed_tokens <= 80


def test_a_short_common_prefix_is_not_worth_waiting() -> None:
    where = world(slots=8, step_tokens=16, blocks=200, fair=False, hold_back_tokens=32)
    where.now_ns = 100
    where.submit([*[7] * 24, *[1] * 60], 2)
    where.turn()
    older = where.submit([*[7] * 24, *[2] * 10], 2, late_ns=50)
    where.turn()
    assert where.open[older].running
    where.finish()


def test_critical_waits_for_nobody() -> None:
    where = world(slots=8, step_tokens=16, blocks=200, hold_back_tokens=16)
    where.submit([7] * 80, 2)
    where.turn()
    critical = where.submit([*[7] * 79, 8], 2, priority=0)
    where.turn()
    assert where.open[critical].running
    where.finish()

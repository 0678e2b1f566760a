"""Tenants in the batcher: the paper's promises, measured on whole replicas by the account of the runner's own world.

``FairWorld`` checks at every step who is taken in and what every counter is; here are the promises that follow.

Mutations caught here and in ``test_replica.py``, which runs ``FairWorld`` on random traces; those with a star by the
promises alone, with ``FairWorld``'s own checks of order and counters taken out:
- order: no fairness at all*; age over all in prefill*; never age, or no priority; a head before or behind everybody
- room: not popped; not removed; the lowest priority first; a blocked head stops its own priority only
- prompts: free*; hits charged; charged again after a preemption; weight ignored
- outputs: free*; one step of many; a row a tenant; the first of a prefill free; rows that left; a failed step's
- tenants: no weights*; no lift*; known though fairness is off; weights not handed on by ``replica_config``
- plan: victims of a head still in its order; several steps at once while something waits
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config import (
    BatcherConfig,
    FairnessConfig,
    PrefixConfig,
    ReplicaConfig,
    Scenario,
    TenantConfig,
    replica_config,
)
from engine.policy.replica import Replica
from tests.policy.fair_world import FairWorld
from tests.policy.worlds import ReplicaWorld

SIZE = 4  # tokens a block


def config_of(
    slots: int = 4, step_tokens: int = 16, blocks: int = 64, reserved_slots: int = 0, multi: int = 8,
    weights: dict[str, float] | None = None, fairness: FairnessConfig = FairnessConfig(),  # noqa: B008, frozen
) -> ReplicaConfig:
    return ReplicaConfig(
        batcher=BatcherConfig(
            step_tokens=step_tokens, slots=slots, reserved_slots=reserved_slots, reserved_blocks=0,
            max_multi_steps=multi,
        ),
        prefix=PrefixConfig(block_tokens=SIZE, blocks=blocks, pinned_blocks=0),
        fairness=fairness, weights=weights or {},
    )


class Sale:
    """Asks for tenants, each prompt new to the prefix cache. One turn is a step, a microsecond after the last."""

    def __init__(self, config: ReplicaConfig) -> None:
        self.world = FairWorld(config)
        self.tenants: list[str] = []  # by sid

    def ask(self, tenant: str, prompt_tokens: int, max_tokens: int, priority: int = 1) -> int:
        self.tenants.append(tenant)
        prompt = [len(self.tenants)] * prompt_tokens
        return self.world.submit(prompt, max_tokens, priority, tenant=tenant, endless=True)

    def turn(self, steps: int = 1, check: bool = False) -> None:
        for _ in range(steps):
            self.world.now_ns += 1_000
            self.world.turn()
            if check:
                self.world.check()

    def waiting(self, tenant: str) -> int:
        return sum(not a.running for a in self.world.open.values() if a.submit.tenant == tenant)


# ---------------------------------------------------------------- the bound

LONGEST, MOST = 24, 16  # prompt, output
SHORT, LONG = (1, 1), (LONGEST, 1)
Lengths = Callable[[random.Random, int, str], tuple[int, int]]
ADVERSARIES: dict[str, Lengths] = {
    "short against long prompts": lambda r, n, me: SHORT if me == "a" else LONG,
    "prompts against answers": lambda r, n, me: LONG if me == "a" else (1, MOST),
    "any": lambda r, n, me: (r.randint(1, LONGEST), r.randint(1, MOST)),
    "in turn": lambda r, n, me: (LONGEST, MOST) if (n // 40) % 2 == (me == "a") else (1, 2),
}


@pytest.mark.parametrize("lengths", ADVERSARIES)
@pytest.mark.parametrize("weights", [{"a": 1.0, "b": 1.0}, {"a": 1.0, "b": 3.0}])
@pytest.mark.parametrize("blocks", [200, 24])  # blocks for all; or for two or three, with preemption by growth
def test_the_gap_between_two_who_always_wait_is_bounded(lengths: str, weights: dict[str, float], blocks: int) -> None:
    """Over every interval: |W_a / w_a - W_b / w_b| <= 2 max(w_p L, w_q M), M being the KV tokens that can run."""
    r = random.Random(7)
    sale = Sale(config_of(slots=6, step_tokens=40, blocks=blocks, weights=weights))
    costs = sale.world.config.fairness
    gaps = [0.0]
    for n in range(900):
        for me in ("a", "b"):
            while sale.waiting(me) < 7:  # more than there are slots: it is never without one
                sale.ask(me, *ADVERSARIES[lengths](r, n, me))
        sale.turn(check=n % 50 == 0)
        a, b = (sale.world.charged.get((1, me), 0) / weights[me] for me in ("a", "b"))
        gaps.append(a - b)
    kv_tokens = min(blocks * SIZE, 6 * (LONGEST + MOST))
    bound = 2 * max(costs.prompt_token_weight * LONGEST, costs.output_token_weight * kv_tokens)
    assert max(gaps) - min(gaps) <= bound
    assert min(a, b) > bound, "the run is long enough for the bound to mean something"
    if blocks == 24 and lengths == "any":
        assert sale.world.machine.stats().preemptions > 5


def test_the_weights_of_tokens_are_those_of_the_section() -> None:
    sale = Sale(config_of(fairness=FairnessConfig(prompt_token_weight=3, output_token_weight=5)))
    sale.ask("a", 7, 4)
    sale.world.finish()
    assert sale.world.charged[1, "a"] == 7 * 3 + 4 * 5
    sale.world.check()


# ---------------------------------------------------------------- a flood


@pytest.mark.parametrize("after", range(1, 40, 3))  # at every phase of the requests in flight
@pytest.mark.parametrize("prompt_tokens", [3, 60])  # within a step; in many chunks
def test_a_flood_delays_another_tenant_by_no_more_than_what_is_in_flight(after: int, prompt_tokens: int) -> None:
    sale = Sale(config_of(slots=4, step_tokens=16))
    world = sale.world
    for _ in range(500):
        sale.ask("flood", 10, 8)
    sale.turn(after)
    known = len(world.admitted)
    mine = sale.ask("light", prompt_tokens, 3)
    while world.open[mine].first_ns is None:
        running, admitted = len([a for a in world.open.values() if a.running]), len(world.admitted)
        sale.turn(check=True)
        taken_in = world.admitted[admitted:]
        assert running == 4 or taken_in, "the first slot that comes free is its own, but for a tie"
    overtook = world.admitted[known : world.admitted.index(mine)]
    assert len(overtook) <= 1, "a tie: the flood has waited longer"
    steps = 0
    while mine in world.open and not world.open[mine].outputs:
        sale.turn()
        steps += 1
    assert steps <= -(-(prompt_tokens + 4 * 10) // (16 - 3)), "what three rows leave goes to it and those before"
    sale.turn(3)
    assert world.endings[mine].preemptions == 0 and sale.waiting("flood") > 400


def test_a_prefill_is_not_overtaken_by_the_older_requests_of_another_tenant() -> None:
    """They are first in age, and are taken in while it is still in prefill: its chunks come first all the same."""
    sale = Sale(config_of(slots=3, step_tokens=8))
    for _ in range(50):
        sale.ask("flood", 8, 2)
    sale.turn(6)
    mine = sale.ask("light", 40, 1)
    seen = []
    while mine in sale.world.open:
        sale.turn()
        asked = sale.world.open.get(mine)
        if asked is not None and asked.running:
            seen.append(asked.computed)
    gained = [two - one for one, two in zip([0, *seen], seen, strict=False)]
    assert all(tokens >= 8 - 2 for tokens in gained[1:]), "whatever two decode rows leave is its own"


def test_within_a_tenant_age_alone_decides() -> None:
    sale = Sale(config_of(slots=2))
    sids = [sale.ask(me, 6, 5) for me in "aabbabab" for _ in range(3)]
    sale.world.finish()
    for me in "ab":
        ours = [sid for sid in sale.world.admitted if sale.tenants[sid] == me]
        assert ours == sorted(ours)
    assert sale.world.admitted != sids


# ---------------------------------------------------------------- pauses


@pytest.mark.parametrize("outputs", [6, 160])  # it has gone, and is forgotten; or it runs on, but waits for nothing
def test_a_pause_saves_nothing_up(outputs: int) -> None:
    sale = Sale(config_of(slots=3))
    for _ in range(300):
        sale.ask("busy", 6, 6)
    sale.ask("lazy", 6, outputs)
    sale.turn(150)
    assert not sale.waiting("lazy")
    before = len(sale.world.admitted)
    for _ in range(60):
        sale.ask("lazy", 6, 6)
    sale.turn(100)
    tenants = [sale.tenants[sid] for sid in sale.world.admitted[before:]]
    assert len(tenants) > 30
    for n in range(len(tenants)):
        assert abs(tenants[:n].count("lazy") - tenants[:n].count("busy")) <= 3 + 2, "in turn from the first on"


# ---------------------------------------------------------------- what is charged


def test_what_the_prefix_cache_holds_is_free() -> None:
    sale = Sale(config_of(step_tokens=100))
    world = sale.world
    first = world.submit([7] * 4 * SIZE + [1], 2, tenant="a", endless=True)
    world.finish()
    second = world.submit([7] * 4 * SIZE + [2, 3], 2, tenant="a", endless=True)
    world.finish()
    assert [world.endings[sid].cached_tokens for sid in (first, second)] == [0, 4 * SIZE]
    assert world.charged[1, "a"] == (4 * SIZE + 1 + 2 * 2) + (2 + 2 * 2)
    world.check()


def test_a_preemption_charges_nothing_twice() -> None:
    sale = Sale(config_of(slots=2, blocks=16))
    world = sale.world
    for tenant in ("a", "b"):
        sale.ask(tenant, 9, 12, priority=2)
    sale.turn(4)
    critical = [sale.ask("bank", 14, 3, priority=0) for _ in range(4)]  # both are put back, and their blocks reused
    sale.turn()
    sale.ask("a", 1, 1, priority=2)  # so that the counters of both are kept
    sale.ask("b", 1, 1, priority=2)
    world.finish()
    endings = [world.endings[sid] for sid in (0, 1)]
    assert all(end.preemptions for end in endings) and all(world.endings[sid].queue_ns < 50_000 for sid in critical)
    assert any(end.computed_tokens > 9 for end in endings), "really computed again"
    for tenant in ("a", "b"):
        assert world.charged[2, tenant] == 9 + 12 * 2 + 1 + 2
    world.check()


def test_a_failed_step_and_a_leaver_owe_only_what_was_taken() -> None:
    sale = Sale(config_of(slots=3))
    world = sale.world
    sids = [sale.ask(me, 5, 9) for me in "aabbcc"]
    sale.turn(2, check=True)
    world.abort(sids[0])
    world.abort(sids[4])  # waits still, or has just been taken in
    world.check()
    world.turn(fault="step")
    world.check()
    world.turn(fault="nan")
    world.check()
    world.drain()
    world.finish()
    world.check()
    assert all(not queue.waiting for queue in world.machine.batcher.room.queues)
    assert not any(queue.waits() for queue in world.machine.batcher.room.queues), "nobody is remembered who has ended"


# ---------------------------------------------------------------- priorities


def test_priority_comes_before_every_counter() -> None:
    """The one who was served most goes first all the same when it is critical; each priority counts for itself."""
    sale = Sale(config_of(slots=2))
    world = sale.world
    for _ in range(30):
        sale.ask("bank", 8, 4, priority=0)
    for _ in range(5):
        sale.ask("shop", 8, 4, priority=1)
    world.finish()
    assert [sale.tenants[sid] for sid in world.admitted] == ["bank"] * 30 + ["shop"] * 5
    assert world.charged == {(0, "bank"): 30 * 16, (1, "shop"): 5 * 16}


def test_a_head_that_does_not_fit_stops_its_priority_and_those_below() -> None:
    sale = Sale(config_of(slots=4, blocks=16))
    world = sale.world
    held = sale.ask("c", 40, 8)
    sale.turn(3)
    big = sale.ask("a", 40, 2)
    small = sale.ask("b", 2, 2)
    less = sale.ask("d", 2, 2, priority=2)
    sale.turn()
    assert [sid for sid, asked in world.open.items() if asked.running] == [held], "b's would fit, and must not go"
    world.finish()
    assert world.admitted == [held, big, small, less]


# ---------------------------------------------------------------- as before


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.booleans())
def test_one_tenant_is_served_strictly_by_age(seed: int, several_gateways: bool) -> None:
    """``ReplicaWorld`` knows of age alone, and a machine with fairness off does the same, action by action."""
    r = random.Random(seed)
    config = config_of(
        slots=r.choice([2, 4]), step_tokens=r.choice([8, 20]), blocks=r.choice([16, 30]),
        reserved_slots=r.choice([0, 1]),
    )
    world = ReplicaWorld(config)
    for _ in range(120):
        world.now_ns += r.choice([1, 1_000])
        for _ in range(r.choice([0, 0, 1, 2]) if len(world.open) < 20 else 0):
            world.submit(
                [r.randrange(3)] * r.randrange(1, 30), r.randrange(1, 10), r.randrange(3), endless=r.random() < 0.5,
                late_ns=r.choice([0, 5_000]) if several_gateways else 0,
            )
        if r.random() < 0.1 and world.open:
            world.abort(r.choice([*world.open]))
        world.turn(r.choice([1, 99]), fault=r.choice(["step", "nan"]) if r.random() < 0.05 else "")
        world.check()
    world.finish()
    off = Replica(
        ReplicaConfig(batcher=config.batcher, prefix=config.prefix, fairness=FairnessConfig(enabled=False))
    )
    assert all(off.handle(now_ns, event) == actions for now_ns, event, actions in world.journal)


def test_switched_off_it_is_first_come_first_served_whoever_asks() -> None:
    world = ReplicaWorld(config_of(fairness=FairnessConfig(enabled=False), slots=2, weights={"b": 9.0}))
    for n in range(20):
        world.submit([n] * 6, 4, tenant="aaab"[n % 4])
        world.now_ns += 1
    world.finish()
    world.check()


# ---------------------------------------------------------------- configuration


def test_a_replica_learns_the_weights_from_the_tenants() -> None:
    scenario = Scenario(name="s", fairness=FairnessConfig(output_token_weight=4))
    config = replica_config(scenario, {"big": TenantConfig(weight=3.0), "small": TenantConfig()}, 2)
    assert (config.weights, config.fairness, config.index) == ({"big": 3.0, "small": 1.0}, scenario.fairness, 2)
    assert replica_config(scenario).weights == {}

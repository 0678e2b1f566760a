"""A tenant that asks for ten times its share: how much longer a light one waits, in time, on whole replicas.

The paper (Sheng et al., OSDI 2024) proves for each request of a tenant that had nothing waiting or running: from its
arrival to its first step it is at most ``2 (n - 1) max(w_p L, w_q M) / a``, with n tenants, L the longest prompt, M the
KV tokens that can run, and the engine serving at least ``a`` weighted tokens a second while somebody waits. That is the
gap that ``test_fair_batcher.py`` holds, put in time; here every such request is held to it, and so is the rise of the
99th percentile over all requests of the light tenant, its own load staying what it was.

The machine is a real ``Replica``; a step takes what ``StepCost`` says. ``a`` is the slowest step of the same run.
Mutations caught: no fairness (the last test is that one); nothing charged; younger requests first; old counters
believed; newcomers behind everybody.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import NamedTuple

import pytest

from engine.config import BatcherConfig, FairnessConfig, PrefixConfig, ReplicaConfig
from engine.events import Plan, RunStep, SeqEnd, StepDone, StepShape, Submit
from engine.policy.replica import Replica
from engine.stepcost import StepCost
from engine.units import MS_NS, S_NS

SLOTS, LONGEST, MOST, SIZE, STEP_TOKENS = 8, 48, 24, 8, 64
PROMPT_COST, OUTPUT_COST = 1, 2
COST = StepCost(
    fixed_ns=20 * MS_NS, prefill_token_ns=MS_NS, prefill_row_ns=0, decode_row_ns=2 * MS_NS, decode_kv_ns=0, area_ns=0,
)
NEVER_NS = 1 << 62
LIGHT_REQUESTS = 300
BOUND_TOKENS = max(PROMPT_COST * LONGEST, OUTPUT_COST * SLOTS * (LONGEST + MOST))  # M: what so many slots can hold
STEP_NS = COST.ns(StepShape(prefill_tokens=STEP_TOKENS, decode_rows=SLOTS))  # no step takes longer
PREFILL_STEPS = -(-SLOTS * LONGEST // (STEP_TOKENS - SLOTS))
TURN_NS = (1 + PREFILL_STEPS + MOST) * STEP_NS  # the step in flight, and all that ran then has ended


class Arrival(NamedTuple):
    """A request to come."""

    at_ns: int
    tenant: str
    prompt: int
    output: int


@dataclass(eq=False)
class Job:
    """A request that waits or runs. ``alone``: its tenant had nothing else there when it came."""

    at_ns: int
    tenant: str
    prompt: int
    output: int
    alone: bool = False
    computed: int = 0
    outputs: int = 0


@dataclass
class Run:
    """What the light tenant met, and how fast the engine was at its slowest while somebody waited."""

    waits_ns: list[int] = field(default_factory=list)  # of every request of the light tenant
    after_idle_ns: list[int] = field(default_factory=list)  # of those that found none of their own there
    slowest_tps: float = float("inf")  # weighted tokens a second

    def p99_ns(self) -> int:
        return sorted(self.waits_ns)[len(self.waits_ns) * 99 // 100]


class Engine:
    """A replica whose steps take what they cost. ``waiting`` and ``running``: by sid."""

    def __init__(self, fair: bool) -> None:
        self.replica = Replica(
            ReplicaConfig(
                batcher=BatcherConfig(
                    step_tokens=STEP_TOKENS, slots=SLOTS, reserved_slots=0, reserved_blocks=0, reserve="none",
                    watermark=0.0,
                ),
                prefix=PrefixConfig(
                    block_tokens=SIZE, blocks=SLOTS * ((LONGEST + MOST) // SIZE + 1), pinned_blocks=0
                ),
                fairness=FairnessConfig(
                    enabled=fair, prompt_token_weight=PROMPT_COST, output_token_weight=OUTPUT_COST
                ),
            )
        )
        self.run, self.now_ns = Run(), 0
        self.waiting: dict[int, Job] = {}
        self.running: dict[int, Job] = {}
        self.there: Counter[str] = Counter()  # requests of each tenant that wait or run

    def submit(self, sid: int, job: Job) -> None:
        job.alone = not self.there[job.tenant]
        self.there[job.tenant] += 1
        self.waiting[sid] = job
        self.replica.handle(
            self.now_ns, Submit(sid, sid, job.tenant, "chat", 1, job.at_ns, NEVER_NS, job.prompt, job.output)
        )

    def turn(self) -> None:
        """One step: who is taken in, what it computes, who has ended."""
        [step] = [action for action in self.replica.handle(self.now_ns, Plan()) if isinstance(action, RunStep)]
        decoding = [sid for sid, job in self.running.items() if job.outputs]
        assert len(decoding) == step.shape.decode_rows and not set(step.stop) & {*self.running}, "nobody is put back"
        for start in step.start:
            job = self.running[start.sid] = self.waiting.pop(start.sid)
            if job.tenant == "light":
                self.run.waits_ns.append(self.now_ns - job.at_ns)
                if job.alone:
                    self.run.after_idle_ns.append(self.now_ns - job.at_ns)
        served, first = 0, []
        for sid, tokens in [*((chunk.sid, chunk.tokens) for chunk in step.chunks), *((sid, 0) for sid in decoding)]:
            job = self.running[sid]
            job.computed += tokens
            served += PROMPT_COST * tokens
            if job.computed == job.prompt:
                served += OUTPUT_COST
                job.outputs += 1
                first += [sid] * (job.outputs == 1)
        ended = [sid for sid, job in self.running.items() if job.outputs == job.output]
        took_ns = COST.ns(step.shape)
        if self.waiting:
            self.run.slowest_tps = min(self.run.slowest_tps, served * S_NS / took_ns)
        for sid in ended:
            self.there[self.running.pop(sid).tenant] -= 1
        self.now_ns += took_ns
        self.replica.handle(self.now_ns, StepDone(1, tuple(first), tuple(SeqEnd(sid, "length") for sid in ended)))


def play(arrivals: list[Arrival], fair: bool = True) -> Run:
    """Until the last request of the light tenant has begun."""
    engine, left = Engine(fair), deque(sorted(arrivals))
    lights, sid = sum(arrival.tenant == "light" for arrival in arrivals), 0
    while len(engine.run.waits_ns) < lights:
        if not (engine.waiting or engine.running):
            engine.now_ns = max(engine.now_ns, left[0].at_ns)
        while left and left[0].at_ns <= engine.now_ns:
            engine.submit(sid, Job(*left.popleft()))
            sid += 1
        engine.turn()
    return engine.run


def poisson(r: random.Random, tenant: str, gap_ns: float, until_ns: float) -> list[Arrival]:
    """Random lengths at random moments, so far apart in the mean."""
    arrivals: list[Arrival] = []
    at_ns = 0.0
    while (at_ns := at_ns + r.expovariate(1 / gap_ns)) < until_ns:
        arrivals.append(Arrival(round(at_ns), tenant, r.randint(1, LONGEST), r.randint(1, MOST)))
    return arrivals


def share_gap_ns(r: random.Random, tenants: int) -> float:
    """Between two requests of a tenant that asks for just its share of what a busy engine gets through."""
    crowd = [Arrival(0, "crowd", r.randint(1, LONGEST), r.randint(1, MOST)) for _ in range(300)]
    last = Arrival(1, "light", 1, 1)
    return play([*crowd, last], fair=False).waits_ns[0] / len(crowd) * tenants


@pytest.mark.parametrize(("seed", "tenants", "of_share"), [(0, 2, 0.6), (1, 2, 0.2), (2, 4, 0.6), (3, 4, 0.2)])
def test_ten_times_its_share_costs_the_light_tenant_no_more_than_the_bound(
    seed: int, tenants: int, of_share: float,
) -> None:
    r = random.Random(seed)
    gap_ns = share_gap_ns(r, tenants)
    until_ns = LIGHT_REQUESTS * gap_ns / of_share
    light = poisson(r, "light", gap_ns / of_share, until_ns)
    heavy = [one for n in range(1, tenants) for one in poisson(r, f"heavy {n}", gap_ns / 10, until_ns)]
    alone, beside = play(light), play(light + heavy)
    bound_ns = 2 * (tenants - 1) * BOUND_TOKENS * S_NS / beside.slowest_tps
    print(
        f"{tenants} tenants, {len(light)} requests at {of_share:.0%} of its share, {len(heavy)} of others: p99 alone "
        f"{alone.p99_ns() / MS_NS:.0f} ms, beside {beside.p99_ns() / MS_NS:.0f} ms; {len(beside.after_idle_ns)} after "
        f"idle, at most {max(beside.after_idle_ns) / MS_NS:.0f} ms; bounds {bound_ns / MS_NS:.0f} ms and "
        f"{TURN_NS / MS_NS:.0f} ms"
    )
    assert max(beside.after_idle_ns) <= bound_ns, "the paper's, for each request that found none of its tenant's"
    assert max(beside.after_idle_ns) <= TURN_NS, "and ours: a slot of those that were busy, but for one tie a tenant"
    assert beside.p99_ns() - alone.p99_ns() <= bound_ns
    assert len(beside.after_idle_ns) >= 20


def test_first_come_first_served_breaks_the_bound() -> None:
    """So the bound says something at this load."""
    r = random.Random(0)
    gap_ns = share_gap_ns(r, 2)
    until_ns = 60 * gap_ns
    light, heavy = poisson(r, "light", gap_ns, until_ns), poisson(r, "heavy", gap_ns / 10, until_ns)
    beside = play(light + heavy, fair=False)
    assert beside.p99_ns() - play(light).p99_ns() > 2 * BOUND_TOKENS * S_NS / beside.slowest_tps

"""Virtual tokens and the fair waiting room against plain lists that forget nobody, and the paper's promises measured.

invariant: mutation that it caught
- no banking: no lift; lifted at every request; newcomers at zero; where all had left lost, or moved by anybody's
  charge, or by the last one's while others wait; charges after the last one left lost
- a debt stays: lifted down to the floor; forgotten with a counter above it
- order: turn of the first appearance; old counters or old turns in the heap believed
- weights: none; upside down; a huge one served for free (or a charge below zero)
- memory: at the floor but remembered; not looked at after a charge, or when let go; forgotten while it runs; old
  entries never tidied (heap, line); a floor for the forgotten of 0
- heaps: entered twice; never entered again after having surfaced, or after having been tidied
- lines: ranks ignored; ties by key; a removed head given out; a popped entry left; tidied by cutting; removed twice
- running: popped but not held; put back but still running; ended but never let go; left but still in the backlog
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from fractions import Fraction

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.policy.fairness import UNIT, FairQueue, Rank, VirtualTokens

WEIGHTS = {"half": 0.5, "double": 2.0, "third": 3.0}
NAMES = ["half", "double", "third", "one", "other"]
COSTS = st.one_of(st.integers(0, 3), st.integers(0, 600))


@dataclass(eq=False)
class Tenant:
    """In the specification: forgets nothing."""

    counter: int = 0
    waiting: int = 0
    running: int = 0
    since: int = 0  # when it began to wait


class NaiveTokens:
    """The paper's rule over a dict that only grows.

    One addition: who neither waits nor runs is always at least where the others are. The paper lifts at the next
    arrival; only a charge in between, for a tenant that was let go, could tell the difference.
    """

    def __init__(self, weights: dict[str, float]) -> None:
        self.weights = weights
        self.tenants: dict[str, Tenant] = {}
        self.left_at = self.now = 0
        self.last = ""

    def of(self, name: str) -> Tenant:
        return self.tenants.setdefault(name, Tenant(self.floor))

    @property
    def floor(self) -> int:
        return min((t.counter for t in self.tenants.values() if t.waiting), default=self.left_at)

    def lift(self) -> None:
        for tenant in self.tenants.values():
            if not tenant.waiting and not tenant.running:
                tenant.counter = max(tenant.counter, self.floor)

    def enqueue(self, name: str) -> None:
        tenant = self.of(name)
        self.now += 1
        if not tenant.waiting:
            tenant.counter, tenant.since = max(tenant.counter, self.floor), self.now
        tenant.waiting += 1
        self.lift()

    def dequeue(self, name: str) -> None:
        tenant = self.of(name)
        if sum(t.waiting for t in self.tenants.values()) == 1:
            self.last, self.left_at = name, tenant.counter
        tenant.waiting -= 1
        self.lift()

    def hold(self, name: str) -> None:
        self.of(name).running += 1

    def let_go(self, name: str) -> None:
        self.of(name).running -= 1
        self.lift()

    def charge(self, name: str, tokens: int) -> None:
        tenant = self.of(name)
        tenant.counter += tokens * max(1, round(Fraction(UNIT) / Fraction(self.weights.get(name, 1.0))))
        if name == self.last and not any(t.waiting for t in self.tenants.values()):
            self.left_at = max(self.left_at, tenant.counter)
        self.lift()

    def pick(self) -> str | None:
        waiting = [(t.counter, t.since, name) for name, t in self.tenants.items() if t.waiting]
        return min(waiting)[2] if waiting else None

    def remembered(self) -> int:
        """How many there is something to know of."""
        return sum(bool(t.waiting or t.running or t.counter > self.floor) for t in self.tenants.values())


class TokensMachine(RuleBasedStateMachine):
    """Any order of calls, charges to tenants that neither wait nor run included."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.naive = VirtualTokens(WEIGHTS), NaiveTokens(WEIGHTS)
        self.floor = 0

    @rule(name=st.sampled_from(NAMES), count=st.integers(1, 3))
    def enqueue(self, name: str, count: int) -> None:
        for _ in range(count):
            self.tokens.enqueue(name)
            self.naive.enqueue(name)

    @rule(name=st.sampled_from(NAMES), holds=st.booleans())
    def dequeue(self, name: str, holds: bool) -> None:
        if self.naive.of(name).waiting:
            for one in (self.tokens, self.naive):
                if holds:
                    one.hold(name)
                one.dequeue(name)

    @rule(name=st.sampled_from(NAMES))
    def drop_all(self, name: str) -> None:
        while self.naive.of(name).waiting:
            self.dequeue(name, False)

    @rule(name=st.sampled_from(NAMES))
    def let_go(self, name: str) -> None:
        if self.naive.of(name).running:
            self.tokens.let_go(name)
            self.naive.let_go(name)

    @rule(name=st.sampled_from(NAMES), cost=COSTS)
    def charge(self, name: str, cost: int) -> None:
        self.tokens.charge(name, cost)
        self.naive.charge(name, cost)

    @rule(cost=COSTS)
    def serve(self, cost: int) -> None:
        name = self.tokens.pick()
        assert name == self.naive.pick()
        if name is not None:
            self.dequeue(name, True)
            self.charge(name, cost)

    @invariant()
    def same(self) -> None:
        self.tokens.check()
        assert self.tokens.pick() == self.naive.pick()
        stats = self.tokens.stats()
        assert stats.floor == self.tokens.floor == self.naive.floor >= self.floor, "the floor never falls"
        self.floor = stats.floor
        assert stats.waiting == sum(t.waiting > 0 for t in self.naive.tenants.values())
        assert stats.tenants == self.naive.remembered(), "memory: exactly those there is something to know of"
        for name in NAMES:
            tenant = self.naive.of(name)
            start = tenant.counter if tenant.waiting else max(tenant.counter, self.floor)
            assert self.tokens.counter(name) == start


TokensMachine.TestCase.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)
TestTokens = TokensMachine.TestCase


@pytest.mark.parametrize("seed", range(4))
def test_long_random_lives_of_many_tenants(seed: int) -> None:
    """A crowd that comes and goes; the reference is asked now and then."""
    r = random.Random(seed)
    names = [f"t{n}" for n in range(60)]
    weights = {name: r.choice([0.25, 1.0, 1.5, 8.0]) for name in names[:30]}
    tokens, naive = VirtualTokens(weights), NaiveTokens(weights)
    for n in range(4_000):
        name, what = r.choice(names), r.random()
        tenant = naive.of(name)
        both = (tokens, naive)
        if what < 0.35:
            for one in both:
                one.enqueue(name)
        elif what < 0.55 and tenant.waiting:
            for one in both:
                one.dequeue(name)
        elif what < 0.75 and (served := naive.pick()) is not None:
            assert tokens.pick() == served
            cost = r.randint(1, 200)
            for one in both:
                one.hold(served)
                one.dequeue(served)
                one.charge(served, cost)
        elif what < 0.85 and tenant.running:
            cost = r.randint(0, 50)
            for one in both:
                one.charge(name, cost)
                one.let_go(name)
        elif what < 0.9:
            for one in both:
                one.charge(name, 5)
        assert tokens.pick() == naive.pick()
        if n % 10 == 0:
            tokens.check()
            assert tokens.stats().tenants == naive.remembered()


# ---------------------------------------------------------------- the waiting room


class QueueMachine(RuleBasedStateMachine):
    """Pushed, popped, put back, charged, removed, in any order; the reference is a list and the naive tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.queue, self.naive = FairQueue(WEIGHTS), NaiveTokens(WEIGHTS)
        self.waiting: list[tuple[str, Rank, int, int]] = []  # tenant, rank, first arrival, key
        self.running: dict[int, tuple[str, Rank, int, int]] = {}
        self.arrived = 0

    @rule(name=st.sampled_from(NAMES), late=st.integers(0, 3), count=st.integers(1, 4))
    def push(self, name: str, late: int, count: int) -> None:
        """``late``: other gateways' submissions arrive out of order, some with equal ranks."""
        for _ in range(count):
            self.arrived += 1
            entry = (name, (1, self.arrived // 2 - late), self.arrived, 100 - self.arrived)
            self.waiting.append(entry)
            self.queue.push(name, entry[3], entry[1])
            self.naive.enqueue(name)

    def expected(self) -> tuple[str, Rank, int, int] | None:
        name = self.naive.pick()
        return min((e for e in self.waiting if e[0] == name), default=None)

    @rule(cost=COSTS)
    def pop(self, cost: int) -> None:
        entry = self.expected()
        assert self.queue.pop() == (entry and entry[3])
        if entry is not None:
            self.waiting.remove(entry)
            self.running[entry[3]] = entry
            self.naive.hold(entry[0])
            self.naive.dequeue(entry[0])
            self.queue.charge(entry[3], cost)
            self.naive.charge(entry[0], cost)

    @precondition(lambda self: self.running)
    @rule(pick=st.integers(0, 30), cost=COSTS)
    def charge(self, pick: int, cost: int) -> None:
        entry = [*self.running.values()][pick % len(self.running)]
        self.queue.charge(entry[3], cost)
        self.naive.charge(entry[0], cost)

    @precondition(lambda self: self.running)
    @rule(pick=st.integers(0, 30))
    def put_back(self, pick: int) -> None:
        entry = self.running.pop([*self.running][pick % len(self.running)])
        self.waiting.append(entry)
        self.queue.push(entry[0], entry[3], entry[1])
        self.naive.let_go(entry[0])
        self.naive.enqueue(entry[0])

    @rule(pick=st.integers(0, 30), count=st.integers(1, 5))
    def remove(self, pick: int, count: int) -> None:
        for _ in range(count):
            everybody = [*self.waiting, *self.running.values()]
            if not everybody:
                return
            entry = everybody[pick % len(everybody)]
            self.queue.remove(entry[3])
            if entry in self.waiting:
                self.waiting.remove(entry)
                self.naive.dequeue(entry[0])
            else:
                del self.running[entry[3]]
                self.naive.let_go(entry[0])
            self.queue.remove(entry[3])  # once is once

    @rule()
    def remove_a_stranger(self) -> None:
        self.queue.remove(10**9)

    @invariant()
    def same(self) -> None:
        self.queue.check()
        entry = self.expected()
        assert self.queue.head() == (entry and entry[3]), "head: somebody whenever somebody waits"
        assert self.queue.waiting == len(self.waiting)
        assert self.queue.tokens.stats().tenants == self.naive.remembered()


QueueMachine.TestCase.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)
TestQueue = QueueMachine.TestCase


# ---------------------------------------------------------------- the paper's promises, on a little engine


@dataclass(eq=False)
class Job:
    """A request: so many prompt tokens, then one output token a step."""

    key: int
    tenant: str
    prompt: int
    output: int
    done: int = 0


PROMPT_COST, OUTPUT_COST = 1, 2


class Engine:
    """Admits heads while their KV fits, and stops at the first that does not; every admitted row decodes each step."""

    def __init__(self, weights: dict[str, float], kv_tokens: int) -> None:
        self.queue, self.kv_tokens = FairQueue(weights), kv_tokens
        self.jobs: dict[int, Job] = {}
        self.running: dict[int, Job] = {}
        self.waiting: dict[str, int] = {}
        self.service: dict[str, int] = {}
        self.next = 0
        self.order: list[str] = []  # tenants as they were admitted

    def arrive(self, tenant: str, prompt: int, output: int) -> None:
        self.next += 1
        self.jobs[self.next] = Job(self.next, tenant, prompt, output)
        self.waiting[tenant] = self.waiting.get(tenant, 0) + 1
        self.queue.push(tenant, self.next, (0, self.next))

    def free(self) -> int:
        return self.kv_tokens - sum(job.prompt + job.output for job in self.running.values())

    def serve(self, job: Job, cost: int) -> None:
        self.service[job.tenant] = self.service.get(job.tenant, 0) + cost
        self.queue.charge(job.key, cost)

    def step(self, check: bool = True) -> None:
        while (key := self.queue.head()) is not None:
            job = self.jobs[key]
            if job.prompt + job.output > self.free():
                break
            assert self.queue.pop() == key
            self.running[key] = job
            self.waiting[job.tenant] -= 1
            self.order.append(job.tenant)
            self.serve(job, PROMPT_COST * job.prompt)
        assert self.running or not self.queue.waiting, "work conserving: it never idles while somebody waits"
        for job in [*self.running.values()]:
            job.done += 1
            self.serve(job, OUTPUT_COST)
            if job.done == job.output:
                del self.running[job.key], self.jobs[job.key]
                self.queue.remove(job.key)
        if check:
            self.queue.check()


SHORT, LONG = (1, 1), (100, 1)
ADVERSARIES = {
    "short against long prompts": lambda r, n, me: SHORT if me == "a" else LONG,
    "prompts against answers": lambda r, n, me: (100, 1) if me == "a" else (1, 99),
    "any": lambda r, n, me: (r.randint(1, 100), r.randint(1, 100)),
    "in turn": lambda r, n, me: (100, 100) if (n // 40) % 2 == (me == "a") else (1, 2),
    "together": lambda r, n, me: (100, 100) if n % 50 < 10 else (1, 1),
}


@pytest.mark.parametrize("lengths", ADVERSARIES)
@pytest.mark.parametrize("weights", [{}, {"a": 4.0}, {"a": 0.5, "b": 3.0}])
def test_the_gap_between_two_who_always_wait_is_bounded(lengths: str, weights: dict[str, float]) -> None:
    """Over every interval: |W_a / w_a - W_b / w_b| <= 2 max(w_p L, w_q M), M in KV tokens (over the smaller weight)."""
    r = random.Random(5)
    engine = Engine(weights, kv_tokens=200)
    gaps = [0.0]
    for n in range(6_000):
        for me in ("a", "b"):
            while engine.waiting.get(me, 0) < 120:
                engine.arrive(me, *ADVERSARIES[lengths](r, n, me))
        engine.step(check=n % 20 == 0)
        a, b = (engine.service.get(me, 0) / weights.get(me, 1.0) for me in ("a", "b"))
        gaps.append(a - b)
    bound = 2 * max(PROMPT_COST * 100, OUTPUT_COST * 200) / min(weights.get("a", 1.0), weights.get("b", 1.0))
    assert max(gaps) - min(gaps) <= bound
    assert min(a, b) > 2 * bound, "the run is long enough for the bound to mean something"


def test_weights_are_honoured_within_five_percent() -> None:
    weights = {"one": 1.0, "two": 2.0, "five": 5.0, "half": 0.5}
    r = random.Random(1)
    engine = Engine(weights, kv_tokens=400)
    for n in range(6_000):
        for name in weights:
            while engine.waiting.get(name, 0) < 40:
                engine.arrive(name, r.randint(1, 60), r.randint(1, 30))
        engine.step(check=n % 20 == 0)
    total = sum(engine.service.values())
    for name, weight in weights.items():
        assert engine.service[name] / total == pytest.approx(weight / 8.5, rel=0.05)


def test_a_pause_saves_nothing_up() -> None:
    engine = Engine({}, kv_tokens=60)
    for _ in range(300):
        engine.arrive("busy", 10, 10)
        engine.arrive("friend", 10, 10)
    engine.arrive("lazy", 10, 10)
    for _ in range(500):
        engine.step()
    before = len(engine.order)
    for _ in range(50):
        engine.arrive("lazy", 10, 10)
    while engine.order[before:].count("lazy") < 50:
        engine.step()
    turns = [n for n, name in enumerate(engine.order[before:]) if name == "lazy"]
    assert turns[0] <= 2, "at once, but ..."
    for nth, turn in enumerate(turns):
        assert turn >= 3 * nth - 6, "... then every third, give or take a batch: no credit for the time away"


def test_a_newcomer_after_everybody_has_left_starts_where_the_last_one_left() -> None:
    tokens = VirtualTokens({})
    for name, cost in (("early", 30), ("last", 500)):
        tokens.enqueue(name)
        tokens.hold(name)
        tokens.dequeue(name)
        tokens.charge(name, cost)
    assert tokens.floor == 530 * UNIT, "it came to where the other had come to, and is charged after it has left"
    tokens.enqueue("new")
    tokens.enqueue("last")
    assert tokens.counter("new") == tokens.counter("last") == tokens.counter("early") == 530 * UNIT
    assert tokens.pick() == "new", "ties: who has waited longer"


def test_a_debt_outlives_a_pause() -> None:
    """Leaving and coming back does not wash off what was served."""
    tokens = VirtualTokens({})
    for name in ("heavy", "light"):
        tokens.enqueue(name)
    tokens.charge("heavy", 1_000)
    tokens.dequeue("heavy")
    tokens.enqueue("heavy")
    assert tokens.counter("heavy") == 1_000 * UNIT
    assert tokens.pick() == "light"


def test_what_runs_while_others_are_served_is_charged_to_the_true_counter() -> None:
    """One long answer at a time, told at its end: not on top of where the others have come to meanwhile."""
    queue = FairQueue({})
    queue.push("slow", 1, (0,))
    queue.push("crowd", 2, (0,))
    assert queue.pop() == 1
    queue.charge(2, 1_000)
    queue.charge(1, 800)
    queue.remove(1)
    assert queue.tokens.counter("slow") == 1_000 * UNIT, "no more than a lift to the floor"


def test_a_debtor_who_runs_again_is_not_forgotten() -> None:
    tokens = VirtualTokens({})
    for name in ("stays", "stays", "debtor"):
        tokens.enqueue(name)
    tokens.charge("debtor", 10)
    tokens.dequeue("debtor")  # may be forgotten at 10 ...
    tokens.hold("debtor")  # ... but not now
    tokens.charge("stays", 1_000)
    assert tokens.stats().tenants == 2
    tokens.charge("debtor", 800)
    tokens.let_go("debtor")
    assert tokens.stats().tenants == 1, "810 of 1,000"
    tokens.check()


def test_a_put_back_request_goes_before_its_younger_ones_and_no_further() -> None:
    queue = FairQueue({})
    for key in (1, 2, 3):
        queue.push("a", key, (0, key))
    queue.push("b", 9, (0, 0))
    assert [queue.pop(), queue.head()] == [1, 2]
    queue.charge(1, 10)
    assert queue.pop() == 9
    queue.push("a", 1, (0, 1))
    assert [queue.pop() for _ in range(4)] == [1, 2, 3, None]


def test_equal_ranks_are_first_come_first_served_put_back_or_not() -> None:
    queue = FairQueue({})
    for key in (7, 5, 6):
        queue.push("a", key, ())
    assert queue.pop() == 7
    queue.push("a", 7, ())
    queue.remove(5)
    queue.push("a", 5, ())
    assert [queue.pop() for _ in range(3)] == [7, 6, 5]


def test_a_heavy_tenant_delays_a_light_one_by_one_request() -> None:
    engine = Engine({}, kv_tokens=20)
    for _ in range(1_000):
        engine.arrive("heavy", 10, 10)
    for _ in range(500):
        engine.step()
    before = len(engine.order)
    engine.arrive("light", 10, 10)
    while engine.order[-1] != "light":
        engine.step()
    assert len(engine.order) - before <= 2


def test_memory_follows_who_is_there_not_who_ever_was() -> None:
    queue = FairQueue({"rare": 3.0})
    queue.push("stays", 0, (0, 0))
    for n in range(1, 20_001):
        queue.push(f"visitor {n}", n, (0, n))
        queue.remove(n)
        assert queue.tokens.stats().tenants == 1
    queue.check()
    for n in range(1, 5_001):  # in the line of one tenant
        queue.push("stays", n, (0, n))
        queue.remove(n)
    for _ in range(5_000):
        queue.charge(0, 1)
    queue.check()
    assert queue.pop() == 0 and queue.pop() is None
    queue.remove(0)
    queue.check()
    assert queue.tokens.stats().tenants == 0


def test_a_crowd_that_left_the_waiting_room_and_comes_back_is_found() -> None:
    """Behind a head that does not fit nothing surfaces: their old entries go by the dozen, and are made anew."""
    tokens, crowd = VirtualTokens({}), [f"t{n}" for n in range(30)]
    tokens.enqueue("front")
    for _ in range(3):
        for name in crowd:
            tokens.enqueue(name)
            tokens.hold(name)
        tokens.check()
        for name in crowd:
            tokens.dequeue(name)
            tokens.check()
    for name in crowd:
        tokens.enqueue(name)
    tokens.check()
    for name in ["front", *crowd]:
        assert tokens.pick() == name
        tokens.dequeue(name)
    assert tokens.pick() is None


def test_debtors_are_forgotten_when_the_others_have_caught_up() -> None:
    tokens = VirtualTokens({})
    tokens.enqueue("stays")
    for n in range(100):
        tokens.charge(f"debtor {n}", n + 1)
    assert tokens.stats().tenants == 101
    tokens.charge("stays", 50)
    assert tokens.stats().tenants == 51
    tokens.charge("stays", 50)
    assert tokens.stats().tenants == 1


def test_numbers_stay_whole() -> None:
    tokens = VirtualTokens({"third": 3.0, "vast": 1e12})
    tokens.enqueue("stays")
    for _ in range(1_000):
        tokens.charge("third", 1)
        tokens.charge("vast", 1)
    assert tokens.counter("third") == 1_000 * 333_333_333
    assert tokens.counter("vast") == 1_000, "service is never free"
    for wrong in (0.0, -1.0):
        with pytest.raises(AssertionError, match="weights"):
            VirtualTokens({"a": wrong})
    with pytest.raises(AssertionError, match="taken back"):
        tokens.charge("third", -1)

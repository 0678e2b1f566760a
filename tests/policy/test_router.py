"""The router against a reference that keeps every submission in a list and counts anew each time.

Mutations it caught: the answer's work not counted, or not let go; the prompt's let go at the end only; affinity beyond
the balance; a forgotten replica still affine; the longest unused block kept; a tie always to the first; the replica's
own word added instead of compared; a stale picture believed; never stale again after one sign; the same one
drawn twice.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.config import RouterConfig
from engine.events import Arrive
from engine.policy.router import Router, two_of
from engine.units import MS_NS, S_NS

BLOCK = 16
CHAINS = [tuple(f"{name}{n}".encode() for n in range(6)) for name in "abc"]


def ask(chain: tuple[bytes, ...] = (), prompt: int = 100, answer: int = 10, draw: int = 0) -> Arrive:
    return Arrive(0, "r", "shop", "chat", 0, prompt, answer, blocks=chain, draw=draw)


@dataclass
class Sent:
    replica: int
    prompt: int
    answer: int
    started: bool = False
    blocks: tuple[bytes, ...] = ()


class RouterMachine(RuleBasedStateMachine):
    """Everything in plain lists."""

    @initialize(
        replicas=st.integers(1, 4), affinity=st.booleans(), weight=st.integers(0, 4),
        imbalance=st.sampled_from([0, 50, 300, 10**6]), most=st.sampled_from([3, 8, 100]), events=st.booleans(),
        stale_ms=st.sampled_from([0, 1000]),
    )
    def start(
        self, replicas: int, affinity: bool, weight: int, imbalance: int, most: int, events: bool, stale_ms: int
    ) -> None:
        self.config = RouterConfig(
            affinity=affinity, imbalance_tokens=imbalance, answer_weight=weight, remembered_blocks=most,
            kv_events=events, stale_ms=stale_ms,
        )
        self.now_ns = 0
        self.silent: list[int | None] = [None] * replicas  # since when, with something of ours
        self.events = events and replicas > 1
        self.told: list[set[bytes]] = [set() for _ in range(replicas)]
        self.router = Router(self.config, replicas, BLOCK)
        self.open: dict[int, Sent] = {}
        self.said = [0] * replicas
        self.count = [0] * replicas
        self.memory: list[list[bytes]] = [[] for _ in range(replicas)]  # newest last
        self.sid = 0

    def ahead(self, replica: int) -> int:
        mine = [s for s in self.open.values() if s.replica == replica]
        own = sum((0 if s.started else s.prompt) + s.answer * self.config.answer_weight for s in mine)
        return max(own, self.said[replica])

    def uncached(self, replica: int, request: Arrive) -> int:
        known = 0
        there = set(self.memory[replica])
        if self.events:
            mine = [s for s in self.open.values() if s.replica == replica and not s.started]
            there = self.told[replica].union(*(s.blocks for s in mine))
        while self.config.affinity and known < len(request.blocks) and request.blocks[known] in there:
            known += 1
        return max(1, request.prompt_tokens - known * BLOCK)

    @rule(
        chain=st.sampled_from(CHAINS), length=st.integers(0, 6), tail=st.integers(1, 15), answer=st.integers(1, 30),
        away=st.sets(st.integers(0, 3)), draw=st.integers(0, 2**62 - 1), wait_ms=st.sampled_from([0, 400, 1000]),
    )
    def send(
        self, chain: tuple[bytes, ...], length: int, tail: int, answer: int, away: set[int], draw: int, wait_ms: int
    ) -> None:
        self.now_ns += wait_ms * MS_NS
        request = ask(chain[:length], length * BLOCK + tail, answer, draw)
        there = [r for r in range(len(self.said)) if r not in away] or [0]
        asked = there
        since = [self.silent[r] for r in there]
        if self.config.stale_ms and any(ns is not None and self.now_ns - ns > 1000 * MS_NS for ns in since):
            asked = list(two_of(there, draw))
            assert len(set(asked)) == min(2, len(there)) and set(asked) <= set(there)
        least = min(self.ahead(r) for r in asked)
        near = [r for r in asked if self.ahead(r) - least <= self.config.imbalance_tokens]
        costs = [(self.ahead(r) + self.uncached(r, request), self.count[r], r) for r in near]
        chosen = self.router.choose(self.now_ns, there, request)
        assert chosen == min(costs)[2]
        self.open[self.sid] = Sent(chosen, self.uncached(chosen, request), answer, blocks=request.blocks)
        self.router.sent(self.now_ns, self.sid, chosen, request)
        self.sid += 1
        self.count[chosen] += 1
        if self.silent[chosen] is None:
            self.silent[chosen] = self.now_ns
        memory = self.memory[chosen]
        for block in reversed(request.blocks):
            if block in memory:
                memory.remove(block)
            memory.append(block)
        del memory[: max(0, len(memory) - self.config.remembered_blocks)]

    @precondition(lambda self: self.open)
    @rule(pick=st.integers(0, 50), ends=st.booleans())
    def go_on(self, pick: int, ends: bool) -> None:
        sid = [*self.open][pick % len(self.open)]
        self.silent[self.open[sid].replica] = None
        if ends:
            del self.open[sid]
            self.router.ended(sid)
        else:
            self.open[sid].started = True
            self.router.started(sid)

    @rule(replica=st.integers(0, 3), tokens=st.sampled_from([0, 40, 900]))
    def hear(self, replica: int, tokens: int) -> None:
        replica %= len(self.said)
        if tokens < self.said[replica]:
            self.silent[replica] = None
        self.said[replica] = tokens
        self.router.hear(replica, tokens)

    @precondition(lambda self: self.events)
    @rule(
        replica=st.integers(0, 3), chain=st.sampled_from(CHAINS), some=st.sets(st.integers(0, 5)), stored=st.booleans()
    )
    def hear_kv(self, replica: int, chain: tuple[bytes, ...], some: set[int], stored: bool) -> None:
        replica %= len(self.said)
        blocks = {chain[n] for n in some}
        self.told[replica] = self.told[replica] | blocks if stored else self.told[replica] - blocks
        self.router.hear_kv(replica, blocks if stored else (), () if stored else blocks)

    @rule(replica=st.integers(0, 3))
    def lose(self, replica: int) -> None:
        replica %= len(self.said)
        self.said[replica], self.memory[replica], self.told[replica], self.silent[replica] = 0, [], set(), None
        self.router.lose(replica)

    @rule(sid=st.sampled_from([-1, 10**6]))
    def strangers(self, sid: int) -> None:
        self.router.started(sid)
        self.router.ended(sid)

    @invariant()
    def same(self) -> None:
        if hasattr(self, "router"):
            self.router.check()
            stats = self.router.stats()
            assert stats.ahead_tokens == tuple(self.ahead(r) for r in range(len(self.said)))
            assert stats.sent == tuple(self.count)


RouterMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestRouter = RouterMachine.TestCase


def test_calm_traffic_is_spread() -> None:
    router = Router(RouterConfig(affinity=False), 3, BLOCK)
    for sid in range(9):
        replica = router.choose(0, (0, 1, 2), ask())
        router.sent(0, sid, replica, ask())
        router.ended(sid)
    assert router.stats().sent == (3, 3, 3)


def test_a_known_prompt_goes_where_it_is_cached_while_that_one_keeps_up() -> None:
    """Three tenants' prompts settle on three replicas; a run on one of them spills over instead of queueing."""
    router = Router(RouterConfig(imbalance_tokens=200, kv_events=False), 3, BLOCK)
    home: dict[tuple[bytes, ...], set[int]] = {}
    for sid in range(30):
        chain = CHAINS[sid % 3]
        replica = router.choose(0, (0, 1, 2), ask(chain))
        home.setdefault(chain, set()).add(replica)
        router.sent(0, sid, replica, ask(chain))
        router.ended(sid)
    assert sorted(len(replicas) for replicas in home.values()) == [1, 1, 1]
    assert len(set.union(*home.values())) == 3
    assert sum(router.stats().affine_tokens) == 27 * 6 * BLOCK
    for sid in range(100, 140):
        router.sent(0, sid, router.choose(0, (0, 1, 2), ask(CHAINS[0])), ask(CHAINS[0]))
    ahead = router.stats().ahead_tokens
    assert max(ahead) - min(ahead) < 200 + 100 + 30, "no replica is further behind than the rule and one request"


def test_events_tell_what_a_guess_would_not_know() -> None:
    """Evicted: the guess would go on believing. Computed for another gateway: the guess would never learn."""
    chain = CHAINS[0]
    request = ask(chain, 6 * BLOCK + 4)
    router = Router(RouterConfig(), 2, BLOCK)
    router.sent(0, 0, 1, request)
    router.ended(0)
    assert router.choose(0, (0, 1), request) == 0, "aborted before it was computed: nothing is there"
    router.hear_kv(1, chain, ())
    assert router.choose(0, (0, 1), request) == 1
    router.hear_kv(0, chain, ())
    router.hear_kv(1, (), chain[2:])
    assert router.choose(0, (0, 1), request) == 0
    router.lose(0)
    assert router.choose(0, (0, 1), request) == 1, "two blocks are more than none"


def test_what_is_on_its_way_counts_before_that_replica_has_said_so() -> None:
    """A stampede computes its new prefix once on each replica, however late the events are."""
    router = Router(RouterConfig(), 2, BLOCK)
    request = ask(CHAINS[0], 6 * BLOCK + 4, 1)
    for sid in range(6):
        router.sent(0, sid, router.choose(0, (0, 1), request), request)
    assert router.stats().sent == (3, 3)
    assert router.stats().affine_tokens == (2 * 6 * BLOCK, 2 * 6 * BLOCK)
    for sid in range(6):
        router.ended(sid)
    router.check()
    router.sent(0, 6, 0, request)
    assert router.stats().affine_tokens == (2 * 6 * BLOCK, 2 * 6 * BLOCK), "none of them came to an end of its prompt"


def test_gateways_with_a_stale_picture_do_not_all_go_to_the_same_replica() -> None:
    """Each of 400 has sent one request somewhere, has seen nothing since, and takes replica 2 for the idlest."""
    rng = random.Random(5)
    chosen: dict[bool, list[int]] = {True: [], False: []}
    for _ in range(400):
        router = Router(RouterConfig(affinity=False), 4, BLOCK)
        for replica, tokens in enumerate((300, 200, 100, 200)):
            router.sent(0, replica, replica, ask(prompt=tokens))
        for stale, at_ns in ((False, S_NS), (True, S_NS + 1)):
            chosen[stale].append(router.choose(at_ns, (0, 1, 2, 3), ask(draw=rng.randrange(2**62))))
    assert set(chosen[False]) == {2}
    shares = [chosen[True].count(replica) / 400 for replica in range(4)]
    assert shares[2] == max(shares) < 0.6, "one of two drawn of four: half of them at most, and chance"
    assert shares[0] == 0 and min(shares[1], shares[3]) > 0.12, "and the worst of them never beats another"


def test_progress_makes_a_picture_fresh() -> None:
    router = Router(RouterConfig(affinity=False), 3, BLOCK)
    router.sent(0, 0, 0, ask())
    router.sent(0, 1, 0, ask())
    late = 5 * S_NS
    drawn = {router.choose(late, (0, 1, 2), ask(draw=draw)) for draw in range(12)}
    assert drawn == {1, 2}, "replica 0 is worse than any"
    router.started(1)
    assert {router.choose(late, (0, 1, 2), ask(draw=draw)) for draw in range(12)} == {1}

"""Five promises of the replica's batcher and prefix cache, on random traces of 10,000 steps with all that happens.

Bursts, lulls, stampedes, follow-ups, aborts, deadlines, preemptions, pins that come and go, steps that raise, rows that
give nan. ``ReplicaWorld`` judges every single action besides; here each promise is looked at over the whole trace, from
what the runner was told and what the KV blocks hold. There is no operation that empties the cache, so none is drawn.

D1 *Books*. After each step every block is free, evictable or in use, and in use exactly as often as running tables and
   pins hold it; whatever can be found by its name is in one block, and that block holds it; a pin stays for its time,
   under the cap.
D2 *Poison*. A block that nobody holds and nobody can find is spoiled at once; still every row reads its own prefix, and
   every answer is the one that it would have got alone.
D3 *Permutation*. A machine that numbers its blocks otherwise is told the same: it says the same, in its own numbers.
D8 *Stampede*. Nobody who is taken in computes a block again that could be found; many who bring the same new prefix at
   once compute it once; a step that raised leaves nothing to be found that was not there before it.
D10 *Liveness*. Nothing waits while nothing runs; when nothing new comes, all that was accepted ends.

Every promise is looked at in every step, and so are the world's and the machine's own books.

Mutations, each in a copy in which worlds and machines say nothing themselves, and the promise that named it:
D1: evicted names stay in the index; a pin holds no reference, goes too early, or is one above the cap; a hit in use
    counts as one reference; names kept after nan; a decode row's next block is its last one
D2: one hit too many claimed
D3: the lowest number of the unused goes first; a victim is chosen by its blocks' numbers; a table's last block is lost
D8: a prompt's blocks are named after their step, or when it is whole; hits cut by one; names kept after a failed step
D10: a blocked head stops what is in prefill; preempted sequences are forgotten
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass

import pytest
from msgspec.structs import replace

from engine.config import BatcherConfig, FairnessConfig, PrefixConfig, ReplicaConfig
from engine.events import Ended, Grow, ReplicaAction, RunStep, SeqStart
from engine.policy.replica import Replica
from tests.policy.fair_world import FairWorld
from tests.policy.worlds import ReplicaWorld, follow, said_after

STEPS = 10_000
SIZE = 3  # tokens a block: borders, full blocks and rests all come often
NEW = 10**7  # tokens from here on are a stampede's own


@dataclass
class Stampede:
    """Many with one new prefix. Undisturbed: none was put back, given up or spoiled; one at least always held it."""

    sids: list[int]
    chain: list[bytes]  # of the prefix
    own_tokens: int  # beside the prefix, over all of them
    found: int = 0
    disturbed: bool = False


class Trace:
    """One world, its shadow with other block numbers, and what was seen so far."""

    def __init__(self, seed: int) -> None:
        r = self.r = random.Random(seed)
        config = ReplicaConfig(
            batcher=BatcherConfig(
                step_tokens=(40, 24, 16, 20)[seed % 4], slots=r.choice([4, 8]), reserved_slots=1,
                reserved_blocks=r.choice([0, 4]), max_multi_steps=r.choice([4, 16]),
            ),
            prefix=PrefixConfig(block_tokens=SIZE, blocks=r.choice([45, 60]), pinned_blocks=4, pin_ttl_s=5e-4),
            fairness=FairnessConfig(enabled=seed % 2 == 0), weights={"b": 3.0},
        )
        self.ttl_ns = config.pin_ttl_ns
        self.most_blocks = config.prefix.blocks - config.prefix.pinned_blocks - config.batcher.reserved_blocks
        self.world = FairWorld(config) if config.fairness.enabled else ReplicaWorld(config)
        self.pool = self.world.pool
        self.shadow = Replica(config)
        self.number = list(range(self.pool.total))  # block -> its number in the shadow
        r.shuffle(self.number)
        self.shadow.batcher.pool.take((), self.pool.total)
        self.shadow.batcher.pool.release(self.number)  # from now on they are given out in this order
        self.told = 0  # entries of the journal that the shadow knows
        self.prompts: dict[int, tuple[str, list[int]]] = {}
        self.names: dict[bytes, int] = {}  # what can be found, and where
        self.pins: dict[int, tuple[int, bytes]] = {}  # block -> when it was seen pinned first, and its name
        self.stampedes: list[Stampede] = []
        self.seen: Counter[str] = Counter()

    # ------------------------------------------------------------ what happens

    def arrivals(self, crowd: int) -> None:
        r, world = self.r, self.world
        if r.random() < 0.01:
            self.stampede()
        for _ in range(r.choice([0, 0, 1, 2, 3]) if len(world.open) < crowd else 0):
            tenant, family = r.choice("aabc"), r.randrange(4)
            tokens = [100 + family] * (7 * family) + [1000 * r.randrange(3) + i for i in range(r.randrange(1, 15))]
            if world.finished and r.random() < 0.3:  # a conversation goes on
                tenant, before = r.choice(world.finished)
                tokens = [*before, r.randrange(9)]
            if r.random() < 0.01:  # as long as may be: with its answer it needs all blocks that it can ever have
                tokens = [NEW - 1] * (SIZE * self.most_blocks - 12)
            self.submit(
                tokens, max_tokens=r.choice([1, 3, 6, 9, 12]), priority=r.choice([0, 1, 1, 2, 2]), tenant=tenant,
                pinned_blocks=r.choice([0, 0, 2]), late_ns=r.choice([0, 0, 0, 5_000]), endless=r.random() < 0.5,
                **({"start_by_ns": world.now_ns + 10_000} if r.random() < 0.2 else {}),
            )
        if world.open and r.random() < 0.1:
            world.abort(r.choice([*world.open]))

    def submit(self, tokens: list[int], **more: object) -> int:
        sid = self.world.submit(tokens, **more)  # type: ignore[arg-type]
        self.prompts[sid] = str(more.get("tenant", "t")), list(tokens)
        return sid

    def stampede(self) -> None:
        self.seen["stampedes"] += 1
        prefix = [NEW + self.seen["stampedes"]] * (SIZE * self.r.randrange(2, 6) + 1)
        many = [[*prefix, n] for n in range(self.r.randrange(3, 9))]
        sids = [self.submit(tokens, max_tokens=2, priority=1) for tokens in many]
        full = (len(prefix) // SIZE) * SIZE
        chain = list(self.world.open[sids[0]].chain[: full // SIZE])
        self.stampedes.append(Stampede(sids, chain, sum(len(tokens) - full for tokens in many)))

    def step(self, crowd: int) -> bool:
        """One turn with all that is looked at. False: there was nothing to run."""
        r, world = self.r, self.world
        world.now_ns += r.choice([1, 500, 1_000, 30_000])
        self.arrivals(crowd)
        known = {sid: self.pool.match(a.chain, len(a.tokens)) for sid, a in world.open.items() if not a.running}
        world.plan()
        self.d10_nothing_waits_while_nothing_runs()
        if (step := world.step) is None:
            return False
        begun = self.d8_nobody_computes_what_could_be_found(step, known)
        fault = r.choice(["step", "nan"]) if r.random() < 0.04 else ""
        world.run(r.choice([1, 99]), fault, r.randrange(4))
        self.look(fault, begun)
        return True

    def look(self, fault: str, begun: list[bytes]) -> None:
        if fault == "step":
            self.d8_a_step_that_raised_leaves_nothing(begun)
        self.d1_books(fault)
        self.d2_poison()
        self.d3_permutation()
        self.d8_a_stampede_computes_its_prefix_once()

    # ------------------------------------------------------------ the promises

    def d1_books(self, fault: str) -> None:
        pool, world, stats = self.pool, self.world, self.pool.stats()
        blocks = range(pool.total)
        tables = Counter(block for a in world.open.values() if a.running for block in a.table)
        for block in blocks:
            assert pool.references(block) == tables[block] + pool.is_pinned(block), "D1: held as often as it is counted"
        used = sum(pool.references(block) > 0 for block in blocks)
        assert stats.free + stats.evictable + used == pool.total, "D1: free, evictable or in use, and nothing else"
        assert stats.used == used and stats.pinned == sum(map(pool.is_pinned, blocks)) <= pool.pin_cap, "D1: pins, cap"
        self.names = {d: found[0] for d in world._findable if (found := pool.match((d,), SIZE + 1))}
        assert len(set(self.names.values())) == len(self.names), "D1: a block has one name"
        for digest, block in self.names.items():
            assert world.content[block] == list(world._truth[digest]), "D1: what is found is what its name says"
        unused = sum(pool.references(block) == 0 for block in self.names.values())
        assert stats.evictable == unused, "D1: evictable are those unused that can be found"
        self._pins_stay(fault)

    def _pins_stay(self, fault: str) -> None:
        pool, now_ns = self.pool, self.world.now_ns
        for block, (since_ns, name) in self.pins.items():
            if now_ns < since_ns + self.ttl_ns and not fault:  # a fault voids the pins of what it spoiled
                assert pool.is_pinned(block) and self.names.get(name) == block, "D1: a pinned block is never evicted"
                self.seen["pins kept"] += 1
        named = {block: name for name, block in self.names.items()}
        old = self.pins
        self.pins = {
            block: old[block] if block in old and old[block][1] == named[block] else (now_ns, named[block])
            for block in range(pool.total) if pool.is_pinned(block)
        }

    def d2_poison(self) -> None:
        pool, world = self.pool, self.world
        for asked in world.open.values():
            if asked.running:
                held = [content for block in asked.table for content in world.content[block]][: asked.computed]
                assert held == asked.states[: asked.computed], "D2: a row reads its own prefix, and never a freed block"
        holding = set(self.names.values())
        for block in range(pool.total):
            if pool.references(block) == 0 and block not in holding:
                world.content[block] = [None] * SIZE
        for sid in [sid for sid in self.prompts if sid in world.endings]:
            tenant, prompt = self.prompts.pop(sid)
            self.seen[world.endings[sid].reason] += 1
            if world.endings[sid].reason in ("stop", "length"):
                said = world.answers.get(sid, [])
                assert said == self.alone(tenant, prompt, len(said)), "D2: the answer is the one given to it alone"
                self.seen["answers"] += 1

    def alone(self, tenant: str, prompt: list[int], count: int) -> list[int]:
        """What the model says to this prompt by itself: ``count`` tokens, an end token counting as 0."""
        state = int.from_bytes(self.world.hasher.root(tenant, "m")[:8], "little")
        for token in prompt:
            state = follow(state, token)
        said: list[int] = []
        while len(said) < count:
            said.append(said_after(state) or 0)
            state = follow(state, said[-1])
        return said

    def d3_permutation(self) -> None:
        for now_ns, event, actions in self.world.journal[self.told :]:
            want = [self.renumbered(action) for action in actions]
            assert self.shadow.handle(now_ns, event) == want, "D3: block numbers decide nothing"
        self.told = len(self.world.journal)

    def renumbered(self, action: ReplicaAction) -> ReplicaAction:
        if not isinstance(action, RunStep):
            return action
        start = (SeqStart(s.sid, s.computed, tuple(self.number[b] for b in s.blocks)) for s in action.start)
        grow = (Grow(g.sid, tuple(self.number[b] for b in g.blocks)) for g in action.grow)
        return replace(action, start=tuple(start), grow=tuple(grow))

    def d8_nobody_computes_what_could_be_found(self, step: RunStep, known: dict[int, list[int]]) -> list[bytes]:
        """Chunks are planned in order, each taken in just before its own; the names of all that they fill."""
        begun: list[bytes] = []
        starts = {start.sid: start for start in step.start}
        fresh = {block for start in step.start for block in start.blocks[start.computed // SIZE :]}
        fresh |= {block for grow in step.grow for block in grow.blocks}
        for chunk in step.chunks:
            asked = self.world.open[chunk.sid]
            first = asked.computed // SIZE
            if chunk.sid in starts and first < min(len(asked.chain), (len(asked.tokens) - 1) // SIZE):
                name, before = asked.chain[first], known.get(chunk.sid, [])
                there = len(before) > first and self.pool.match((name,), SIZE + 1) == [before[first]]
                there = there and before[first] not in fresh  # not even evicted on the way
                assert name not in begun and not there, "D8: nobody computes again what could be found"
                self.seen["prefix computed"] += 1
            begun += asked.chain[first : (asked.computed + chunk.tokens) // SIZE]
        return begun

    def d8_a_step_that_raised_leaves_nothing(self, begun: list[bytes]) -> None:
        for name in begun:
            if name not in self.names:
                assert not self.pool.match((name,), SIZE + 1), "D8: what a failed step began cannot be found"
                self.seen["failed blocks"] += 1

    def d8_a_stampede_computes_its_prefix_once(self) -> None:
        world = self.world
        for many in self.stampedes:
            still = [world.open[sid] for sid in many.sids if sid in world.open]
            found = self.pool.match(many.chain, 1 << 30)
            let_go = len(found) < many.found or not all(map(self.pool.references, found))
            many.disturbed |= bool(still) and (let_go or any(asked.preemptions for asked in still))
            many.found = len(found)
        for many in [many for many in self.stampedes if all(sid in world.endings for sid in many.sids)]:
            self.stampedes.remove(many)
            ends: list[Ended] = [world.endings[sid] for sid in many.sids]
            if many.disturbed or any(e.preemptions or e.reason not in ("stop", "length") for e in ends):
                continue
            self.seen["undisturbed"] += 1
            want = len(many.chain) * SIZE + many.own_tokens
            assert sum(e.computed_tokens for e in ends) == want, "D8: a stampede computes its new prefix once"

    def d10_nothing_waits_while_nothing_runs(self) -> None:
        waiting = [a for a in self.world.open.values() if not a.running]
        self.seen["waiting"] += bool(waiting)
        assert self.world.step is not None or not self.world.open, "D10: nothing waits while nothing runs"
        rows = self.world.step.shape if self.world.step else None
        assert rows is None or rows.decode_rows + rows.prefill_rows, "D10: a step takes somebody on"

    def d10_all_that_was_accepted_ends(self) -> None:
        """Nothing new comes. Even at one token a step it would be over by then."""
        left = sum(len(a.tokens) + a.submit.max_tokens for a in self.world.open.values()) + 2
        while self.world.turn():
            left -= 1
            assert left, "D10: what was accepted ends"
        assert not self.world.open, "D10: nobody is left behind"


@pytest.mark.parametrize("seed", range(4))
def test_ten_thousand_steps(seed: int) -> None:
    trace = Trace(seed)
    steps = 0
    while steps < STEPS:
        if steps % 250 == 0:  # lulls and rushes
            crowd = trace.r.choice([2, 6, 14, 30])
        steps += trace.step(crowd)
        trace.world.check()
    trace.d10_all_that_was_accepted_ends()
    trace.world.check()
    counts, seen = trace.world.counts, trace.seen
    for event in ("hit", "shared in step", "resumed mid-answer", "preempted prefill", "preempted decode", "step failed",
                  "end failed", "abort waiting", "abort prefill", "abort decode", "multi"):
        assert counts[event] >= 10, f"the trace has been through it: {event}"
    for event in ("stop", "length", "aborted", "deadline", "failed", "waiting", "answers", "pins kept",
                  "prefix computed", "failed blocks", "undisturbed"):
        assert seen[event] >= 10, f"the promise was put to the test: {event}"
    assert trace.pool.stats().evictions > 1_000

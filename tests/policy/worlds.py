"""A replica's world in plain Python: a runner that keeps every token, and a model of what each KV block holds.

It drives a ``Replica`` as a driver would, works out from first principles what every action must be, and compares. A
position of the KV depends on its token and on all tokens before it; ``follow`` folds them into one number, so a block
that holds the wrong prefix, another tenant's, or garbage cannot go unnoticed. Nothing here is taken from the batcher's
own books; the prefix cache is only asked what it finds (``match``) and what it pins (``is_pinned``).
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import takewhile

import msgspec
from msgspec.structs import replace

from engine.config import ReplicaConfig
from engine.events import (
    Abort,
    Chunk,
    Drain,
    Ended,
    EndReason,
    Filled,
    FirstToken,
    Plan,
    Pressure,
    ReplicaAction,
    ReplicaEvent,
    RunStep,
    SeqEnd,
    StepDone,
    StepFailed,
    StepShape,
    Submit,
    Waiting,
)
from engine.model.blockhash import Hasher
from engine.policy.replica import Replica
from engine.units import ms_to_ns

MASK = (1 << 64) - 1
NEVER_NS = 1 << 62


def follow(before: int, token: int) -> int:
    """What the KV of a token's position depends on: all tokens before it, and itself."""
    return (before * 6364136223846793005 + 2 * token + 1442695040888963407) & MASK


def said_after(state: int) -> int | None:
    """The model: greedy, so the same words lead to the same answer. ``None`` is the end token."""
    mixed = ((state ^ (state >> 29)) * 0xBF58476D1CE4E5B9) & MASK
    return None if mixed % 17 == 0 else mixed >> 40


@dataclass(eq=False)
class Asked:
    """One request as the runner knows it."""

    submit: Submit
    tokens: list[int]  # prompt and outputs
    states: list[int]  # follow() at each of them
    chain: list[bytes]  # digests of the full blocks known so far
    endless: bool  # ignores the end token
    priority: int  # as which it is treated
    since_ns: int  # when it began to wait
    waited_ns: int = 0  # before that
    computed: int = 0
    table: list[int] = field(default_factory=list)
    running: bool = False
    decoding: bool = False
    outputs: int = 0
    first_ns: int | None = None
    cached_tokens: int = 0
    computed_tokens: int = 0
    preemptions: int = 0
    preempted_at: int = -1  # plan
    held: bool = False  # off the hardware after a step that raised; it goes on from where it stood

    @property
    def sid(self) -> int:
        return self.submit.sid

    @property
    def rank(self) -> tuple[int, int, int]:
        return (self.priority, self.submit.sent_ns, self.submit.sid)

    @property
    def queue_ns(self) -> int:
        return 0 if self.first_ns is None else self.first_ns - self.submit.sent_ns

    def ended(self, reason: EndReason) -> Ended:
        return Ended(
            self.sid, reason, self.computed_tokens, self.cached_tokens, self.outputs, self.queue_ns, self.preemptions
        )


class ReplicaWorld:
    """Everything round one replica. ``now_ns`` belongs to the test."""

    def __init__(self, config: ReplicaConfig) -> None:
        self.config, self.batcher = config, config.batcher
        self.machine = Replica(config)
        self.pool = self.machine.batcher.pool
        self.size = config.prefix.block_tokens
        self.hasher = Hasher(b"k" * 16, self.size)
        self.now_ns = 0
        self.open: dict[int, Asked] = {}
        self.endings: dict[int, Ended] = {}
        self.answers: dict[int, list[int]] = {}
        self.finished: list[tuple[str, list[int]]] = []  # conversations that can go on
        self.counts: Counter[str] = Counter()  # what the trace has been through
        self.journal: list[tuple[int, ReplicaEvent, list[ReplicaAction]]] = []
        self.step: RunStep | None = None
        self.steps = self.plans = 0
        self.submitted = -1
        self.draining = False
        self.content: list[list[int | None]] = [[None] * self.size for _ in range(config.prefix.blocks)]
        self._truth: dict[bytes, tuple[int, ...]] = {}  # digest -> what a block of that name must hold
        self._findable: dict[bytes, None] = {}  # digests found at the last look, and those touched since
        self._told: dict[int, None] = {}  # in the runner's running set, until stopped
        self._left: dict[int, None] = {}  # ended in the runner by itself: stopping it is a no-op
        self._again: dict[int, None] = {}  # the next step may stop these: the runner may have heard of it, or not
        self._new: dict[int, None] = {}  # taken in by the step in flight
        self._admitted: dict[int, None] = {}  # running, in the order in which they were taken in
        self.suspects: list[list[int]] = []  # groups to be tried after a step that raised, the next one last
        self.poison: dict[int, int] = {}  # sid -> position: a step that computes it raises
        self._resumed: set[int] = set()  # of those that were held, who goes on in the step in flight
        self._trial: list[int] = []  # the group that the step in flight tries
        self._last_pressure: Pressure | None = None
        self._query_tokens = self._hit_tokens = self._refused = 0

    # ------------------------------------------------------------ what comes in

    def submit(
        self, tokens: list[int], max_tokens: int = 4, priority: int = 1, tenant: str = "t", pinned_blocks: int = 0,
        late_ns: int = 0, start_by_ns: int = NEVER_NS, endless: bool = False,
    ) -> int:
        """A request that was sent ``late_ns`` ago."""
        root = self.hasher.root(tenant, "m")
        chain = self.hasher.chain(root, tokens)
        states, state = [], int.from_bytes(root[:8], "little")
        for token in tokens:
            state = follow(state, token)
            states.append(state)
        self.submitted += 1
        ask = Submit(
            sid=self.submitted, rid=self.submitted, tenant=tenant, traffic_class=f"class-{priority}",
            priority=priority, sent_ns=self.now_ns - late_ns, start_by_ns=start_by_ns, prompt_tokens=len(tokens),
            max_tokens=max_tokens, blocks=chain, pinned_blocks=min(pinned_blocks, len(chain)),
        )
        asked = Asked(ask, list(tokens), states, list(chain), endless, priority, ask.sent_ns)
        for index, digest in enumerate(chain):
            self._name(asked, index, digest)
        worst = -(-(len(tokens) + max_tokens) // self.size)
        room = self.config.prefix.blocks - self.config.prefix.pinned_blocks - self.batcher.reserved_blocks
        if self.draining or worst > room:
            self._expect(ask, [asked.ended("draining" if self.draining else "failed")])
            self._refused += 1
        else:
            self._expect(ask, [])
            self.open[ask.sid] = asked
        return ask.sid

    def abort(self, sid: int) -> None:
        """In whatever state it is; unknown and ended ones are no-ops."""
        asked = self.open.get(sid)
        self._expect(Abort(sid), [] if asked is None else [asked.ended("aborted")])
        if asked is not None:
            self.counts["abort " + ("decode" if asked.decoding else "prefill" if asked.running else "waiting")] += 1
            self.counts["abort preempted"] += not asked.running and asked.preemptions > 0
            self._end(asked)

    def drain(self) -> None:
        """From now on every Submit is refused."""
        self._expect(Drain(), [])
        self.draining = True

    def turn(self, want: int = 1, fault: str = "", pick: int = 0) -> bool:
        """Plan, and run up to ``want`` steps of the plan. False when there was nothing to run."""
        self.plan()
        if self.step is None:
            return False
        self.run(want, fault, pick)
        return True

    def finish(self, want: int = 1) -> None:
        """Nothing new comes: everything must end, within the number of steps that one token a step would take."""
        left = sum(len(a.tokens) + a.submit.max_tokens for a in self.open.values()) + 2
        while self.turn(want):
            self.now_ns += 1_000
            left -= 1
            assert left, "liveness: what was accepted ends"
        assert not self.open, "liveness: nothing is left when nothing runs"
        stats = self.machine.stats()
        assert (stats.running, stats.waiting, stats.queued_tokens) == (0, 0, 0), "quiet: nobody is left"
        assert stats.prefix.used == stats.prefix.pinned, "quiet: only pins hold blocks"
        assert stats.prefix.free + stats.prefix.evictable == stats.prefix.total - stats.prefix.pinned

    # ------------------------------------------------------------ the plan

    def plan(self) -> None:
        """What Plan answers, checked from scratch."""
        assert self.step is None
        self.plans += 1
        before = {sid: self.pool.match(a.chain, len(a.tokens)) for sid, a in self.open.items() if not a.running}
        late = [a for a in self.open.values() if a.first_ns is None and a.submit.start_by_ns < self.now_ns]
        late.sort(key=lambda a: (a.submit.start_by_ns, a.sid))
        actions = self._handle(Plan())
        assert actions[: len(late)] == [a.ended("deadline") for a in late], "deadline: those never scheduled, no other"
        for asked in late:
            self._end(asked)
        for asked in self._aged():
            self._promote(asked)
        actions = actions[len(late) :]
        if self.open:
            assert actions and isinstance(actions[0], RunStep), "liveness: what waits runs when nothing else does"
            self._apply(actions.pop(0), before)  # type: ignore[arg-type]
        pressure = self._pressure()
        told = [replace(p, waiting=tuple(sorted(p.waiting, key=lambda w: w.traffic_class))) for p in actions]
        assert told == ([pressure] if pressure != self._last_pressure else []), "pressure: true, and only on change"
        self._last_pressure = pressure

    def _aged(self) -> list[Asked]:
        """Who is to be treated as standard from now on, in the order in which they came to it."""
        age_ns = ms_to_ns(self.batcher.age_ms)
        waiting = [a for a in self.open.values() if age_ns and not a.running and a.priority > 1]
        due = sorted((a.since_ns + age_ns - a.waited_ns, a.sid) for a in waiting)
        return [self.open[sid] for at_ns, sid in due if at_ns < self.now_ns]

    def _promote(self, asked: Asked) -> None:
        asked.priority -= 1
        self.counts["aged"] += 1

    def _apply(self, step: RunStep, before: dict[int, list[int]]) -> None:
        self.step = step
        assert step.step == self.steps, "step: counted without gaps"
        ran = self._running()
        victims = self._stop(step.stop)
        stands = {start.sid: (start.computed, start.blocks) for start in step.start}
        for asked in self._running():
            computed, blocks = stands.get(asked.sid, (-1, ()))
            if asked.held and (computed, [*blocks[: len(asked.table)]]) != (asked.computed, asked.table):
                self.counts["preempted held"] += 1
                self._put_back(asked)  # by this very plan, or the runner would hear where it stands
        self._resumed = {start.sid for start in step.start if self.open[start.sid].held}
        self._trial = self._next_trial()
        self._start(step)
        back = [asked.rank for asked in ran if asked.preempted_at == self.plans]
        kept = [asked.rank for asked in ran if asked.preempted_at != self.plans]
        assert not back or not kept or min(back) > max(kept), "preemption: the least important pay"
        for grow in step.grow:
            asked = self.open[grow.sid]
            assert asked.running and asked.decoding, "grow: a decode row that goes on"
            assert len(asked.table) * self.size == asked.computed, "grow: not before it is needed"
            self._fresh(grow.blocks)
            asked.table += grow.blocks
        if self._new:  # growing rows may dip into what is kept; admissions may not
            last = self.open[[*self._new][-1]]  # the least important of them
            kept = self._kept(last, [a for a in self._running() if a is not last])
            assert self._available(self._running()) >= kept, "blocks: free for what is to come, and for critical"
        assert list(self._told) == [sid for sid in self._told if sid in self.open and self.open[sid].running]
        self._shape(step)
        if self._trial:
            assert not set(self._told) - {a.sid for a in ran}, "trial: no newcomers"
            chunks = [c.sid for c in step.chunks]
            assert set(chunks) == set(self._trial) and not step.grow, "trial: the whole group, and nobody else"
            self.counts["trial"] += 1
        else:
            self._strict(step, before, victims)

    def _next_trial(self) -> list[int]:
        """By the rule, over lists: the last group of which somebody runs."""
        groups = [[sid for sid in group if sid in self.open and self.open[sid].running] for group in self.suspects]
        self.suspects = groups[: max((n + 1 for n, group in enumerate(groups) if group), default=0)]
        return self.suspects[-1] if self.suspects else []

    def _stop(self, stop: tuple[int, ...]) -> int:
        """Takes them off; the number of decode rows among those that were put back."""
        assert len(set(stop)) == len(stop), "stop: once each"
        victims = 0
        for sid in stop:
            assert sid in self._told or sid in self._left or sid in self._again, "stop: only what runs"
            self._told.pop(sid, None)
            self._left.pop(sid, None)
            asked = self.open.get(sid)
            if asked is not None and asked.running and not asked.held:
                victims += asked.decoding
                self.counts["preempted " + ("decode" if asked.decoding else "prefill")] += 1
                self._put_back(asked)
        must = {sid for sid in self._again if sid in self.open}
        assert must <= set(stop), "stop: all that were taken off between two steps, and again what a failed step said"
        self._again.clear()
        return victims

    def _put_back(self, asked: Asked) -> None:
        """Into the waiting room; its blocks are no longer its own."""
        asked.running = asked.decoding = asked.held = False
        asked.preemptions += 1
        asked.preempted_at, asked.since_ns = self.plans, self.now_ns
        asked.computed, asked.table = 0, []
        del self._admitted[asked.sid]

    def _hold(self, asked: Asked) -> None:
        """Off the hardware with what it has computed, and with room for its next token."""
        asked.held, asked.decoding = True, False
        self._again[asked.sid] = None
        self.counts["held"] += 1

    def _separate(self) -> None:
        """The rows of a trial that went well stay out of the next one."""
        for asked in self._running():
            if asked.decoding:
                self._hold(asked)

    def _start(self, step: RunStep) -> None:
        begun: set[int] = set()  # blocks that this very step fills
        self._new.clear()
        for start in step.start:
            asked, cached = self.open[start.sid], start.computed // self.size
            if asked.held:
                assert len(start.blocks) == -(-len(asked.tokens) // self.size), "table: with room for the next token"
                self._fresh(start.blocks[len(asked.table) :])
                asked.table, asked.held = list(start.blocks), False
                self._told[start.sid] = None
                continue
            assert not asked.running, "start: only what waits"
            assert start.computed % self.size == 0 and start.computed < len(asked.tokens), "hit: full blocks, never all"
            assert len(start.blocks) == -(-len(asked.tokens) // self.size), "table: long enough for all known tokens"
            assert len(set(start.blocks)) == len(start.blocks), "table: no block twice"
            self._fresh(start.blocks[cached:])
            self.counts["shared in step"] += bool(begun & set(start.blocks[:cached]))
            self.counts["hit"] += cached > 0
            self.counts["resumed mid-answer"] += asked.outputs > 0
            begun |= set(start.blocks[cached:])
            asked.table, asked.computed, asked.running = list(start.blocks), start.computed, True
            asked.waited_ns += self.now_ns - asked.since_ns
            self._admitted[start.sid] = self._new[start.sid] = None
            if asked.first_ns is None:
                asked.first_ns, asked.cached_tokens = self.now_ns, start.computed
                self._query_tokens += asked.submit.prompt_tokens
                self._hit_tokens += start.computed
            self._told[start.sid] = None
        running = self._running()
        assert len(running) <= self.batcher.slots, "slots: never exceeded"
        rest = sum(a.priority > 0 for a in running)
        assert rest <= self.batcher.slots - self.batcher.reserved_slots, "slots: the reserve is for critical"

    def _shape(self, step: RunStep) -> None:
        rows = [a for a in self._running() if a.decoding]
        chunks = [(self.open[c.sid], c.tokens) for c in step.chunks]
        for asked, tokens in chunks:
            assert asked.running and not asked.decoding, "chunk: only of what is in prefill"
            assert 0 < tokens <= len(asked.tokens) - asked.computed, "chunk: of tokens that are known"
        for asked in rows:
            assert len(asked.tokens) == asked.computed + 1, "decode: one token at a time"
            assert len(asked.tokens) <= len(asked.table) * self.size, "decode: with room for it"
        assert {s.sid for s in step.start} - self._resumed <= {c.sid for c in step.chunks}, "start: runs at once"
        assert step.shape == StepShape(
            prefill_tokens=sum(n for _, n in chunks), prefill_rows=len(chunks), decode_rows=len(rows),
            decode_kv_tokens=sum(len(a.tokens) for a in rows),
            attention_area=sum(n * (2 * a.computed + n) for a, n in chunks),
        ), "shape: what the step costs by"
        assert len(rows) + sum(n for _, n in chunks) <= self.batcher.step_tokens, "budget: never exceeded"
        critical = [a.submit.priority == 0 for a, _ in chunks]
        assert self._trial or all(critical) or not any(critical), "critical: no lower prompt beside it"
        if chunks and self.config.cost and not self._trial:
            contexts = sum(a.computed + n for a, n in chunks)
            within = self.config.cost.ns(step.shape) <= self._most_ns(step.shape, all(critical), contexts)
            assert within or (len(chunks) == 1 and chunks[0][1] <= self.size), "time: at most, or a block's worth"
        if chunks or len(self._running()) < len(self.open):
            assert step.at_most == 1, "at most one step while something waits"
        else:
            borders = [len(a.table) * self.size - a.computed for a in rows]
            limits = [a.submit.max_tokens - a.outputs for a in rows]
            assert step.at_most == min([self.batcher.max_multi_steps, *borders, *limits]), "until something is decided"

    # ------------------------------------------------------------ strict priority

    def _strict(self, step: RunStep, before: dict[int, list[int]], victims: int) -> None:
        """Who is served is served in order of rank; whoever is passed over could not have been taken in.

        A waiting head that cannot be taken in stops all waiting behind it, but not what already runs: it holds its
        blocks anyway. ``victims`` decode rows left while the budget was being filled, so it may be short by them.
        """
        served = [self.open[c.sid] for c in step.chunks]
        ranks = [a.rank for at, a in enumerate(served) if not self._behind_owner(a, served[:at])]
        assert ranks == sorted(ranks), "chunks: in order of rank"
        self._held_back(served)
        waiting = sorted((a for a in self.open.values() if not a.running), key=lambda a: a.rank)
        started = [self.open[sid].rank for sid in self._new]
        assert not started or not waiting or max(started) < waiting[0].rank, "admission: in order of rank"
        starved = [a.rank for a in self._running() if not a.decoding and a.sid not in {c.sid for c in step.chunks}]
        if starved:
            assert self._spent(step, victims, served, min(starved)[0] == 0), "prefill: all of it, while there is budget"
            assert min(starved) > max(ranks), "prefill: first come, first served"
        if waiting:
            head = waiting[0]
            held = self._waits_for_an_owner(head, served)
            spent = self._spent(step, victims, served, head.submit.priority == 0)
            if not spent or (ranks and ranks[-1] > head.rank and not held):
                assert not self._could_enter(head, before.get(head.sid, [])), "head: passed over only if it had no room"

    def _spent(self, step: RunStep, victims: int, served: list[Asked], critical: bool) -> bool:
        """Is the budget used up, for one more that is critical or not? Only a chunk that ends there may be cut.

        ``victims``: rows that left meanwhile. Beside a critical prompt there is no place for another.
        """
        spent = step.shape.decode_rows + step.shape.prefill_tokens + victims >= self.batcher.step_tokens
        full = spent or self._no_time(step.shape, victims, bool(served) and served[-1].submit.priority == 0)
        spent = spent or self._no_time(step.shape, victims, critical)
        spent = spent or (not critical and any(a.submit.priority == 0 for a in served))
        partial = [c.sid for c in step.chunks if c.tokens < len(self.open[c.sid].tokens) - self.open[c.sid].computed]
        assert not partial or (full and partial == [step.chunks[-1].sid]), "chunks: whole, but for the budget's last"
        return spent

    def _most_ns(self, shape: StepShape, critical: bool, contexts: int) -> int:
        """How long the step may be: others' leave what all rows behind it take, for a critical one's own step.

        ``contexts``: tokens in KV of the chunks' prompts, when it has run.
        """
        assert self.config.cost is not None
        count = shape.decode_rows + shape.prefill_rows
        rows = StepShape(decode_rows=count, decode_kv_tokens=shape.decode_kv_tokens + shape.decode_rows + contexts)
        own = 0 if critical else self.config.cost.ns(rows) - self.config.cost.ns(StepShape())
        return self.batcher.step_limit_ns - own

    def _no_time(self, shape: StepShape, victims: int, critical: bool) -> bool:
        """Would one more token, at worst at the longest context, make the step too long?"""
        if self.config.cost is None:
            return False
        longest = max(len(a.tokens) for a in self.open.values())
        more = StepShape(
            shape.prefill_tokens + 1, shape.prefill_rows + 1, shape.decode_rows + victims,
            shape.decode_kv_tokens + victims * longest, shape.attention_area + 2 * longest + 1,
        )
        return self.config.cost.ns(more) > self._most_ns(more, critical, more.prefill_rows * longest)

    def _owners(self, asked: Asked) -> list[Asked]:
        """Who was in prefill before this plan, and is computing what ``asked`` needs: it may go first."""
        need = -(-self.batcher.hold_back_tokens // self.size)
        found = []
        for owner in self._running():
            at = owner.computed // self.size + need - 1
            mine = asked.chain[: (len(asked.tokens) - 1) // self.size]
            served = owner.decoding or owner.sid in self._new or owner.priority != asked.priority
            if not served and at < min(len(mine), len(owner.chain)) and owner.chain[at] == mine[at]:
                found.append(owner)
        return found

    def _waits_for_an_owner(self, head: Asked, served: list[Asked]) -> bool:
        held = any(owner in served and self._outranks(head, owner) for owner in self._owners(head))
        self.counts["held back"] += held
        return held

    def _behind_owner(self, asked: Asked, before: list[Asked]) -> bool:
        return asked.sid in self._new and any(owner in before for owner in self._owners(asked))

    def _held_back(self, served: list[Asked]) -> None:
        """Whoever was taken in behind one that it outranks has let its owner go first, and nobody new."""
        for at, asked in enumerate(served):
            passed = list(takewhile(lambda a: self._outranks(asked, a), reversed(served[:at])))  # noqa: B023
            if asked.sid in self._new and passed:
                assert not any(a.sid in self._new for a in passed), "hold-back: nobody new overtakes"
                assert self._behind_owner(asked, served[:at]), "hold-back: behind its owner"
                self.counts["held back"] += 1

    def _outranks(self, one: Asked, two: Asked) -> bool:
        return one.rank < two.rank

    def _kept(self, last: Asked, beside: list[Asked]) -> int:
        """Blocks that must be free once ``last`` runs beside these. The share of ``ratio`` is the batcher's word."""
        future = 0
        for asked in (last, *beside):
            table = asked.table or [0] * -(-len(asked.tokens) // self.size)
            future += -(-(asked.submit.prompt_tokens + asked.submit.max_tokens - 1) // self.size) - len(table)
        share = {"full": 10**6, "none": 0, "ratio": self.machine.batcher.reserve.share}[self.batcher.reserve]
        kept = -(-future * share // 10**6)
        if last.priority:
            watermark = int(self.batcher.watermark * self.config.prefix.blocks) if beside else 0
            kept += max(self.batcher.reserved_blocks, watermark)
        return kept

    def _could_enter(self, head: Asked, before: list[int]) -> bool:
        """Were everything of lower priority put back, would there be a slot and blocks for it?

        ``before``: blocks that it would have hit before this plan; those still there after it were there meanwhile.
        """
        hits = [b for b, c in zip(before, self.pool.match(head.chain, len(head.tokens)), strict=False) if b == c]
        stay = [a for a in self._running() if a.priority <= head.priority]
        held = self._held(stay)
        need = -(-len(head.tokens) // self.size) - len([b for b in hits if b in held])
        slots = len(stay) < self.batcher.slots
        if head.priority:
            others = sum(a.priority > 0 for a in stay)
            slots = slots and others < self.batcher.slots - self.batcher.reserved_slots
        return slots and need + self._kept(head, stay) <= self.config.prefix.blocks - len(held)

    # ------------------------------------------------------------ the run

    def run(self, want: int = 1, fault: str = "", pick: int = 0) -> None:
        """The runner. ``fault``: "step" raises in the forward, "nan" spoils one row that was to give a token."""
        step, self.step = self.step, None
        assert step is not None
        touched = [a for a, _ in self._rows(step.chunks)]
        if fault == "step" or self._poisoned(self._rows(step.chunks)):
            self._fail(step)
        else:
            self._done(step, want, pick if fault == "nan" else None)
        for asked in touched:
            self._findable.update(dict.fromkeys(asked.chain))
        self._check_findable()

    def _poisoned(self, rows: list[tuple[Asked, int]]) -> bool:
        return any(a.computed <= self.poison.get(a.sid, -1) < a.computed + tokens for a, tokens in rows)

    def _fail(self, step: RunStep) -> None:
        rows = self._rows(step.chunks)
        writer: dict[int, int] = {}
        for asked, tokens in rows:
            for position in range(asked.computed, asked.computed + tokens):
                block = asked.table[position // self.size]
                writer[block] = asked.sid
                self.content[block][position % self.size] = None
        ran = [self.open[sid] for sid in self._admitted if self.open[sid].decoding]
        ran += [self.open[chunk.sid] for chunk in step.chunks]
        misled = [a for a in ran if any(writer.get(b, a.sid) != a.sid for b in a.table[: a.computed // self.size])]
        sure = [a for a in ran if a not in misled]
        got = self._handle(StepFailed("the forward raised"))
        guilty = ran[0] if len(ran) == 1 else None
        assert got == ([guilty.ended("failed")] if guilty else []), "step failed: only what raises alone has failed"
        self._tried([a.sid for a in sure])
        self._again.update(dict.fromkeys(step.stop))
        for start in step.start:
            self.open[start.sid].held = True
        for asked in ran:
            self._hold(asked)
        for asked in misled:
            self.counts["misled"] += 1
            self._put_back(asked)
        if guilty:
            self._end(guilty)
        else:
            sids = [a.sid for a in sure]
            middle = (len(sids) + 1) // 2
            self.suspects += [half for half in (sids[middle:], sids[:middle]) if half]
        self.counts["step failed"] += 1

    def _tried(self, sids: list[int]) -> None:
        if self.suspects:
            self.suspects[-1] = [sid for sid in self.suspects[-1] if sid not in sids]
            self.suspects = self.suspects if self.suspects[-1] else self.suspects[:-1]

    def _done(self, step: RunStep, want: int, spoiled: int | None) -> None:
        first: list[int] = []
        ends: list[SeqEnd] = []
        filled: list[Filled] = []
        chunks, steps = step.chunks, 0
        while not ends and steps < max(1, min(want, step.at_most)):
            rows = self._rows(chunks)
            if steps and self._poisoned(rows):
                break  # what ran before it is told; the next plan meets it again
            yielding = [a for a, n in rows if a.computed + n == len(a.tokens)]
            broken = yielding[spoiled % len(yielding)] if spoiled is not None and yielding else None
            failed = self._forward(rows, broken)
            for asked, tokens in rows:
                a_row = asked.outputs and asked.computed == len(asked.tokens) - 1  # as a chunk, where it was held
                asked.computed_tokens += 0 if a_row else tokens
                asked.computed += tokens
                if asked.sid not in failed:
                    self._fill(asked, filled)
            for asked in yielding:
                self._accept(asked, asked.sid in failed, first, ends)
            chunks, steps = (), steps + 1
        self.steps += steps
        self.counts["multi"] += steps > 1
        want_first = [FirstToken(sid, self.open[sid].queue_ns, self.open[sid].cached_tokens) for sid in first]
        want_ended = [self.open[e.sid].ended(e.reason) for e in ends]
        got = self._handle(StepDone(steps, tuple(first), tuple(ends), tuple(filled)))
        assert got == [*want_first, *want_ended], "step: first tokens, then ends"
        self._tried([c.sid for c in step.chunks])
        gone = [self.open[end.sid] for end in ends]
        for end, asked in zip(ends, gone, strict=True):
            self.counts["end " + end.reason] += 1
            self._told.pop(end.sid)
            self._left[end.sid] = None
            if end.reason == "failed":
                self._doubt(asked, gone)
            self.finished = [*self.finished[-7:], (asked.submit.tenant, list(asked.tokens))]
            self._end(asked)
        if self.suspects:
            self._separate()

    def _doubt(self, failed: Asked, gone: list[Asked]) -> None:
        """Who has read what it read, and has not given a token since, begins again."""
        for asked in self._running():
            if asked not in gone and not asked.decoding and set(asked.table) & set(failed.table):
                self.counts["put back in doubt"] += 1
                self._again[asked.sid] = None
                self._put_back(asked)

    def _rows(self, chunks: tuple[Chunk, ...]) -> list[tuple[Asked, int]]:
        rows = [(a, 1) for a in sorted(self._running(), key=lambda a: a.sid) if a.decoding]
        return rows + [(self.open[c.sid], c.tokens) for c in chunks]

    def _forward(self, rows: list[tuple[Asked, int]], broken: Asked | None) -> list[int]:
        """In every layer all KV is written, then all is read. The sids whose output is nan."""
        writer: dict[int, int] = {}
        for asked, tokens in rows:
            for position in range(asked.computed, asked.computed + tokens):
                block = asked.table[position // self.size]
                assert writer.setdefault(block, asked.sid) == asked.sid, "write: one sequence a block"
                self.content[block][position % self.size] = None if asked is broken else asked.states[position]
        failed = [] if broken is None else [broken.sid]
        again = True
        while again:  # whoever reads nan writes nan
            again = False
            for asked, tokens in rows:
                stop, at = asked.computed + tokens, 0
                held: list[int | None] = []
                for block in asked.table[: -(-stop // self.size)]:
                    held += self.content[block]
                    at += self.size
                held = held[:stop]
                if asked.sid in failed:
                    continue
                if failed and None in held:
                    failed.append(asked.sid)
                    again = True
                    for position in range(asked.computed, stop):
                        self.content[asked.table[position // self.size]][position % self.size] = None
                    continue
                assert held == asked.states[:stop], "read: every position holds this very prefix"
        return failed

    def _fill(self, asked: Asked, filled: list[Filled]) -> None:
        while asked.computed >= (len(asked.chain) + 1) * self.size:
            index = len(asked.chain)
            parent = asked.chain[-1] if asked.chain else self.hasher.root(asked.submit.tenant, "m")
            digest = self.hasher.extend(parent, asked.tokens[index * self.size : (index + 1) * self.size])
            asked.chain.append(digest)
            self._name(asked, index, digest)
            filled.append(Filled(asked.sid, index, digest))

    def _accept(self, asked: Asked, failed: bool, first: list[int], ends: list[SeqEnd]) -> None:
        token = said_after(asked.states[-1])
        if failed:
            ends.append(SeqEnd(asked.sid, "failed"))
        elif token is None and not asked.endless:
            ends.append(SeqEnd(asked.sid, "stop"))
        else:
            token = token or 0
            asked.tokens.append(token)
            asked.states.append(follow(asked.states[-1], token))
            asked.decoding = True
            asked.outputs += 1
            self.answers.setdefault(asked.sid, []).append(token)
            if asked.outputs == 1:
                first.append(asked.sid)
            if asked.outputs == asked.submit.max_tokens:
                ends.append(SeqEnd(asked.sid, "length"))

    # ------------------------------------------------------------ books

    def check(self) -> None:
        """The machine's own invariants, and its counters against ours."""
        self.machine.check()
        stats = self.machine.stats()
        running = len(self._running())
        assert (stats.step, stats.running, stats.waiting) == (self.steps, running, len(self.open) - running)
        assert stats.ended == len(self.endings) - self._refused
        assert (stats.prefix.query_tokens, stats.prefix.hit_tokens) == (self._query_tokens, self._hit_tokens)
        ours = sum(a.preemptions for a in self.open.values()) + sum(e.preemptions for e in self.endings.values())
        assert stats.preemptions == ours

    def _handle(self, event: ReplicaEvent) -> list[ReplicaAction]:
        actions = self.machine.handle(self.now_ns, event)
        self.journal.append((self.now_ns, event, list(actions)))
        for action in actions:
            if isinstance(action, Ended):
                assert action.sid not in self.endings, "end: exactly one for each Submit"
                self.endings[action.sid] = action
        assert self.machine.next_wake_ns() is None
        return actions

    def _expect(self, event: ReplicaEvent, actions: list[ReplicaAction]) -> None:
        assert self._handle(event) == actions

    def _end(self, asked: Asked) -> None:
        del self.open[asked.sid]
        self._admitted.pop(asked.sid, None)
        asked.running = False

    def _running(self) -> list[Asked]:
        return [a for a in self.open.values() if a.running]

    def _held(self, running: Iterable[Asked]) -> set[int]:
        held = {block for asked in running for block in asked.table}
        return held | {b for b in range(self.config.prefix.blocks) if self.pool.is_pinned(b)}

    def _available(self, running: list[Asked]) -> int:
        return self.config.prefix.blocks - len(self._held(running))

    def _fresh(self, blocks: Iterable[int]) -> None:
        """Newly given out: nobody else's, and full of rubbish until written."""
        held = {block for asked in self._running() for block in asked.table}
        for block in blocks:
            assert block not in held, "fresh: a block that nobody holds"
            self.content[block] = [None] * self.size

    def _name(self, asked: Asked, index: int, digest: bytes) -> None:
        states = tuple(asked.states[index * self.size : (index + 1) * self.size])
        assert self._truth.setdefault(digest, states) == states, "digests: one for each prefix and tenant"

    def _check_findable(self) -> None:
        """Whatever can be found between two steps holds exactly what its digest says."""
        found: dict[bytes, None] = {}
        for digest in self._findable:
            for block in self.pool.match((digest,), self.size + 1):
                assert self.content[block] == list(self._truth[digest]), "found: a block that holds what its name says"
                found[digest] = None
        self._findable = found

    def _pressure(self) -> Pressure:
        unseen: dict[str, list[int]] = {}
        for asked in self.open.values():
            if asked.first_ns is None:
                unseen.setdefault(asked.submit.traffic_class, []).append(asked.submit.sent_ns)
        queued = sum(len(a.tokens) - a.computed for a in self.open.values() if not a.decoding)
        return Pressure(
            replica=self.config.index, acked_sid=self.submitted, running=len(self._running()),
            waiting=tuple(Waiting(name, len(sent), min(sent)) for name, sent in sorted(unseen.items())),
            queued_tokens=queued, free_blocks=self._available(self._running()),
        )


# ---------------------------------------------------------------- the same journal in another process

AGAIN = """
import hashlib, sys
import msgspec
from engine import config, events
from {module} import {name}
kind = tuple[config.{name}Config, list[tuple[int, events.{name}Event]]]
settings, journal = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=kind)
machine, digest = {name}(settings), hashlib.sha256()
for now_ns, event in journal:
    digest.update(msgspec.msgpack.encode(machine.handle(now_ns, event)))
print(digest.hexdigest())
"""


def digest_of(journal: list) -> str:
    """Of all actions, in order."""
    digest = hashlib.sha256()
    for _, _, actions in journal:
        digest.update(msgspec.msgpack.encode(actions))
    return digest.hexdigest()


def replayed_elsewhere(machine: type, config: msgspec.Struct, journal: list, hash_seed: int) -> str:
    """The digest that a fresh machine gives in a process of its own, where strings hash otherwise."""
    done = subprocess.run(
        [sys.executable, "-c", AGAIN.format(module=machine.__module__, name=machine.__name__)],
        input=msgspec.msgpack.encode((config, [(now_ns, event) for now_ns, event, _ in journal])),
        env={**os.environ, "PYTHONHASHSEED": str(hash_seed), "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True, check=True,
    )
    return done.stdout.decode().strip()

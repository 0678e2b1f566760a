"""Continuous batching over a budget of tokens and time: who runs in the next step.

A step takes every decoding row and fills the rest of its budget (``budget.py``) with prompt chunks, most important
first. Strict priority with preemption between steps: a critical arrival waits for the step in flight, never for a
second one; the victim's tokens are recomputed when it comes back, in its old place. An admission leaves blocks free
for what is to come (``reserve.py``); slots and blocks may be reserved for critical.

Between the tenants of one priority the waiting room is fair (``waiting.py``); a head that does not fit stops its
priority and all below. Among what runs only priority counts, and age inside a tenant: never a tenant's counter. Who
would compute again what another one in prefill is computing lets it go first (``holdback.py``).

Work per call follows what changed, not what runs: decoding rows meet the batcher again only at a block border (a
calendar by step index), at their end, or as victims. Method: vLLM v1's scheduler, Sarathi-Serve's chunked prefill.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from engine.config import ReplicaConfig
from engine.events import PRIORITY, Chunk, Filled, Grow, RunStep, SeqStart, Submit
from engine.policy.budget import StepBudget
from engine.policy.calendar import Calendar
from engine.policy.holdback import held_back
from engine.policy.isolation import Isolation
from engine.policy.prefix import BlockPool
from engine.policy.reserve import Reserve
from engine.policy.sequence import Sequence
from engine.policy.unseen import Unseen
from engine.policy.waiting import WaitingRoom
from engine.units import ceil_div


class Batcher:
    """The running set and the plan, over a waiting room. Owned by a Replica, which speaks to the world."""

    def __init__(self, config: ReplicaConfig) -> None:
        self.config = config.batcher
        self._replica = config
        self.pool = BlockPool(config.prefix)
        self.room = WaitingRoom(config)
        self.isolation = Isolation()
        self.reserve = Reserve(config.batcher, config.prefix)
        self.unseen = Unseen()
        self._fair = config.fairness.enabled
        self._now_ns = 0  # of the last plan
        self.step = 0  # index of the next step
        self.sequences: dict[int, Sequence] = {}  # all that have not ended
        self.running: dict[int, Sequence] = {}  # prefill or decode: they hold a slot and blocks
        self._prefill: dict[int, Sequence] = {}  # of these, in the order in which they were taken in
        self.queued_tokens = 0
        self.decode_rows = 0
        self.decode_kv = 0  # context that the next step's decode rows attend to
        self._running_of = [0] * len(PRIORITY)  # by priority
        self._borders = Calendar()  # that step needs one more block
        self._limits = Calendar()  # that step yields the last token
        self.planned: list[Sequence] = []  # with a chunk in the step in flight
        self.published: list[int] = []  # blocks that the step in flight is to fill
        self.held: list[Sequence] = []  # since the last plan; some may have gone
        self.stop: list[int] = []  # the runner must hear of these before anything else

    # ------------------------------------------------------------ coming and going

    def fits(self, ask: Submit) -> bool:
        """Could it ever run to its last token, with the pins and the critical reserve in place?"""
        worst = ceil_div(ask.prompt_tokens + ask.max_tokens, self.pool.block_tokens)
        return worst <= self.pool.total - self.pool.pin_cap - self.config.reserved_blocks

    def add(self, ask: Submit) -> None:
        """Into the waiting room."""
        tenant = ask.tenant if self._fair else ""
        seq = Sequence(ask, list(ask.blocks), tenant, ask.priority, ask.sent_ns, known=ask.prompt_tokens)
        self.sequences[ask.sid] = seq
        self.unseen.add(seq)
        self._enqueue(seq)

    def remove(self, seq: Sequence) -> None:
        """Out of whatever state it is in, between two steps; its blocks go back."""
        if seq.state in ("prefill", "decode"):
            self._leave(seq)
        else:
            self.unseen.seen(seq)
        self.room.remove(seq)
        self._requeue(seq, 0)
        seq.state = "ended"
        del self.sequences[seq.ask.sid]

    def expire(self, now_ns: int) -> list[Sequence]:
        """Those that no step has held in time; removed."""
        late: list[Sequence] = []
        for sid in self.unseen.next_late(now_ns):
            seq = self.sequences.get(sid)
            if seq is not None and seq.first_ns is None:
                late.append(seq)
                self.remove(seq)
        return late

    # ------------------------------------------------------------ the plan

    def plan(self, now_ns: int) -> RunStep | None:
        """The next step, or None when nothing can run."""
        self._now_ns = now_ns
        self.pool.expire_pins(now_ns)
        self.room.promote(now_ns)
        grow = self._cross_borders()
        tried = self.isolation.trial(self.running)
        budget = StepBudget(self._replica, self.decode_rows, self.decode_kv, by_time=not tried)
        start, chunks = self._fill(budget, tried)
        if not self.decode_rows and not chunks:
            return None
        stop, self.stop = tuple(self.stop), []
        if stop and grow:  # one that was put back since it grew, and perhaps taken in again, has no such table
            grow = [g for g in grow if (seq := self.running.get(g.sid)) and seq.state == "decode"]
        return RunStep(
            step=self.step, shape=budget.shape(self.decode_rows, self.decode_kv), start=tuple(start), stop=stop,
            chunks=tuple(chunks), grow=tuple(grow), at_most=self._at_most(bool(chunks)),
        )

    def _cross_borders(self) -> list[Grow]:
        """One more block for each row that needs it now; the least important of all pay for a shortage."""
        due = self._borders.take(self.step)
        if self.held:
            full = [seq for seq in self.held if seq.known > len(seq.table) * self.pool.block_tokens]
            due += [seq for seq in full if seq.state == "prefill"]
        while len(due) > self.pool.available:
            victim = max(self.running.values(), key=lambda s: s.rank)
            self.put_back(victim)
            self.reserve.ran_short()
            if victim in due:
                due.remove(victim)
        if not due:
            return []
        blocks, border = self.pool.take((), len(due)), self.step + self.pool.block_tokens
        self.reserve.grew(due)
        for seq, block in zip(due, blocks, strict=True):
            seq.table.append(block)
            seq.border = border
        rows = [seq for seq in due if seq.state == "decode"] if self.held else due
        self._borders.enter(border, rows)
        return [Grow(seq.ask.sid, (seq.table[-1],)) for seq in rows]  # of one that was held, when it goes on

    def _fill(self, budget: StepBudget, tried: list[int]) -> tuple[list[SeqStart], list[Chunk]]:
        """Prompt chunks for what the decode rows leave of the budget, in strict order; none after one that was cut."""
        start: list[SeqStart] = []
        chunks: list[Chunk] = []
        served = (self.running[sid] for sid in tried) if tried else self._in_order(budget)
        while budget.left_tokens > 0 and (seq := next(served, None)) is not None:
            left = seq.known - seq.computed
            critical = seq.ask.priority == 0
            seq.chunk = budget.most(seq.computed, left, critical)
            if not seq.chunk:
                break
            if not seq.told:
                seq.told = True
                start.append(SeqStart(seq.ask.sid, seq.computed, tuple(seq.table)))
            chunks.append(Chunk(seq.ask.sid, seq.chunk))
            budget.take(seq.computed, seq.chunk, critical)
            self._publish(seq)
            self.planned.append(seq)
            if seq.chunk < left:
                break
        start += self._resume()
        return start, chunks

    def _resume(self) -> list[SeqStart]:
        """Those that were held and have no chunk in this step: the runner hears where they stand."""
        there = [seq for seq in self.held if seq.state == "prefill" and not seq.told]
        self.held.clear()
        for seq in there:
            seq.told = True
        return [SeqStart(seq.ask.sid, seq.computed, tuple(seq.table)) for seq in there]

    def _in_order(self, budget: StepBudget) -> Iterator[Sequence]:
        """Who is in prefill, and each head of the waiting room that can be taken in, at its place among them.

        A blocked head stops all that wait behind it, but not those in prefill: they hold what it may be waiting for.
        """
        order: list[Sequence] = []
        for seq in self._prefill.values():
            order.insert(_place(order, seq), seq)
        at, blocked = 0, False
        while True:
            sid = None if blocked else self.room.head()
            if sid is not None and _place(order, head := self.sequences[sid]) <= at:
                hits = self.pool.match(head.digests, head.known)
                if not self._held_back(head, len(hits), order[at:]):
                    if not budget.most(len(hits) * self.pool.block_tokens, head.known, not head.ask.priority):
                        return  # no time for a single token of it: the step is full
                    if self._admit(head, hits):
                        order[at:] = [head, *(seq for seq in order[at:] if seq.state == "prefill")]  # not its victims
                    else:
                        blocked = True
                        continue
            if at == len(order):
                return
            yield order[at]
            at += 1

    def _held_back(self, head: Sequence, hits: int, unserved: list[Sequence]) -> bool:
        if not unserved or not self.pool.enabled:
            return False
        return held_back(head, hits, unserved, self.pool.block_tokens, self.config.hold_back_tokens)

    def _admit(self, seq: Sequence, hits: list[int]) -> bool:
        """A slot and blocks for all its known tokens, or nothing at all."""
        fresh = ceil_div(seq.known, self.pool.block_tokens) - len(hits)
        if not (self._slot_free(seq) and self._blocks_free(seq, self.pool.cost_of(hits, fresh))):
            if not any(self._running_of[seq.priority + 1 :]):
                return False  # as nearly always under load: what runs need not be looked at
            victims = [s for s in self.running.values() if s.priority > seq.priority and not s.chunk]
            if not self._could_make_room(seq, hits, fresh, victims):
                return False
            victims.sort(key=lambda s: s.rank)  # the last one pays first
            while not (self._slot_free(seq) and self._blocks_free(seq, self.pool.cost_of(hits, fresh))):
                self.put_back(victims.pop())
        self.room.pop(self._now_ns, seq)
        seq.table = self.pool.take(hits, fresh)
        seq.computed = len(hits) * self.pool.block_tokens
        seq.state = "prefill"
        self.running[seq.ask.sid] = self._prefill[seq.ask.sid] = seq
        self._running_of[seq.priority] += 1
        self.reserve.entered(seq)
        if seq.first_ns is None:
            seq.first_ns, seq.cached_tokens = self._now_ns, seq.computed
            self.pool.count(seq.ask.prompt_tokens, seq.computed)
            self.room.charge_prompt(seq, seq.known - seq.computed)
            self.unseen.seen(seq)
        self._requeue(seq, seq.known - seq.computed)
        return True

    def _could_make_room(self, seq: Sequence, hits: list[int], fresh: int, victims: list[Sequence]) -> bool:
        """Were all of ``victims`` put back, would it get in? Asked first, so that nobody pays for nothing."""
        if not victims:
            return False
        kept = self.reserve.kept(seq, len(self.running) - len(victims), without=victims)
        short = self.pool.cost_of(hits, fresh) + kept - self.pool.available
        if short <= 0:
            return True
        held = Counter(block for victim in victims for block in victim.table)
        for block in hits:  # coming free, it would cost one more
            held.pop(block, None)
        return short <= sum(self.pool.references(block) == count for block, count in held.items())

    def _slot_free(self, seq: Sequence) -> bool:
        if seq.priority == 0:
            return len(self.running) < self.config.slots
        others = len(self.running) - self._running_of[0]
        return len(self.running) < self.config.slots and others < self.config.slots - self.config.reserved_slots

    def _blocks_free(self, seq: Sequence, cost: int) -> bool:
        return cost + self.reserve.kept(seq, len(self.running)) <= self.pool.available

    def _publish(self, seq: Sequence) -> None:
        size = self.pool.block_tokens
        for index in range(seq.computed // size, min((seq.computed + seq.chunk) // size, len(seq.digests))):
            if self.pool.publish(seq.table[index], seq.digests[index]):
                self.published.append(seq.table[index])
        if seq.computed + seq.chunk == seq.known:
            self.pool.pin(self._now_ns, seq.table[: seq.ask.pinned_blocks])

    def _at_most(self, has_chunks: bool) -> int:
        """Steps until something must be decided: a block border, a token limit; one when anything waits."""
        if has_chunks or self.room.head() is not None:
            return 1
        for ahead in range(1, self.config.max_multi_steps):
            if self.step + ahead in self._borders or self.step + ahead - 1 in self._limits:
                return ahead
        return self.config.max_multi_steps

    # ------------------------------------------------------------ after a step

    def settle(self, steps: int) -> list[Sequence]:
        """``steps`` steps have run: chunks are computed; finished prompts decode, and are returned in batch order."""
        self.decode_kv += self.decode_rows * steps
        self.room.charge_outputs(steps)
        self.step += steps
        if self.decode_rows:
            self.reserve.went_well(steps)
        self.published.clear()
        done: list[Sequence] = []
        for seq in self.planned:
            if not (seq.outputs and seq.known - seq.computed == 1):  # else a decode row that went as a chunk
                seq.computed_tokens += seq.chunk
            seq.computed += seq.chunk
            self._requeue(seq, seq.known - seq.computed)
            seq.chunk = 0
            if seq.computed == seq.known:
                self._begin_decode(seq)
                done.append(seq)
        if self.isolation.active:
            self.isolation.passed([seq.ask.sid for seq in self.planned])
        self.planned.clear()
        return done

    def _begin_decode(self, seq: Sequence) -> None:
        seq.state, seq.decode_from = "decode", self.step
        del self._prefill[seq.ask.sid]
        self.room.begin_decode(seq)
        seq.known += 1
        seq.outputs += 1
        self.decode_rows += 1
        self.decode_kv += seq.known
        seq.border = self.step + len(seq.table) * self.pool.block_tokens - (seq.known - 1)
        seq.limit = self.step + seq.ask.max_tokens - seq.outputs - 1
        self._borders.enter(seq.border, [seq])
        self._limits.enter(seq.limit, [seq])

    def fill(self, blocks: Iterable[Filled]) -> None:
        """Blocks of generated tokens have got their digests."""
        for filled in blocks:
            seq, index = self.running.get(filled.sid), filled.index
            if seq is None or index < len(seq.digests):
                continue  # ended in the same step, or filled again after a preemption
            assert index == len(seq.digests), "filled: blocks fill in order"
            seq.digests.append(filled.digest)
            self.pool.publish(seq.table[index], filled.digest)

    def outputs_of(self, seq: Sequence) -> int:
        """Tokens generated so far."""
        return seq.outputs + (self.step - seq.decode_from if seq.state == "decode" else 0)

    # ------------------------------------------------------------ shared steps

    def put_back(self, seq: Sequence) -> None:
        """Off the hardware, back to its old place in the waiting room; its KV may be gone when it returns."""
        assert not seq.chunk, "preempt: never a sequence that this plan has already served"
        self._leave(seq)
        seq.preemptions += 1
        seq.state, seq.since_ns = "waiting", self._now_ns
        self._enqueue(seq)

    def hold(self, seq: Sequence) -> None:
        """Off the hardware with what it has computed; it goes on from there, in a step of our choosing."""
        decoding, seq.chunk = seq.state == "decode", 0
        self._off(seq)
        if decoding:
            seq.state, seq.computed = "prefill", seq.known - 1
            self._prefill[seq.ask.sid] = seq
        self.held.append(seq)
        self._requeue(seq, seq.known - seq.computed)

    def _leave(self, seq: Sequence) -> None:
        self._off(seq)
        del self.running[seq.ask.sid]
        self._prefill.pop(seq.ask.sid, None)
        self.reserve.left(seq)
        self._running_of[seq.priority] -= 1
        self.pool.release(seq.table)
        seq.table, seq.computed, seq.chunk = [], 0, 0

    def _off(self, seq: Sequence) -> None:
        """The runner is to forget that it runs, and its numbers are settled."""
        if seq.state == "decode":
            ran = self.step - seq.decode_from
            seq.known += ran
            seq.outputs += ran
            self.decode_rows -= 1
            self.decode_kv -= seq.known
            self.room.end_decode(seq)
            self._borders.strike(seq.border, seq)
            self._limits.strike(seq.limit, seq)
        if seq.told:
            seq.told = False
            self.stop.append(seq.ask.sid)

    def _enqueue(self, seq: Sequence) -> None:
        self._requeue(seq, seq.known)
        self.room.push(seq)

    def _requeue(self, seq: Sequence, tokens: int) -> None:
        self.queued_tokens += tokens - seq.queued
        seq.queued = tokens

    def check(self) -> None:
        """Invariants of the books over all that runs; O(running)."""
        running = self.running.values()
        self.reserve.check(running, self.pool.available)
        for priority, count in enumerate(self._running_of):
            assert count == sum(seq.priority == priority for seq in running), "running: counted by priority"
        in_prefill = {seq.ask.sid: seq for seq in running if seq.state == "prefill"}
        assert self._prefill == in_prefill, "prefill: exactly those, however they came there"
        borders, limits = self._borders.entries(), self._limits.entries()
        for seq in running:
            if seq.state == "decode":
                room = len(seq.table) * self.pool.block_tokens - (seq.known - 1)
                assert borders.pop(seq.ask.sid) == seq.decode_from + room, "border: where its table is full"
                last = seq.ask.max_tokens - seq.outputs - 1
                assert limits.pop(seq.ask.sid) == seq.decode_from + last, "limit: where it has all its tokens"
        assert not borders and not limits, "calendars: rows that decode, and no others"


def _place(order: list[Sequence], seq: Sequence) -> int:
    """Where it stands among those in prefill: behind all that it does not precede."""
    at = len(order)
    while at and seq.precedes(order[at - 1]):
        at -= 1
    return at

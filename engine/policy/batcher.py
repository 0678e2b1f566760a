"""Continuous batching over a token budget: who runs in the next step.

A step takes every decoding row and fills the rest of its budget with prompt chunks, most important first. Strict
priority with preemption between steps: a critical arrival waits for the step in flight, never for a second one; the
victim's tokens are recomputed when it comes back, in its old place. Reserved slots and blocks are for critical only.

Between the tenants of one priority the waiting room is fair (``waiting.py``); a head that does not fit stops its
priority and all below. Among what runs only priority counts, and age inside a tenant: never a tenant's counter.

Work per call follows what changed, not what runs: decoding rows meet the batcher again only at a block border (a
calendar by step index), at their end, or as victims. Method: vLLM v1's scheduler, Sarathi-Serve's chunked prefill.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from heapq import heappop, heappush

from engine.config import ReplicaConfig
from engine.events import Chunk, Filled, Grow, RunStep, SeqStart, StepShape, Submit
from engine.policy.prefix import BlockPool
from engine.policy.sequence import Sequence
from engine.policy.waiting import WaitingRoom
from engine.units import ceil_div


class Batcher:
    """The running set and the plan, over a waiting room. Owned by a Replica, which speaks to the world."""

    def __init__(self, config: ReplicaConfig) -> None:
        self.config = config.batcher
        self.pool = BlockPool(config.prefix)
        self.room = WaitingRoom(config)
        self._fair = config.fairness.enabled
        self.step = 0  # index of the next step
        self.sequences: dict[int, Sequence] = {}  # all that have not ended
        self.running: dict[int, Sequence] = {}  # prefill or decode: they hold a slot and blocks
        self.unseen: dict[str, dict[int, int]] = {}  # class -> sid -> sent_ns, of those that no step has held yet
        self._ages: dict[str, list[tuple[int, int]]] = {}  # class -> heap of (sent_ns, sid); stale entries are skipped
        self.queued_tokens = 0
        self.decode_rows = 0
        self.decode_kv = 0  # context that the next step's decode rows attend to
        self._critical_running = 0
        self._deadlines: list[tuple[int, int]] = []  # heap of (start_by_ns, sid)
        self._borders: list[tuple[int, int, int]] = []  # heap of (step, sid, epoch): that step needs one more block
        self._limits: list[tuple[int, int, int]] = []  # heap of (step, sid, epoch): that step yields the last token
        self._planned: list[Sequence] = []  # with a chunk in the step in flight
        self._published: list[int] = []  # blocks that the step in flight is to fill
        self._stop: list[int] = []  # the runner must hear of these before anything else

    # ------------------------------------------------------------ coming and going

    def fits(self, ask: Submit) -> bool:
        """Could it ever run to its last token, with the pins and the critical reserve in place?"""
        worst = ceil_div(ask.prompt_tokens + ask.max_tokens, self.pool.block_tokens)
        return worst <= self.pool.total - self.pool.pin_cap - self.config.reserved_blocks

    def add(self, ask: Submit) -> None:
        """Into the waiting room."""
        seq = Sequence(ask, list(ask.blocks), ask.tenant if self._fair else "", known=ask.prompt_tokens)
        self.sequences[ask.sid] = seq
        self.unseen.setdefault(ask.traffic_class, {})[ask.sid] = ask.sent_ns
        heappush(self._ages.setdefault(ask.traffic_class, []), (ask.sent_ns, ask.sid))
        heappush(self._deadlines, (ask.start_by_ns, ask.sid))
        self._enqueue(seq)

    def remove(self, seq: Sequence) -> None:
        """Out of whatever state it is in, between two steps; its blocks go back."""
        if seq.state in ("prefill", "decode"):
            self._leave(seq)
        else:
            self._seen(seq)
        self.room.remove(seq)
        self._requeue(seq, 0)
        seq.state = "ended"
        del self.sequences[seq.ask.sid]

    def expire(self, now_ns: int) -> list[Sequence]:
        """Those that no step has held in time; removed."""
        late: list[Sequence] = []
        while self._deadlines and self._deadlines[0][0] < now_ns:
            seq = self.sequences.get(heappop(self._deadlines)[1])
            if seq is not None and seq.first_ns is None:
                late.append(seq)
                self.remove(seq)
        return late

    def oldest_ns(self, traffic_class: str) -> int:
        """When the oldest of a class's unseen was sent; several gateways' submissions arrive out of order."""
        ages, unseen = self._ages[traffic_class], self.unseen[traffic_class]
        while ages[0][1] not in unseen:
            heappop(ages)
        return ages[0][0]

    # ------------------------------------------------------------ the plan

    def plan(self, now_ns: int) -> RunStep | None:
        """The next step, or None when nothing can run."""
        self.pool.expire_pins(now_ns)
        grow = self._cross_borders()
        start, chunks, area, tokens = self._fill(now_ns)
        if not self.decode_rows and not chunks:
            return None
        shape = StepShape(tokens, len(chunks), self.decode_rows, self.decode_kv, area)
        stop, self._stop = tuple(self._stop), []
        return RunStep(
            step=self.step, shape=shape, start=tuple(start), stop=stop, chunks=tuple(chunks),
            grow=tuple(g for g in grow if self._decodes(g.sid)), at_most=self._at_most(bool(chunks)),
        )

    def _decodes(self, sid: int) -> bool:
        """Not put back since it grew: one that this very plan took in again has a new table."""
        seq = self.running.get(sid)
        return seq is not None and seq.state == "decode"

    def _cross_borders(self) -> list[Grow]:
        """One more block for each decode row that needs it now; the least important row pays for a shortage."""
        grow: list[Grow] = []
        while self._borders and self._borders[0][0] <= self.step:
            _, sid, epoch = heappop(self._borders)
            seq = self.running.get(sid)
            if seq is None or seq.epoch != epoch:
                continue
            while not self.pool.available:
                victim = max(self.running.values(), key=lambda s: s.rank)
                self._preempt(victim)
                if victim is seq:
                    break
            if seq.state == "decode":
                blocks = self.pool.take((), 1)
                seq.table.extend(blocks)
                grow.append(Grow(sid, tuple(blocks)))
                heappush(self._borders, (self.step + self.pool.block_tokens, sid, epoch))
        return grow

    def _fill(self, now_ns: int) -> tuple[list[SeqStart], list[Chunk], int, int]:
        """Prompt chunks for what the decode rows leave of the budget, in strict order."""
        start: list[SeqStart] = []
        chunks: list[Chunk] = []
        area = 0
        budget = self.config.step_tokens - self.decode_rows
        served = self._in_order(now_ns)
        while budget > 0 and (seq := next(served, None)) is not None:
            seq.chunk = min(budget, seq.known - seq.computed)
            if not seq.told:
                seq.told = True
                start.append(SeqStart(seq.ask.sid, seq.computed, tuple(seq.table)))
            chunks.append(Chunk(seq.ask.sid, seq.chunk))
            area += seq.chunk * (2 * seq.computed + seq.chunk)
            budget -= seq.chunk
            self._publish(now_ns, seq)
            self._planned.append(seq)
        return start, chunks, area, sum(c.tokens for c in chunks)

    def _in_order(self, now_ns: int) -> Iterator[Sequence]:
        """Who is in prefill, and each head of the waiting room that can be taken in, at its place among them.

        A blocked head stops all that wait behind it, but not those in prefill: they hold what it may be waiting for.
        """
        order: list[Sequence] = []
        for seq in self.running.values():  # in the order in which they were taken in
            if seq.state == "prefill":
                order.insert(_place(order, seq), seq)
        at, blocked = 0, False
        while True:
            sid = None if blocked else self.room.head()
            if sid is not None and _place(order, head := self.sequences[sid]) <= at:
                if self._admit(now_ns, head):
                    order[at:] = [head, *(seq for seq in order[at:] if seq.state == "prefill")]  # without its victims
                else:
                    blocked = True
                    continue
            if at == len(order):
                return
            yield order[at]
            at += 1

    def _admit(self, now_ns: int, seq: Sequence) -> bool:
        """A slot and blocks for all its known tokens, or nothing at all."""
        hits = self.pool.match(seq.digests, seq.known)
        fresh = ceil_div(seq.known, self.pool.block_tokens) - len(hits)
        victims = [s for s in self.running.values() if s.ask.priority > seq.ask.priority and not s.chunk]
        victims.sort(key=lambda s: s.rank)  # the last one pays first
        if not self._could_make_room(seq, hits, fresh, victims):
            return False
        while not (self._slot_free(seq) and self._blocks_free(seq, self.pool.cost_of(hits, fresh))):
            self._preempt(victims.pop())
            hits = self.pool.match(seq.digests, seq.known)
            fresh = ceil_div(seq.known, self.pool.block_tokens) - len(hits)
        self.room.pop(seq)
        seq.table = self.pool.take(hits, fresh)
        seq.computed = len(hits) * self.pool.block_tokens
        seq.state = "prefill"
        self.running[seq.ask.sid] = seq
        self._critical_running += seq.ask.priority == 0
        if seq.first_ns is None:
            seq.first_ns, seq.cached_tokens = now_ns, seq.computed
            self.pool.count(seq.ask.prompt_tokens, seq.computed)
            self.room.charge_prompt(seq, seq.known - seq.computed)
            self._seen(seq)
        self._requeue(seq, seq.known - seq.computed)
        return True

    def _could_make_room(self, seq: Sequence, hits: list[int], fresh: int, victims: list[Sequence]) -> bool:
        if not self._slot_free(seq) and not victims:
            return False
        short = self.pool.cost_of(hits, fresh) + self._reserve_for_others(seq) - self.pool.available
        if short <= 0:
            return True
        held = Counter(block for victim in victims for block in victim.table)
        for block in hits:  # coming free, it would cost one more
            held.pop(block, None)
        return short <= sum(self.pool.references(block) == count for block, count in held.items())

    def _slot_free(self, seq: Sequence) -> bool:
        if seq.ask.priority == 0:
            return len(self.running) < self.config.slots
        others = len(self.running) - self._critical_running
        return len(self.running) < self.config.slots and others < self.config.slots - self.config.reserved_slots

    def _blocks_free(self, seq: Sequence, cost: int) -> bool:
        return cost + self._reserve_for_others(seq) <= self.pool.available

    def _reserve_for_others(self, seq: Sequence) -> int:
        return 0 if seq.ask.priority == 0 else self.config.reserved_blocks

    def _publish(self, now_ns: int, seq: Sequence) -> None:
        size = self.pool.block_tokens
        for index in range(seq.computed // size, min((seq.computed + seq.chunk) // size, len(seq.digests))):
            if self.pool.publish(seq.table[index], seq.digests[index]):
                self._published.append(seq.table[index])
        if seq.computed + seq.chunk == seq.known:
            self.pool.pin(now_ns, seq.table[: seq.ask.pinned_blocks])

    def _at_most(self, has_chunks: bool) -> int:
        """Steps until something must be decided: a block border, a token limit; one when anything waits."""
        if has_chunks or self.room.head() is not None:
            return 1
        most = self.config.max_multi_steps
        for calendar, last in ((self._borders, 0), (self._limits, 1)):
            self._tidy(calendar)
            if calendar:
                most = min(most, calendar[0][0] - self.step + last)
        return max(1, most)

    def _tidy(self, calendar: list[tuple[int, int, int]]) -> None:
        """Its first entry, if it has any, is of a sequence that still runs."""
        while calendar:
            _, sid, epoch = calendar[0]
            seq = self.running.get(sid)
            if seq is not None and seq.epoch == epoch:
                return
            heappop(calendar)

    # ------------------------------------------------------------ after a step

    def settle(self, steps: int) -> list[Sequence]:
        """``steps`` steps have run: chunks are computed; finished prompts decode, and are returned in batch order."""
        self.decode_kv += self.decode_rows * steps
        self.room.charge_outputs(steps)
        self.step += steps
        self._published.clear()
        done: list[Sequence] = []
        for seq in self._planned:
            seq.computed += seq.chunk
            seq.computed_tokens += seq.chunk
            self._requeue(seq, seq.known - seq.computed)
            seq.chunk = 0
            if seq.computed == seq.known:
                self._begin_decode(seq)
                done.append(seq)
        self._planned.clear()
        return done

    def _begin_decode(self, seq: Sequence) -> None:
        seq.state, seq.decode_from = "decode", self.step
        self.room.begin_decode(seq)
        seq.known += 1
        seq.outputs += 1
        self.decode_rows += 1
        self.decode_kv += seq.known
        capacity = len(seq.table) * self.pool.block_tokens
        heappush(self._borders, (self.step + capacity - (seq.known - 1), seq.ask.sid, seq.epoch))
        self._tidy(self._limits)  # under load nobody else looks at it: without this it would grow for ever
        heappush(self._limits, (self.step + seq.ask.max_tokens - seq.outputs - 1, seq.ask.sid, seq.epoch))

    def fill(self, filled: Filled) -> None:
        """A block of generated tokens has got its digest."""
        seq = self.running.get(filled.sid)
        if seq is None or filled.index < len(seq.digests):
            return  # ended in the same step, or filled again after a preemption
        assert filled.index == len(seq.digests), "filled: blocks fill in order"
        seq.digests.append(filled.digest)
        self.pool.publish(seq.table[filled.index], filled.digest)

    def fail(self) -> list[Sequence]:
        """The step in flight wrote nothing that may be trusted: unpublish, and name those that took part."""
        for block in self._published:
            self.pool.unpublish(block)
        self._published.clear()
        self._planned.clear()
        self.decode_kv += self.decode_rows
        self.step += 1
        return [s for s in self.running.values() if s.state == "decode" or s.chunk]

    def distrust(self, seq: Sequence) -> None:
        """The model gave no number: nobody may find what it read or wrote, or the next one fails on it too."""
        for block in seq.table:
            self.pool.unpublish(block)

    def outputs_of(self, seq: Sequence) -> int:
        """Tokens generated so far."""
        return seq.outputs + (self.step - seq.decode_from if seq.state == "decode" else 0)

    # ------------------------------------------------------------ shared steps

    def _preempt(self, seq: Sequence) -> None:
        """Off the hardware, back to its old place in the waiting room; its KV may be gone when it returns."""
        assert not seq.chunk, "preempt: never a sequence that this plan has already served"
        self._leave(seq)
        seq.preemptions += 1
        seq.state = "waiting"
        self._enqueue(seq)

    def _leave(self, seq: Sequence) -> None:
        if seq.state == "decode":
            ran = self.step - seq.decode_from
            seq.known += ran
            seq.outputs += ran
            self.decode_rows -= 1
            self.decode_kv -= seq.known
            self.room.end_decode(seq)
        del self.running[seq.ask.sid]
        self._critical_running -= seq.ask.priority == 0
        self.pool.release(seq.table)
        seq.table, seq.computed, seq.chunk = [], 0, 0
        seq.epoch += 1
        if seq.told:
            seq.told = False
            self._stop.append(seq.ask.sid)

    def _enqueue(self, seq: Sequence) -> None:
        self._requeue(seq, seq.known)
        self.room.push(seq)

    def _requeue(self, seq: Sequence, tokens: int) -> None:
        self.queued_tokens += tokens - seq.queued
        seq.queued = tokens

    def _seen(self, seq: Sequence) -> None:
        unseen = self.unseen.get(seq.ask.traffic_class)
        if unseen is not None:
            unseen.pop(seq.ask.sid, None)


def _place(order: list[Sequence], seq: Sequence) -> int:
    """Where it stands among those in prefill: behind all that it does not precede."""
    at = len(order)
    while at and seq.precedes(order[at - 1]):
        at -= 1
    return at

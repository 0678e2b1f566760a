"""One copy of the model as a pure machine: which tokens run in the next step, and what its gateways are told.

Deaf during a step: the driver keeps messages back until the hardware is free, then hands in ``StepDone``, the
``Abort``s, the ``Submit``s and ``Plan``, in this order; only ``Plan`` returns a ``RunStep``. So a critical arrival
waits for one step, never for two. Every ``Submit`` gets exactly one ``Ended``. Knows no tokens and no hardware.
"""

from __future__ import annotations

from engine.config import ReplicaConfig
from engine.events import (
    Abort,
    Drain,
    Ended,
    EndReason,
    FirstToken,
    Plan,
    Pressure,
    ReplicaAction,
    ReplicaEvent,
    StepDone,
    StepFailed,
    Submit,
    Waiting,
)
from engine.policy.batcher import Batcher
from engine.policy.prefix import PrefixStats
from engine.policy.sequence import Sequence
from engine.values import Struct


class ReplicaStats(Struct):
    """What a plot or a metrics page wants to know."""

    step: int
    running: int
    waiting: int
    queued_tokens: int
    preemptions: int
    ended: int
    prefix: PrefixStats


class Replica:
    """A ``Machine`` over ``ReplicaEvent`` and ``ReplicaAction``."""

    def __init__(self, config: ReplicaConfig) -> None:
        self.config = config
        self.batcher = Batcher(config)
        self._in_step = False
        self._draining = False
        self._acked_sid = -1
        self._ended = self._preemptions = 0
        self._told: Pressure | None = None

    def handle(self, now_ns: int, event: ReplicaEvent) -> list[ReplicaAction]:
        """One event in, what follows from it out."""
        out: list[ReplicaAction] = []
        match event:
            case Submit():
                self._submit(event, out)
            case Abort(sid=sid):
                if seq := self.batcher.sequences.get(sid):
                    self._end(seq, "aborted", out)
            case StepDone():
                self._step_done(event, out)
            case StepFailed():
                self._in_step = False
                for seq in self.batcher.fail():
                    self._end(seq, "failed", out)
            case Plan():
                self._plan(now_ns, out)
            case Drain():
                self._draining = True
            case _:
                pass  # Wake: nothing here changes by itself
        return out

    def next_wake_ns(self) -> int | None:
        """Never: what waits is looked at when a step ends, and with nothing running nothing waits."""
        return None

    # ------------------------------------------------------------ events

    def _submit(self, ask: Submit, out: list[ReplicaAction]) -> None:
        assert ask.sid not in self.batcher.sequences, "submit: the driver never repeats a sid"
        self._acked_sid = max(self._acked_sid, ask.sid)
        if self._draining:
            out.append(Ended(ask.sid, "draining"))
        elif not self.batcher.fits(ask):
            out.append(Ended(ask.sid, "failed"))
        else:
            self.batcher.add(ask)

    def _step_done(self, done: StepDone, out: list[ReplicaAction]) -> None:
        assert self._in_step, "done: only a planned step can be done"
        self._in_step = False
        self.batcher.settle(done.steps)
        for sid in done.first:
            seq = self.batcher.sequences[sid]
            out.append(FirstToken(sid, seq.queue_ns, seq.cached_tokens))
        for filled in done.filled:
            self.batcher.fill(filled)
        for end in done.ended:
            seq = self.batcher.sequences[end.sid]
            if end.reason == "failed":
                self.batcher.distrust(seq)
            self._end(seq, end.reason, out)

    def _plan(self, now_ns: int, out: list[ReplicaAction]) -> None:
        assert not self._in_step, "plan: one step at a time"
        for seq in self.batcher.expire(now_ns):
            self._report(seq, "deadline", 0, out)
        step = self.batcher.plan(now_ns)
        assert step is not None or not self.batcher.sequences, "liveness: what waits runs when nothing else does"
        if step is not None:
            self._in_step = True
            out.append(step)
        pressure = self._pressure()
        if pressure != self._told:
            self._told = pressure
            out.append(pressure)

    # ------------------------------------------------------------ what others hear

    def _end(self, seq: Sequence, reason: EndReason, out: list[ReplicaAction]) -> None:
        outputs = self.batcher.outputs_of(seq)
        if reason in ("stop", "failed") and seq.state == "decode":
            outputs -= 1  # the end token is computed, but no part of the answer; a failed row has given none
        self.batcher.remove(seq)
        self._report(seq, reason, outputs, out)

    def _report(self, seq: Sequence, reason: EndReason, outputs: int, out: list[ReplicaAction]) -> None:
        self._ended += 1
        self._preemptions += seq.preemptions
        out.append(
            Ended(
                seq.ask.sid, reason, computed_tokens=seq.computed_tokens, cached_tokens=seq.cached_tokens,
                output_tokens=outputs, queue_ns=seq.queue_ns, preemptions=seq.preemptions,
            )
        )

    def _pressure(self) -> Pressure:
        batcher = self.batcher
        waiting = tuple(
            Waiting(name, len(unseen), batcher.oldest_ns(name)) for name, unseen in batcher.unseen.items() if unseen
        )
        return Pressure(
            replica=self.config.index, acked_sid=self._acked_sid, running=len(batcher.running), waiting=waiting,
            queued_tokens=batcher.queued_tokens, free_blocks=batcher.pool.available,
        )

    def stats(self) -> ReplicaStats:
        """A snapshot."""
        batcher = self.batcher
        return ReplicaStats(
            step=batcher.step, running=len(batcher.running), waiting=len(batcher.sequences) - len(batcher.running),
            queued_tokens=batcher.queued_tokens, ended=self._ended, prefix=batcher.pool.stats(),
            preemptions=self._preemptions + sum(s.preemptions for s in batcher.sequences.values()),
        )

    def check(self) -> None:
        """Invariants; O(sequences + blocks)."""
        batcher, pool = self.batcher, self.batcher.pool
        pool.check()
        held = [0] * pool.total
        for seq in batcher.running.values():
            assert len(set(seq.table)) == len(seq.table), "table: no block twice"
            for block in seq.table:
                held[block] += 1
        for block in range(pool.total):
            assert pool.references(block) == held[block] + pool.is_pinned(block), "references: tables and pins"
        config = batcher.config
        others = sum(s.ask.priority > 0 for s in batcher.running.values())
        assert len(batcher.running) <= config.slots, "slots: never exceeded"
        assert others <= config.slots - config.reserved_slots, "slots: the reserve is only for critical"
        decoding = [s for s in batcher.running.values() if s.state == "decode"]
        assert batcher.decode_rows == len(decoding), "decode rows: counted"
        context = sum(s.known + batcher.step - s.decode_from for s in decoding)
        assert batcher.decode_kv == context, "decode context: the running sum is the sum"
        for seq in batcher.sequences.values():
            running = seq.ask.sid in batcher.running
            assert running == (seq.state in ("prefill", "decode")), "state: running sequences, and only they, run"
            assert running or not seq.table, "blocks: a waiting sequence holds none"
            assert 0 <= seq.computed <= seq.known, "tokens: computed never passes known"
            if seq.state == "decode":
                room = len(seq.table) * pool.block_tokens
                assert seq.known - 1 + batcher.step - seq.decode_from <= room, "table: holds all that was computed"
        assert batcher.queued_tokens == sum(s.queued for s in batcher.sequences.values()), "queue: the sum of its parts"
        batcher.room.check(batcher.sequences)
        unseen = {sid for per_class in batcher.unseen.values() for sid in per_class}
        never = {s.ask.sid for s in batcher.sequences.values() if s.first_ns is None}
        assert unseen == never, "unseen: exactly those that no step has held"
        if self._in_step:
            assert batcher.running, "step: somebody runs in it"

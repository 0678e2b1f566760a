"""One copy of the model as a pure machine: which tokens run in the next step, and what its gateways are told.

Deaf during a step: the driver keeps messages back until the hardware is free, then hands in ``StepDone``, the
``Abort``s, the ``Submit``s and ``Plan``, in this order; only ``Plan`` returns a ``RunStep``. So a critical arrival
waits for one step, never for two. Every ``Submit`` gets exactly one ``Ended``. Knows no tokens and no hardware.
"""

from __future__ import annotations

from engine.config import ReplicaConfig
from engine.events import (
    SID_BITS,
    Abort,
    Drain,
    Ended,
    EndReason,
    FirstToken,
    KvEvents,
    Plan,
    Pressure,
    ReplicaAction,
    ReplicaEvent,
    RunStep,
    StepDone,
    StepFailed,
    Submit,
    Waiting,
)
from engine.policy.backlog import Backlog
from engine.policy.batcher import Batcher
from engine.policy.faults import distrust, fail, separate
from engine.policy.pace import Pace
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
        if config.kv_events:
            self.batcher.pool.listen()
        self.backlog, self.pace = Backlog(self.batcher.pool), Pace()
        self._step: RunStep | None = None  # in flight
        self._began_ns = 0
        self._full = False  # it leaves something waiting
        self._draining = False
        self._acked_sids: dict[int, int] = {}  # gateway -> its highest submission seen
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
                self._step_done(now_ns, event, out)
            case StepFailed():
                self._step_failed(out)
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
        gateway = ask.sid >> SID_BITS
        self._acked_sids[gateway] = max(ask.sid, self._acked_sids.get(gateway, -1))
        if self._draining:
            out.append(Ended(ask.sid, "draining"))
        elif not self.batcher.fits(ask):
            out.append(Ended(ask.sid, "failed"))
        else:
            self.batcher.add(ask)
            self.backlog.look((self.batcher.sequences[ask.sid],))

    def _step_done(self, now_ns: int, done: StepDone, out: list[ReplicaAction]) -> None:
        assert self._step is not None, "done: only a planned step can be done"
        step, self._step = self._step, None
        self.pace.add(step.shape.prefill_tokens, now_ns - self._began_ns, self._full)
        self.batcher.settle(done.steps)
        for sid in done.first:
            seq = self.batcher.sequences[sid]
            out.append(FirstToken(sid, seq.queue_ns, seq.cached_tokens))
        self.batcher.fill(done.filled)
        for end in done.ended:
            seq = self.batcher.sequences[end.sid]
            if end.reason == "failed":
                distrust(self.batcher, seq)
            self._end(seq, end.reason, out)
        separate(self.batcher)
        self._look(step, all_that_run=any(end.reason == "failed" for end in done.ended))

    def _step_failed(self, out: list[ReplicaAction]) -> None:
        """Nobody in it has a token. Only a sequence that raises alone has failed."""
        assert self._step is not None, "failed: only a planned step can fail"
        step, self._step = self._step, None
        if (guilty := fail(self.batcher, step)) is not None:
            self._end(guilty, "failed", out)
        self._look(step, all_that_run=True)

    def _plan(self, now_ns: int, out: list[ReplicaAction]) -> None:
        assert self._step is None, "plan: one step at a time"
        for seq in self.batcher.expire(now_ns):
            self._report(seq, "deadline", 0, out)
        step = self.batcher.plan(now_ns)
        assert step is not None or not self.batcher.sequences, "liveness: what waits runs when nothing else does"
        if step is not None:
            self._look(step)
            self._step, self._began_ns = step, now_ns
            self._full = sum(self.backlog.tokens) > step.shape.prefill_tokens
            out.append(step)
        stored, removed = self.batcher.pool.drain()
        if stored or removed:
            out.append(KvEvents(self.config.index, stored, removed))
        pressure = self._pressure()
        if pressure != self._told:
            self._told = pressure
            out.append(pressure)

    def _look(self, step: RunStep, all_that_run: bool = False) -> None:
        """Whose prompts got on, were taken in or put back: by ``step``, or by what came of it."""
        batcher = self.batcher
        if not (all_that_run or step.start or step.chunks or step.stop or batcher.stop or batcher.held):
            return  # pure decode
        if all_that_run:
            self.backlog.look(batcher.sequences.values())
            return
        sids = (*step.stop, *batcher.stop, *(start.sid for start in step.start), *(c.sid for c in step.chunks))
        self.backlog.look(seq for sid in sids if (seq := batcher.sequences.get(sid)))
        self.backlog.look(batcher.held)

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
        self.backlog.look((seq,))
        out.append(
            Ended(
                seq.ask.sid, reason, computed_tokens=seq.computed_tokens, cached_tokens=seq.cached_tokens,
                output_tokens=outputs, queue_ns=seq.queue_ns, preemptions=seq.preemptions,
            )
        )

    def _pressure(self) -> Pressure:
        batcher = self.batcher
        waiting = tuple(
            Waiting(name, len(sent), batcher.unseen.oldest_ns(name))
            for name, sent in batcher.unseen.classes.items()
            if sent
        )
        acked_sids = tuple(self._acked_sids.values())
        return Pressure(
            replica=self.config.index, acked_sid=max(acked_sids, default=-1), running=len(batcher.running),
            waiting=waiting, queued_tokens=batcher.queued_tokens, free_blocks=batcher.pool.available,
            backlog_tokens=tuple(self.backlog.tokens) if self.config.forecast else (),
            prefill_tps=self.pace.tps() if self.config.forecast else 0,
            acked_sids=acked_sids if len(acked_sids) > 1 else (),
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
        batcher.check()
        self.backlog.check(batcher.sequences)
        batcher.room.check(batcher.sequences)
        batcher.isolation.check()
        unseen = {sid for per_class in batcher.unseen.classes.values() for sid in per_class}
        never = {s.ask.sid for s in batcher.sequences.values() if s.first_ns is None}
        assert unseen == never, "unseen: exactly those that no step has held"
        if self._step is not None:
            assert batcher.running, "step: somebody runs in it"

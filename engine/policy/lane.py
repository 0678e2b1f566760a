"""The waiting room before an upstream, as a pure machine: what is sent when, and what the gateways are told.

A replica of ours has its queue inside and says how old that is. Another's server has one too, but says nothing, and
serves it in its own order. So no more is sent there than it works on (``places.py``), and the rest waits here: strict
between priorities, fair between the tenants of one, by age inside a tenant. What waits here is as old as it is; what
was sent counts as waiting too once its first token is later than the best that was seen (``first_token.py``), since
from then on it waits in the other's queue. Every Submit gets exactly one Ended. Knows no text and no HTTP.

A tenant is charged its prompt when it is sent and its answer when that is complete: ``fairness.py``'s bound holds with
the window times the longest answer instead of the KV tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.config import LaneConfig
from engine.events import PRIORITY, Abort, Drain, Ended, EndReason, FirstToken, Pressure, Submit, Waiting
from engine.lane_events import Dispatch, Done, Heard, LaneAction, LaneEvent, Recall
from engine.policy.fairness import FairQueue
from engine.policy.first_token import FirstTokens
from engine.policy.places import Places
from engine.policy.unseen import Unseen
from engine.values import Struct

GOOD = ("stop", "length")


class LaneStats(Struct):
    """What a plot or a metrics page wants to know. ``limit``: see ``places.py``; ``refused``: times it said no."""

    running: int
    waiting: int
    limit: int
    ended: int
    refused: int


@dataclass(slots=True, eq=False)
class _Item:
    ask: Submit
    first_ns: int | None = None  # when it was sent to the upstream first
    sent_ns: int | None = None  # it is there since; None = waits here
    late_ns: int | None = None  # a first token after this instant has waited for others
    heard: bool = False  # its first token has come
    recalled: bool = False
    refused: bool = False

    @property
    def queue_ns(self) -> int:
        return 0 if self.first_ns is None else self.first_ns - self.ask.sent_ns


class Lane:
    """A ``Machine`` over ``LaneEvent`` and ``LaneAction``."""

    def __init__(self, config: LaneConfig) -> None:
        self.config = config
        self.places, self.first_tokens = Places(config.window, config.reserved), FirstTokens()
        self._queues = tuple(FairQueue(config.weights) for _ in PRIORITY)
        self._items: dict[int, _Item] = {}
        self._runs: dict[int, _Item] = {}  # of these, as many as the window at most
        self._unsent = Unseen()
        self._queued_tokens = 0  # prompts of those that have no first token
        self._draining = False
        self._now_ns = 0
        self._acked_sid = -1
        self._ended = self._refused = 0
        self._told: Pressure | None = None

    def handle(self, now_ns: int, event: LaneEvent) -> list[LaneAction]:
        """One event in, what follows from it out."""
        self._now_ns = now_ns
        out: list[LaneAction] = []
        match event:
            case Submit():
                self._submit(event, out)
            case Abort(sid=sid):
                self._abort(sid, out)
            case Heard(sid=sid):
                self._heard(self._runs[sid], 0, out)
            case Done():
                self._done(self._runs[event.sid], event, out)
            case Drain():
                self._draining = True
            case _:
                pass  # Wake: what follows is due
        for sid in self._unsent.next_late(now_ns):
            if (item := self._items.get(sid)) and item.sent_ns is None:
                self._end(item, "deadline", out)
        self._send(out)
        pressure = self._pressure()
        if pressure != self._told:
            self._told = pressure
            out.append(pressure)
        return out

    def next_wake_ns(self) -> int | None:
        """The next deadline of those who wait here, the end of a pause, or when a first token becomes late."""
        moments = [
            item.late_ns for item in self._runs.values()
            if item.late_ns is not None and item.late_ns > self._now_ns and not item.heard
        ]
        if (late_ns := self._unsent.next_late_ns()) is not None:
            moments.append(late_ns)
            if (resume_ns := self.places.resume_ns) is not None and resume_ns > self._now_ns:
                moments.append(resume_ns)
        return min(moments, default=None)

    # ------------------------------------------------------------ events

    def _submit(self, ask: Submit, out: list[LaneAction]) -> None:
        assert ask.sid not in self._items, "submit: the driver never repeats a sid"
        self._acked_sid = max(self._acked_sid, ask.sid)
        if self._draining:
            out.append(Ended(ask.sid, "draining"))
            return
        self._items[ask.sid] = item = _Item(ask)
        self._queued_tokens += ask.prompt_tokens
        self._wait(item)

    def _abort(self, sid: int, out: list[LaneAction]) -> None:
        item = self._items.get(sid)
        if item is None or item.recalled:
            return
        if item.sent_ns is None:
            self._end(item, "aborted", out)
        else:
            item.recalled = True
            out.append(Recall(sid))

    def _heard(self, item: _Item, cached_tokens: int, out: list[LaneAction]) -> None:
        """Its first token."""
        if item.heard:
            return
        assert item.sent_ns is not None, "heard: only what was sent has tokens"
        item.heard = True
        self._queued_tokens -= item.ask.prompt_tokens
        self.first_tokens.add(self._now_ns, self._now_ns - item.sent_ns, item.ask.prompt_tokens)
        out.append(FirstToken(item.ask.sid, item.queue_ns, cached_tokens))

    def _done(self, item: _Item, done: Done, out: list[LaneAction]) -> None:
        del self._runs[done.sid]
        self.places.give_back(item.ask.priority)
        if done.reason in GOOD:
            self.places.answered()
            self._heard(item, done.cached_tokens, out)  # an answer without a word is an answer too
        elif done.reason == "busy":
            self._refused += 1
            self.places.refused(self._now_ns, done.retry_after_ns)
            if self._runs and not (item.refused or item.recalled):  # a place will come free
                item.refused, item.sent_ns, item.late_ns = True, None, None
                self._wait(item)
                return
        self._end(item, "aborted" if item.recalled and done.reason not in GOOD else done.reason, out, done)

    # ------------------------------------------------------------ who is sent, who is told

    def _wait(self, item: _Item) -> None:
        """It waits here: new, or put back to its old place."""
        ask = item.ask
        tenant = ask.tenant if self.config.fairness.enabled else ""
        self._queues[ask.priority].push(tenant, ask.sid, (ask.sent_ns, ask.sid))
        self._unsent.add(item)

    def _send(self, out: list[LaneAction]) -> None:
        """As many as there are places for; who is next and has none lets nobody pass."""
        while (queue := next((queue for queue in self._queues if queue.waiting), None)) is not None:
            sid = queue.head()
            assert sid is not None, "head: somebody waits"
            item = self._items[sid]
            if not self.places.free(self._now_ns, item.ask.priority):
                return
            queue.pop()
            if item.first_ns is None:
                item.first_ns = self._now_ns
                queue.charge(sid, item.ask.prompt_tokens * self.config.fairness.prompt_token_weight)
            self.places.take(item.ask.priority)
            self._unsent.seen(item)
            self._runs[sid] = item
            item.sent_ns = self._now_ns
            least_ns = self.first_tokens.least_ns(item.ask.prompt_tokens)
            item.late_ns = None if least_ns is None else self._now_ns + least_ns
            out.append(Dispatch(sid))

    def _end(self, item: _Item, reason: EndReason, out: list[LaneAction], done: Done | None = None) -> None:
        """``done``: what the upstream did for it, if it was sent there."""
        ask, costs = item.ask, self.config.fairness
        queue, outputs = self._queues[ask.priority], done.output_tokens if done else 0
        cached_tokens = min(done.cached_tokens, ask.prompt_tokens) if done else 0
        queue.charge(ask.sid, outputs * costs.output_token_weight)
        queue.remove(ask.sid)
        self._unsent.seen(item)
        del self._items[ask.sid]
        self._ended += 1
        if not item.heard:
            self._queued_tokens -= ask.prompt_tokens
        computed = max(1, ask.prompt_tokens - cached_tokens) if item.heard else 0
        out.append(Ended(ask.sid, reason, computed, cached_tokens, outputs, item.queue_ns))

    def _pressure(self) -> Pressure:
        """Its own queue, and who has waited too long in the upstream's."""
        counts = {name: len(sids) for name, sids in self._unsent.classes.items() if sids}
        oldest = {name: self._unsent.oldest_ns(name) for name in counts}
        for item in self._runs.values():
            if item.late_ns is not None and item.late_ns <= self._now_ns and not item.heard:
                name = item.ask.traffic_class
                counts[name] = counts.get(name, 0) + 1
                oldest[name] = min(oldest.get(name, item.late_ns), item.late_ns)
        return Pressure(
            replica=self.config.index, acked_sid=self._acked_sid, running=len(self._runs),
            waiting=tuple(Waiting(name, counts[name], oldest[name]) for name in sorted(counts)),
            queued_tokens=self._queued_tokens,
            closed_until_ns=self.places.resume_ns or 0,
        )

    # ------------------------------------------------------------ windows for others

    def stats(self) -> LaneStats:
        """A snapshot."""
        return LaneStats(
            len(self._runs), len(self._items) - len(self._runs), self.places.limit, self._ended, self._refused
        )

    def check(self) -> None:
        """Invariants."""
        self.places.check()
        runs = {sid: item for sid, item in self._items.items() if item.sent_ns is not None}
        assert runs == self._runs, "runs: what was sent and is not over"
        assert self.places.running == len(runs), "places: one for each that runs"
        assert self.places.others == sum(i.ask.priority > 0 for i in runs.values()), "places: of all but critical"
        for priority, queue in enumerate(self._queues):
            queue.check()
            ours = {sid: i.sent_ns is None for sid, i in self._items.items() if i.ask.priority == priority}
            assert queue.waits() == ours, "queues: all that have not ended, and who of them waits"
            if queue.waiting:
                assert not self.places.free(self._now_ns, priority), "liveness: nobody waits beside a free place"
                break  # whoever comes after it may not pass
        unsent = {sid for sids in self._unsent.classes.values() for sid in sids}
        assert unsent == self._items.keys() - runs.keys(), "unsent: exactly those that wait here"
        waits_tokens = sum(item.ask.prompt_tokens for item in self._items.values() if not item.heard)
        assert self._queued_tokens == waits_tokens, "queue: the sum of its parts"

"""The live gateway driver: stamps the time, calls ``handle``, journals, carries out the actions, re-arms one timer.

The only place in the ingress process with a clock and an event loop. One task at a time enters; an action that brings
an event at once goes through the inbox, so ``handle`` is never entered twice. Text lives here, under the ids that the
machine speaks of.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from engine.events import (
    Abort,
    Answer,
    Arrive,
    Attach,
    Cancel,
    Charged,
    Drain,
    DropAnswer,
    DropPlace,
    DropVector,
    Ended,
    FindSimilar,
    FirstToken,
    GatewayAction,
    GatewayEvent,
    Hold,
    Invalidate,
    LedgerRecord,
    PlaceAnswer,
    Record,
    Reject,
    Release,
    Remember,
    ReplicaBack,
    ReplicaLost,
    StoreAnswer,
    StoreVector,
    Submit,
    Wake,
)
from engine.ledger.journal import JournalWriter
from engine.model.blockhash import Hasher
from engine.model.index import VectorIndex
from engine.model.stepping import SamplingParams
from engine.model.tokenizer import Detokenizer
from engine.model.wire import Output, Said, ToReplica, Work
from engine.policy.gateway import Gateway
from engine.service.alarm import Alarm
from engine.service.charges import charge_of
from engine.service.similar import FRESH, Done, PackedVectors, SimilarQuestions
from engine.service.stops import cut
from engine.service.stream import ClientStream, StoredAnswer, Tape
from engine.units import S_NS, ms_to_ns


class Payload(NamedTuple):
    """What a machine does not see of a request."""

    prompt: list[int]
    params: SamplingParams
    question: str
    said: Said = ""  # only where it is answered by who takes no tokens


class Kept(NamedTuple):
    """What the response caches hold: what the machine knows at ``at_ns``, and the texts by their answers' ids."""

    at_ns: int
    what: Remember
    texts: list[tuple[str, StoredAnswer]]


class ReplicaLink(Protocol):
    """The way to all replicas, wherever they run. Answers come back through ``GatewayDriver.hear``."""

    def send(self, replica: int, message: ToReplica) -> None:
        """Queue a message; never blocks."""
        ...


class Encoder(Protocol):
    """The way to vectors, wherever they are made."""

    def encode(self, text_key: bytes, text: str, deadline_s: float, done: Done) -> object:
        """Calls ``done`` exactly once, perhaps before this returns. The result, if any, is for ``cancel``."""
        ...

    def cancel(self, call: Any) -> None:
        """``done`` need not be called any more."""
        ...


class GatewayDriver:
    """Drives one Gateway on the running asyncio loop."""

    def __init__(
        self,
        machine: Gateway,
        clock_ns: Callable[[], int],
        link: ReplicaLink,
        hasher: Hasher,
        detokenizer: Callable[[], Detokenizer],
        fallbacks: dict[str, str],
        journal: JournalWriter | None = None,
        ledger: Callable[[LedgerRecord], None] | None = None,
        encoder: Encoder | None = None,
        dims: int = 384,
        called_off: Callable[[], None] | None = None,
        tell_others: Callable[[Invalidate], None] | None = None,
    ) -> None:
        """``fallbacks``: answer id to text. ``ledger`` gets every record. Without an encoder nothing is similar.

        ``called_off`` is called after each Invalidate: what is kept elsewhere may hold what may serve no more.
        ``tell_others``: the gateways beside this one, of what it was told to call off.
        """
        self.machine = machine
        self._clock_ns, self._link, self._hasher = clock_ns, link, hasher
        self._detokenizer, self._journal, self._ledger = detokenizer, journal, ledger
        self._answers = {answer_id: StoredAnswer(text) for answer_id, text in fallbacks.items()}
        self._payloads: dict[int, Payload] = {}  # of requests that may still be submitted
        self._held: dict[int, Payload] = {}  # of requests that have their answer, and may be computed once more
        self._encoder, self._called_off, self._tell_others = encoder, called_off, tell_others
        self._questions: OrderedDict[bytes, str] = OrderedDict()  # asked for lately, in case their vectors are late
        self._similar = SimilarQuestions(
            self._encode if encoder else None, encoder.cancel if encoder else _nobody_waits,
            ms_to_ns(machine.config.semantic.deadline_ms), self.deliver, dims,
            machine.config.semantic.vectors,
        )
        self._charged: dict[int, Charged] = {}  # until ``charge`` returns
        self._streams: dict[int, ClientStream] = {}
        self._tapes: dict[int, Tape] = {}
        self._replica_of: dict[int, int] = {}  # sid -> where it is computed
        self._last_rid = -1
        self._last_ns = 0
        self._inbox: deque[GatewayEvent] = deque()
        self._busy = False
        self._alarm = Alarm(clock_ns, self._ring)

    # ------------------------------------------------------------ what the ingress calls

    def now_ns(self) -> int:
        """The machine's clock: never decreasing."""
        now_ns = self._clock_ns()
        if now_ns > self._last_ns:
            self._last_ns = now_ns
        return self._last_ns

    def next_rid(self) -> int:
        """A number for the request that is about to arrive."""
        self._last_rid += 1
        return self._last_rid

    def arrive(
        self, ask: Arrive, prompt: list[int], params: SamplingParams, question: str = "", said: Said = ""
    ) -> ClientStream:
        """A request under a number from ``next_rid``. The stream has the answer, sooner or later.

        ``question``: the text of ``ask.text_key``, where similar questions may be looked for.
        """
        stream = ClientStream(ask.rid, ask.request_id)
        self._streams[ask.rid] = stream
        self._payloads[ask.rid] = Payload(prompt, params, question, said)
        self.deliver(ask)
        return stream

    def charge(self, request_id: str, tenant: str, user: str, tokens: int) -> Charged:
        """Work beside the machine, out of the same limits: may it begin? Not from within an event's carrying out."""
        rid = self.next_rid()
        self.deliver(charge_of(self._hasher, rid, request_id, tenant, user, tokens))
        return self._charged.pop(rid)

    def cancel(self, rid: int) -> None:
        """The client has gone; unknown ids are no-ops."""
        if rid in self._streams:
            self.deliver(Cancel(rid))
            self._forget(rid)

    def drain(self) -> None:
        """Take no more work; finish what runs."""
        for replica in range(self.machine.config.replicas):
            self._link.send(replica, Drain())
        self.deliver(Drain())

    def cut_short(self) -> None:
        """The drain has taken too long: whoever still waits for a replica is told that this server goes."""
        for sid, replica in self._replica_of.items():
            self._link.send(replica, Abort(sid))
        self.hear(Output([Ended(sid, "draining") for sid in self._replica_of]))

    @property
    def in_flight(self) -> int:
        """Clients that wait for an answer."""
        return len(self._streams)

    def lose(self, replica: int, for_good: bool = False) -> None:
        """It has died: what it was computing ends now, rather than never."""
        self.deliver(ReplicaLost(replica, for_good))
        self.hear(Output([Ended(sid, "lost") for sid, where in self._replica_of.items() if where == replica]))

    def welcome(self, replica: int) -> None:
        """It is there again."""
        self.deliver(ReplicaBack(replica))

    def invalidate(self, what: Invalidate) -> None:
        """These answers serve nobody any more, here and at the gateways beside this one."""
        try:
            self.call_off(what)
        finally:  # a snapshot that cannot be removed is this one's trouble: the others must hear all the same
            if self._tell_others is not None:
                self._tell_others(what)

    def call_off(self, what: Invalidate) -> None:
        """These answers serve nobody any more here."""
        self.deliver(what)
        if self._called_off is not None:
            self._called_off()

    def kept(self) -> Kept:
        """All that can serve in another life. A question whose vector was late is left out: nobody could find it."""
        now_ns, what = self.now_ns(), self.machine.answers.kept()
        similar = tuple(kept for kept in what.similar if self._similar.knows(*kept.entry.key))
        what = Remember(what.exact, similar, what.versions)
        return Kept(now_ns, what, [(answer_id, self._answers[answer_id]) for answer_id in answer_ids(what)])

    def packed(self, encoder: str) -> PackedVectors:
        """The vectors that belong to ``kept``, and some more."""
        return self._similar.pack(encoder)

    def remember(self, kept: Kept, questions: VectorIndex, answers: VectorIndex) -> None:
        """What another life kept, its times on this one's clock, before the first request."""
        wanted = [each.entry.key for each in kept.what.similar]
        self._answers.update(kept.texts)
        self._similar.take_back(questions, answers, wanted, dict(kept.texts))
        self.deliver(kept.what)

    def close(self) -> None:
        """No more events."""
        self._alarm.stop()
        if self._journal is not None:
            self._journal.close()

    # ------------------------------------------------------------ what the replica says

    def hear(self, output: Output) -> None:
        """One turn of a replica: text first, then what happened."""
        logprobs = dict(output.logprobs)
        for sid, ids in output.tokens:
            if (tape := self._tapes.get(sid)) and tape.record(ids, logprobs.get(sid, ())):
                self._link.send(self._replica_of[sid], Abort(sid))  # a stop string: only here is there a text
        for event in output.events:
            if isinstance(event, Ended | FirstToken) and event.sid not in self._tapes:
                continue  # it was cut short, and the replica had not heard of that
            if isinstance(event, Ended):
                event = self._with_text(event)
            self.deliver(event)

    def hear_text(self, sid: int, text: str) -> None:
        """A piece of an answer, from a replica that tells no tokens; how many they were is said at its end."""
        if (tape := self._tapes.get(sid)) and tape.record_text(text):
            self._link.send(self._replica_of[sid], Abort(sid))

    def _with_text(self, event: Ended) -> Ended:
        tape = self._tapes[event.sid]
        tape.close(event.reason, event.cached_tokens, event.output_tokens)
        if tape.reason not in ("stop", "length"):
            return event
        raw, outputs = tape.text.encode(), tape.tokens if tape.cut else event.output_tokens
        return Ended(
            event.sid, tape.reason, event.computed_tokens, event.cached_tokens, outputs, event.queue_ns,
            event.preemptions, answer_id=self._hasher.digest("answer", raw).hex(), answer_bytes=len(raw),
        )

    # ------------------------------------------------------------ the five things

    def deliver(self, event: GatewayEvent) -> None:
        """Tell the machine, and do what it says."""
        self._inbox.append(event)
        if self._busy:
            return
        self._busy = True
        try:
            while self._inbox:
                event = self._inbox.popleft()
                now_ns = self.now_ns()
                actions = self.machine.handle(now_ns, event)
                if self._journal is not None:
                    self._journal.write(now_ns, event, actions)
                for action in actions:
                    self._carry_out(action)
                if isinstance(event, Ended):
                    self._tapes.pop(event.sid, None)
                    self._replica_of.pop(event.sid, None)
        finally:
            self._busy = False
        self._alarm.set(self.machine.next_wake_ns())

    def _ring(self, wake_ns: int) -> None:
        self._last_ns = max(self._last_ns, wake_ns)  # a timer that fires a hair early is on time
        self.deliver(Wake())

    def _carry_out(self, action: GatewayAction) -> None:
        match action:
            case Answer() | Reject():
                self._end(action)
            case Record(record=record):
                if self._ledger is not None:
                    self._ledger(record)
            case Submit(sid=sid, rid=rid):
                payload = self._held.get(rid) or self._payloads[rid]
                tape = self._tapes[sid] = Tape(self._detokenizer(), payload.params.stop)
                self._replica_of[sid] = action.replica
                if rid not in self._held:
                    self._listen(tape, rid, "model")
                self._link.send(action.replica, Work(action, payload.prompt, payload.params, payload.said))
            case Attach(sid=sid, rid=rid):
                self._listen(self._tapes[sid], rid, "coalesced")
            case Abort(sid=sid):
                self._link.send(self._replica_of[sid], action)
            case FindSimilar(rid=rid, text_key=text_key):
                self._questions[text_key] = self._payloads[rid].question
                self._questions.move_to_end(text_key)
                if len(self._questions) > FRESH:
                    self._questions.popitem(last=False)
                self._similar.carry_out(action)
            case StoreVector() | DropVector() | DropPlace():
                self._similar.carry_out(action)
            case Charged(rid=rid):
                self._charged[rid] = action
            case StoreAnswer(answer_id=answer_id, sid=sid):
                tape = self._tapes[sid]
                self._answers[answer_id] = StoredAnswer(tape.text, tape.tokens, tape.reason)
            case DropAnswer(answer_id=answer_id):
                self._answers.pop(answer_id, None)
                self._similar.drop_answer(answer_id)
            case PlaceAnswer():
                self._similar.place(action, self._encode_answer)
            case Hold(rid=rid):
                self._held[rid] = self._payloads[rid]
            case Release(rid=rid):
                del self._held[rid]

    def _encode(self, text_key: bytes, within_ns: int, done: Done) -> Any:
        question = self._questions.get(text_key)
        if self._encoder is None or question is None:
            return done(None, "unfit")
        return self._encoder.encode(text_key, question, within_ns / S_NS, done)

    def _encode_answer(self, key: bytes, within_ns: int, done: Done) -> Any:
        stored = self._answers.get(key.decode())
        if self._encoder is None or stored is None or not stored.text.strip():
            return done(None, "unfit")
        text = stored.text.strip()
        return self._encoder.encode(self._hasher.digest("text", text), text, within_ns / S_NS, done)

    def _listen(self, tape: Tape, rid: int, tier: str) -> None:
        stream = self._streams[rid]
        stream.tier = tier
        tape.attach(stream)

    def _end(self, end: Answer | Reject) -> None:
        stream = self._streams[end.rid]
        if isinstance(end, Answer) and end.tier not in ("model", "coalesced"):
            answer, stops = self._answers[end.answer_id], self._payloads[end.rid].params.stop
            stream.reason = answer.reason
            stream.push(cut(answer.text, stops) if stops else answer.text, answer.tokens)
        stream.finish(end)
        self._forget(end.rid)

    def _forget(self, rid: int) -> None:
        del self._streams[rid], self._payloads[rid]
        self._similar.forget(rid)


def answer_ids(what: Remember) -> list[str]:
    """Each once."""
    exact = (entry.answer_id for entry in what.exact)
    return list(dict.fromkeys((*exact, *(kept.entry.answer_id for kept in what.similar))))


def _nobody_waits(call: Any) -> None:
    """Without an encoder there is no call to cancel."""

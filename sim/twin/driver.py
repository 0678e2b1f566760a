"""The SimPy drivers: the same machines on a simulated clock. ``env.now`` is an integer number of nanoseconds.

Each does the five things of a driver: stamp, ``handle``, journal, carry out, re-arm one timer. Callbacks on ranked
events, no process per request, no Store, no event per token. Ties at one instant are settled by rank, never by who
planned first; SimPy's own priorities are 0 and 1.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from enum import IntEnum

import simpy

from engine.events import (
    Abort,
    Answer,
    Arrive,
    Cancel,
    Charge,
    Charged,
    DropAnswer,
    DropPlace,
    DropVector,
    Ended,
    FindSimilar,
    GatewayAction,
    GatewayEvent,
    LedgerRecord,
    PlaceAnswer,
    Plan,
    Record,
    Reject,
    ReplicaAction,
    ReplicaEvent,
    RunStep,
    StepDone,
    StepFailed,
    StoreVector,
    Submit,
    Wake,
)
from engine.ledger.journal import JournalWriter
from engine.model.counting import CountingRunner
from engine.policy.gateway import Gateway
from engine.policy.replica import Replica
from engine.service.similar import Done, SimilarQuestions
from engine.stepcost import StepCost
from engine.units import ms_to_ns
from engine.values import Section
from sim.twin.encoder import Call, EncoderServer

Teller = Callable[[GatewayEvent], None]
Fails = Callable[[int, int], bool]  # (replica, when its step began) -> whether that step raises


def never(replica: int, began_ns: int) -> bool:
    """Hardware without faults."""
    return False


class Rank(IntEnum):
    """Order at one instant: what ends comes before what begins."""

    STEP_DONE = 2
    TO_GATEWAY = 3
    ARRIVE = 4
    WAKE = 5
    TO_REPLICA = 6
    TURN = 7
    ENCODER = 8


class Lags(Section):
    """What lies between the machines, measured apart from the steps. Zero: the equivalence test's world."""

    admit_ns: int = 0  # scheduled instant -> Arrive: connection, parsing, tokenising
    pipe_ns: int = 0  # gateway -> replica and back, each way
    turn_ns: int = 0  # end of a step -> begin of the next: planning, mailbox
    emit_ns: int = 0  # gateway's word -> client


def now_ns(env: simpy.Environment) -> int:
    """``env.now``, which one float delay anywhere would have turned into a float for good."""
    now = env.now
    assert isinstance(now, int), "a doorbuster's environment starts at an integer, and all its delays are integers"
    return now


def at(env: simpy.Environment, rank: Rank, delay_ns: int, call: Callable[[], None]) -> None:
    """Run ``call`` so much later, in its rank."""
    event = simpy.Event(env)
    event._ok, event._value = True, None
    assert event.callbacks is not None
    event.callbacks.append(lambda _: call())
    env.schedule(event, rank, delay_ns)  # type: ignore[arg-type]


class GatewaySim:
    """Drives one Gateway."""

    def __init__(
        self,
        env: simpy.Environment,
        machine: Gateway,
        lags: Lags,
        answer_of: Callable[[int, int], tuple[str, int]],
        journal: JournalWriter | None = None,
        check: bool = False,
        encoder: EncoderServer | None = None,
        dims: int = 384,
    ) -> None:
        """``answer_of(rid, output_tokens)``: id and bytes of the text that a request's computation would give."""
        self.env, self.machine, self._lags, self._answer_of = env, machine, lags, answer_of
        self._encoder = encoder
        self._similar = SimilarQuestions(
            self._encode if encoder else None, EncoderServer.cancel, ms_to_ns(machine.config.semantic.deadline_ms),
            self.tell, dims, machine.config.semantic.vectors,
        )
        self._journal, self._check = journal, check
        self.replicas: list[ReplicaSim] = []
        self.records: list[LedgerRecord] = []
        self.answers: list[Answer | Reject] = []
        self.charged: list[Charged] = []
        self._submits: dict[int, Submit] = {}
        self._waiting: dict[int, None] = {}  # clients without an answer
        self._inbox: deque[GatewayEvent] = deque()
        self._busy = False
        self._armed_ns: int | None = None

    def arrive(self, ask: Arrive) -> None:
        """A request has come."""
        self._waiting[ask.rid] = None
        self.tell(ask)

    def charge(self, asked: Charge) -> None:
        """Work beside the machines is to be paid for."""
        self.tell(asked)

    def give_up(self, rid: int) -> None:
        """The client has lost patience, if it still waits."""
        if rid in self._waiting:
            self.tell(Cancel(rid))
            self._forget(rid)

    def tell(self, event: GatewayEvent) -> None:
        """An event has come."""
        self._inbox.append(event)
        if self._busy:
            return
        self._busy = True
        while self._inbox:
            event = self._inbox.popleft()
            if isinstance(event, Ended):
                event = self._with_answer(event)
            actions = self.machine.handle(now_ns(self.env), event)
            if self._journal is not None:
                self._journal.write(now_ns(self.env), event, actions)
            if self._check:
                self.machine.check()
            for action in actions:
                self._carry_out(action)
        self._busy = False
        self._arm()

    def _with_answer(self, event: Ended) -> Ended:
        rid = self._submits.pop(event.sid).rid
        if event.reason not in ("stop", "length"):
            return event
        answer_id, answer_bytes = self._answer_of(rid, event.output_tokens)
        return Ended(
            event.sid, event.reason, event.computed_tokens, event.cached_tokens, event.output_tokens, event.queue_ns,
            event.preemptions, answer_id=answer_id, answer_bytes=answer_bytes,
        )

    def _carry_out(self, action: GatewayAction) -> None:
        match action:
            case Submit(sid=sid):
                self._submits[sid] = action
                self._send(action.replica, action)
            case Abort(sid=sid):
                self._send(self._submits[sid].replica, action)
            case FindSimilar() | StoreVector() | DropVector() | DropPlace():
                self._similar.carry_out(action)
            case PlaceAnswer():
                self._similar.place(action, self._encode_answer)
            case DropAnswer(answer_id=answer_id):
                self._similar.drop_answer(answer_id)
            case Charged():
                self.charged.append(action)
            case Answer(rid=rid) | Reject(rid=rid):
                self._forget(rid)
                self.answers.append(action)
            case Record(record=record):
                self.records.append(record)

    def _encode(self, text_key: bytes, within_ns: int, done: Done) -> Call | None:
        assert self._encoder is not None
        return self._encoder.encode(text_key, now_ns(self.env) + within_ns, done)

    @staticmethod
    def _encode_answer(key: bytes, within_ns: int, done: Done) -> None:
        """There are no texts here: each answer stays by itself, unless it is another's to the letter."""
        done(None, "unfit")

    def _forget(self, rid: int) -> None:
        del self._waiting[rid]
        self._similar.forget(rid)

    def _send(self, replica: int, message: Submit | Abort) -> None:
        there = self.replicas[replica]
        at(self.env, Rank.TO_REPLICA, self._lags.pipe_ns, lambda: there.receive(message))

    def _arm(self) -> None:
        wake_ns = self.machine.next_wake_ns()
        if wake_ns is None or wake_ns == self._armed_ns:
            return
        self._armed_ns = wake_ns
        at(self.env, Rank.WAKE, max(0, wake_ns - now_ns(self.env)), lambda: self._ring(wake_ns))

    def _ring(self, wake_ns: int) -> None:
        if wake_ns == self._armed_ns and wake_ns == self.machine.next_wake_ns():
            self._armed_ns = None
            self.tell(Wake())


class ReplicaSim:
    """Drives one Replica on a cost model instead of hardware."""

    def __init__(
        self,
        env: simpy.Environment,
        machine: Replica,
        runner: CountingRunner,
        cost: StepCost,
        lags: Lags,
        output_tokens_of: Callable[[int], int],
        tell: Teller,
        journal: JournalWriter | None = None,
        check: bool = False,
        fails: Fails = never,
    ) -> None:
        """``output_tokens_of(rid)``: length of a request's answer, as far as ``max_tokens`` lets it run."""
        self._fails = fails
        self.env, self.machine, self.runner, self.cost, self._lags = env, machine, runner, cost, lags
        self._output_tokens_of, self._tell, self._journal, self._check = output_tokens_of, tell, journal, check
        self.busy_ns = 0
        self._mailbox: list[Submit | Abort] = []
        self._turn_planned = False
        self._step: RunStep | None = None
        self._began_ns = 0
        self._steps = 0
        self._generation = 0

    def receive(self, message: Submit | Abort) -> None:
        """A message from a gateway; deaf during a step, though a run of several ends at the next border."""
        self._mailbox.append(message)
        if self._step is None:
            self._plan_turn(0)
        elif self._steps > 1:
            self._shorten()

    def _plan_turn(self, delay_ns: int) -> None:
        if not self._turn_planned:
            self._turn_planned = True
            at(self.env, Rank.TURN, delay_ns, self._turn)

    def _turn(self) -> None:
        self._turn_planned = False
        messages, self._mailbox = self._mailbox, []
        new = {message.sid for message in messages if isinstance(message, Submit)}
        for message in messages:
            if isinstance(message, Abort) and message.sid not in new:
                self._handle(message)
        for message in messages:
            if isinstance(message, Submit):
                length = min(self._output_tokens_of(message.rid), message.max_tokens)
                self.runner.add(message.sid, message.prompt_tokens, length, message.max_tokens)
                self._handle(message)
        for message in messages:
            if isinstance(message, Abort) and message.sid in new:
                self._handle(message)
        self._handle(Plan())
        if self._step is not None:
            self._began_ns = now_ns(self.env)
            self._steps = self.runner.steps_until_end(self._step) if self._step.at_most > 1 else 1
            self._schedule_end()

    def _schedule_end(self) -> None:
        self._generation += 1
        generation = self._generation
        end_ns = self._began_ns + self._cost_of(self._steps)
        at(self.env, Rank.STEP_DONE, end_ns - now_ns(self.env), lambda: self._done(generation))

    def _cost_of(self, steps: int) -> int:
        assert self._step is not None
        return sum(self.cost.ns(self._step.shape, later) for later in range(steps))

    def _shorten(self) -> None:
        for steps in range(1, self._steps):
            if self._began_ns + self._cost_of(steps) >= self.env.now:
                self._steps = steps
                self._schedule_end()
                return

    def _done(self, generation: int) -> None:
        if generation != self._generation or self._step is None:
            return
        step, self._step = self._step, None
        self.busy_ns += now_ns(self.env) - self._began_ns
        if self._fails(self.machine.config.index, self._began_ns):
            self._handle(StepFailed("a fault of the scenario"))
        else:
            self._handle(self.runner.advance(step, self._steps))
        self._steps = 0
        if self._lags.turn_ns:
            self._plan_turn(self._lags.turn_ns)
        else:
            self._turn()

    def _handle(self, event: ReplicaEvent) -> None:
        actions = self.machine.handle(now_ns(self.env), event)
        if self._journal is not None:
            self._journal.write(now_ns(self.env), event, actions)
        if self._check and isinstance(event, StepDone):
            self.machine.check()
        for action in actions:
            self._carry_out(action)

    def _carry_out(self, action: ReplicaAction) -> None:
        if isinstance(action, RunStep):
            self._step = action
            return
        if isinstance(action, Ended):
            self.runner.forget(action.sid)
        at(self.env, Rank.TO_GATEWAY, self._lags.pipe_ns, lambda: self._tell(action))

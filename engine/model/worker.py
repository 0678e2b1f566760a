"""The replica driver: one Replica machine, one runner, and what lies between them. No sockets, no clock of its own.

A turn: what came in during the step goes to the machine (Aborts, Submits, the Aborts of these), then Plan. The same two
calls serve the worker process, the equivalence test's transport and calibration; ``process.py`` adds the loop.
"""

from __future__ import annotations

from collections.abc import Callable

from engine.events import (
    Abort,
    Drain,
    Ended,
    Plan,
    ReplicaEvent,
    ReplicaWord,
    RunStep,
    StepDone,
    StepFailed,
)
from engine.ledger.journal import JournalWriter
from engine.model.stepping import Emit, Runner, StepResult, TokenLogprobs
from engine.model.wire import Output, ToReplica, Work
from engine.policy.replica import Replica


class ReplicaDriver:
    """Stamps nothing: the caller owns the clock and hands in ``now_ns``, never decreasing."""

    def __init__(self, machine: Replica, runner: Runner, journal: JournalWriter | None = None) -> None:
        self.machine, self.runner, self._journal = machine, runner, journal
        self._outbox: list[ReplicaWord] = []

    def begin(self, now_ns: int, messages: list[ToReplica]) -> tuple[RunStep | None, Output | None]:
        """The hardware is free: take in what waited, plan. The step to run, and what to tell the gateways."""
        new = {message.submit.sid for message in messages if isinstance(message, Work)}
        for message in messages:
            if isinstance(message, Abort) and message.sid not in new:
                self._handle(now_ns, message)
        for message in messages:
            if isinstance(message, Work):
                submit = message.submit
                self.runner.submit(submit.sid, message.prompt, submit.max_tokens, submit.blocks, message.params)
                self._handle(now_ns, submit)
            elif isinstance(message, Drain):
                self._handle(now_ns, message)
        for message in messages:
            if isinstance(message, Abort) and message.sid in new:  # given up before it was ever seen
                self._handle(now_ns, message)
        step = self._handle(now_ns, Plan())
        return step, self._flush([], [])

    def run(self, step: RunStep, message_waits: Callable[[], bool], emit: Emit) -> StepResult:
        """Run it. What raises in a later one of several steps is met again by the next plan: those before have run.

        Their tokens are with the clients already, so the machine must hear of them; ``emit`` counts them.
        """
        emitted = 0

        def tell(tokens: list[tuple[int, list[int]]]) -> None:
            nonlocal emitted
            emitted += 1
            emit(tokens)

        result = self.runner.run(step, message_waits, tell)
        if isinstance(result.done, StepFailed) and emitted:
            return StepResult(StepDone(emitted))
        return result

    def finish(self, now_ns: int, result: StepResult) -> Output | None:
        """The step has run."""
        self._handle(now_ns, result.done)
        return self._flush(result.tokens, result.logprobs)

    def _handle(self, now_ns: int, event: ReplicaEvent) -> RunStep | None:
        actions = self.machine.handle(now_ns, event)
        if self._journal is not None:
            self._journal.write(now_ns, event, actions)
        step: RunStep | None = None
        for action in actions:
            if isinstance(action, RunStep):
                step = action
                continue
            if isinstance(action, Ended):
                self.runner.forget(action.sid)
            self._outbox.append(action)
        return step

    def _flush(
        self, tokens: list[tuple[int, list[int]]], logprobs: list[tuple[int, list[TokenLogprobs]]]
    ) -> Output | None:
        events, self._outbox = self._outbox, []
        return Output(events, tokens, logprobs) if events or tokens else None



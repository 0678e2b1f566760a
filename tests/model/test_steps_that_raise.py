"""What a replica driver makes of a step that raises: alone, in a batch, and as a later one of several.

Run: python -m pytest tests/model/test_steps_that_raise.py -q
Mutations it caught: the good steps before it not told; told twice; a raising first step told as done.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from engine.config import BatcherConfig, PrefixConfig, ReplicaConfig
from engine.events import Ended, RunStep, StepDone, StepFailed, Submit
from engine.model.blockhash import Hasher
from engine.model.fake import FakeRunner
from engine.model.stepping import Emit, SamplingParams, StepResult
from engine.model.wire import Work
from engine.model.worker import ReplicaDriver
from engine.policy.replica import Replica

HASHER, GREEDY = Hasher(b"k" * 16, 16), SamplingParams()
ANSWER = list(range(100, 120))
CONFIG = ReplicaConfig(
    batcher=BatcherConfig(step_tokens=64, slots=8, reserved_slots=0, reserved_blocks=0, max_multi_steps=8),
    prefix=PrefixConfig(block_tokens=16, blocks=64, pinned_blocks=0),
)


class Brittle:
    """A runner whose forward raises whenever a sequence is to say its n-th token; all else is the fake's."""

    def __init__(self, raises_at: dict[int, int]) -> None:
        self.fake = FakeRunner(lambda prompt: ANSWER, HASHER, None)
        self.forget = self.fake.forget
        self.raises_at = raises_at
        self.prompts: dict[int, int] = {}
        self.said: dict[int, int] = {}
        self.computed: dict[int, int] = {}

    def submit(self, sid: int, prompt: list[int], *rest: Any) -> None:
        self.prompts[sid], self.said[sid] = len(prompt), 0
        self.fake.submit(sid, prompt, *rest)

    def raises(self, step: RunStep, later: bool) -> bool:
        """Is one in it whose turn has come?"""
        off = set() if later else {*step.stop, *(start.sid for start in step.start)}
        speak = [sid for sid in self.fake.counting.decoding if sid not in off]
        if not later:
            stands = self.computed | {start.sid: start.computed for start in step.start}
            speak += [c.sid for c in step.chunks if stands[c.sid] + c.tokens == self.prompts[c.sid] + self.said[c.sid]]
        return any(self.said[sid] == self.raises_at.get(sid, -1) for sid in speak)

    def run(self, step: RunStep, message_waits: Callable[[], bool], emit: Emit | None = None) -> StepResult:
        tokens: list[tuple[int, list[int]]] = []
        done = StepDone()
        for ran in range(step.at_most):
            if self.raises(step, ran > 0):
                return StepResult(StepFailed("brittle"))
            result = self.fake.advance(RunStep(step.step + ran, step.shape) if ran else step, 1)
            assert isinstance(result.done, StepDone)
            if not ran:
                self.computed |= {start.sid: start.computed for start in step.start}
                for chunk in step.chunks:
                    self.computed[chunk.sid] += chunk.tokens
            for sid, ids in result.tokens:
                self.said[sid] += len(ids)
            tokens += result.tokens
            now = result.done
            done = StepDone(ran + 1, done.first + now.first, now.ended, done.filled + now.filled)
            if done.ended or ran + 1 == step.at_most or message_waits():
                break
            if emit is not None:
                emit(tokens)
                tokens = []
        return StepResult(done, tokens)


def play(raises_at: dict[int, int], asked: int) -> tuple[dict[int, list[int]], dict[int, str], list[object]]:
    """(tokens, reasons, what the machine heard of each step) of so many requests that come together."""
    runner = Brittle(raises_at)
    driver = ReplicaDriver(Replica(CONFIG), runner)  # type: ignore[arg-type]
    tokens: dict[int, list[int]] = {}
    reasons: dict[int, str] = {}
    heard: list[object] = []

    def hear(new: list[tuple[int, list[int]]]) -> None:
        for sid, ids in new:
            tokens.setdefault(sid, []).extend(ids)

    inbox = []
    for sid in range(asked):
        prompt = [1_000 * sid + n for n in range(20 + sid)]
        blocks = HASHER.chain(HASHER.root("t", "m"), prompt)
        inbox.append(Work(Submit(sid, sid, "t", "chat", 1, 0, 1 << 60, len(prompt), 12, blocks), prompt, GREEDY))
    for now_ns in range(200):
        step, output = driver.begin(now_ns, inbox if not now_ns else [])  # type: ignore[arg-type]
        if step is None:
            break
        result = driver.run(step, lambda: False, hear)
        heard.append(result.done)
        output = driver.finish(now_ns, result)
        if output is not None:
            hear(output.tokens)
            reasons |= {event.sid: event.reason for event in output.events if isinstance(event, Ended)}
    driver.machine.check()
    assert driver.machine.stats().prefix.used == 0, "blocks whole"
    return tokens, reasons, heard


def test_the_good_ones_of_several_steps_are_told_and_the_next_plan_meets_it_again() -> None:
    tokens, reasons, heard = play({0: 5}, asked=1)
    assert tokens == {0: ANSWER[:5]} and reasons == {0: "failed"}
    assert [done.steps for done in heard if isinstance(done, StepDone)] == [1, 4]
    assert sum(isinstance(done, StepFailed) for done in heard) == 1


@pytest.mark.parametrize("at", [0, 1, 5, 11])
@pytest.mark.parametrize("culprits", [{3}, {0, 6}, {1, 2, 3, 4}])
def test_neighbours_say_all_they_had_to_say(culprits: set[int], at: int) -> None:
    tokens, reasons, heard = play(dict.fromkeys(culprits, at), asked=7)
    for sid in range(7):
        assert reasons[sid] == ("failed" if sid in culprits else "length")
        assert tokens.get(sid, []) == ANSWER[: at if sid in culprits else 12]
    assert sum(isinstance(done, StepFailed) for done in heard) <= len(culprits) * 4

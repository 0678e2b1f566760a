"""A model without weights: says a text that is known beforehand, one token a step, in the time a cost model gives.

For load and quality tests of everything but the model. By default it repeats the last user message; a table can say
more. No torch. The counting is the twin's own (``counting.py``); only the words and the waiting are added here.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from engine.events import Filled, RunStep, StepDone, StepShape
from engine.model.blockhash import Hasher
from engine.model.counting import CountingRunner
from engine.model.smalllm import small_tokenizer
from engine.model.stepping import Emit, SamplingParams, StepResult
from engine.units import S_NS

StepCost = Callable[[StepShape, int], int]  # (shape of the first step, how many steps later) -> ns


class FakeRunner:
    """A ``stepping.Runner``. ``cost_ns`` says how long a step takes; None means no time at all."""

    def __init__(self, reply: Callable[[list[int]], list[int]], hasher: Hasher, cost_ns: StepCost | None) -> None:
        self.counting = CountingRunner(hasher)
        self._reply, self._cost_ns = reply, cost_ns
        self._unsaid: dict[int, list[int]] = {}  # what is left of each answer, last token first

    def submit(
        self, sid: int, prompt: list[int], max_tokens: int, blocks: tuple[bytes, ...], params: SamplingParams
    ) -> None:
        """See ``stepping.Runner``."""
        answer = self._reply(prompt)[:max_tokens]
        self._unsaid[sid] = answer[::-1]
        self.counting.add(sid, len(prompt), len(answer), max_tokens)

    def forget(self, sid: int) -> None:
        """See ``stepping.Runner``."""
        self.counting.forget(sid)
        self._unsaid.pop(sid, None)

    def run(self, step: RunStep, message_waits: Callable[[], bool], emit: Emit | None = None) -> StepResult:
        """See ``stepping.Runner``. Sleeps for what the steps cost."""
        filled: list[Filled] = []
        said: dict[int, list[int]] = {}
        due_ns = time.monotonic_ns()
        ran = 0
        while True:
            if self._cost_ns is not None:
                due_ns += self._cost_ns(step.shape, ran)
                time.sleep(max(0, due_ns - time.monotonic_ns()) / S_NS)
            done, tokens = self._advance(RunStep(step.step + ran, step.shape) if ran else step, 1)
            ran += 1
            filled += done.filled
            for sid, ids in tokens:
                said.setdefault(sid, []).extend(ids)
            if ran == step.at_most or done.ended or message_waits():
                break
            if emit is not None:
                emit(list(said.items()))
                said.clear()
        return StepResult(StepDone(ran, done.first, done.ended, tuple(filled)), list(said.items()))

    def advance(self, step: RunStep, steps: int) -> StepResult:
        """``steps`` steps at once, without waiting."""
        return StepResult(*self._advance(step, steps))

    def _advance(self, step: RunStep, steps: int) -> tuple[StepDone, list[tuple[int, list[int]]]]:
        speaking = [(sid, steps) for sid in self.counting.decoding if sid not in step.stop]
        done = self.counting.advance(step, steps)
        rows = self.counting.rows
        speaking += [(c.sid, 1) for c in step.chunks if rows[c.sid].computed == rows[c.sid].known - 1]
        tokens = [(sid, self._say(sid, n)) for sid, n in speaking]
        return done, [(sid, ids) for sid, ids in tokens if ids]

    def _say(self, sid: int, most: int) -> list[int]:
        unsaid = self._unsaid[sid]
        return [unsaid.pop() for _ in range(min(most, len(unsaid)))]


def speaker(table: dict[str, str]) -> Callable[[list[int]], list[int]]:
    """What the fake says to a prompt: the table's answer to its last user message, or that message again."""
    tokenizer = small_tokenizer()
    start, end = (tokenizer.encode(mark)[0] for mark in ("<|im_start|>", "<|im_end|>"))
    role = tokenizer.encode("user\n")

    def reply(prompt: list[int]) -> list[int]:
        for at in range(len(prompt) - 1, -1, -1):
            if prompt[at] == start and prompt[at + 1 : at + 1 + len(role)] == role:
                body = prompt[at + 1 + len(role) :]
                said = body[: body.index(end)] if end in body else body
                answer = table.get(tokenizer.decode(said).strip())
                return said if answer is None else tokenizer.encode(answer)
        return prompt[-8:]

    return reply

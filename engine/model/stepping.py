"""What a runner is: submit a prompt, run planned steps, forget. No torch here: the fake model and the worker share it.

``RunStep`` tells the difference to the last step; the runner keeps the running set, the tokens and their KV chain.
Results come in batch order: decode rows by ``sid``, then chunks as planned. Knows nothing of queues or clocks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import msgspec

from engine.events import RunStep, StepDone, StepFailed

MAX_TOP_LOGPROBS = 20  # alternatives that a client may ask for beside each token


class SamplingParams(msgspec.Struct, frozen=True, gc=False):
    """How the next token is chosen, and what is wanted of it.

    ``temperature`` 0 is greedy; ``seed`` makes a sample repeatable; ``top_k`` 0 is no limit. ``stop`` is for whoever
    sees the text: a runner knows tokens only. ``logprobs``: None, or how many alternatives beside the token's own.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    ignore_eos: bool = False
    top_k: int = 0
    stop: tuple[str, ...] = ()
    logprobs: int | None = None


class TokenLogprobs(msgspec.Struct, frozen=True, gc=False):
    """Natural logarithm of a token's probability, and the likeliest tokens' at its place: (id, logprob), best first."""

    logprob: float
    top: list[tuple[int, float]] = []


Emit = Callable[[list[tuple[int, list[int]]]], None]  # new tokens by sid, in batch order


class StepResult(msgspec.Struct, frozen=True, gc=False):
    """``done`` goes to the replica machine, the rest to the clients.

    ``tokens``: new ones by sid. ``logprobs``: one for each of them, for the sids alone that asked.
    """

    done: StepDone | StepFailed
    tokens: list[tuple[int, list[int]]] = []
    logprobs: list[tuple[int, list[TokenLogprobs]]] = []


class Runner(Protocol):
    """A model that runs steps. One thread calls it."""

    def submit(
        self, sid: int, prompt: list[int], max_tokens: int, blocks: tuple[bytes, ...], params: SamplingParams
    ) -> None:
        """Payload of a new request; ``blocks`` is the hash chain of the prompt's full blocks. Nothing runs yet."""
        ...

    def forget(self, sid: int) -> None:
        """Drop the payload of a request that ended or was aborted. Unknown ids are no-ops."""
        ...

    def run(self, step: RunStep, message_waits: Callable[[], bool], emit: Emit | None = None) -> StepResult:
        """Run one step, or up to ``at_most`` equal decode steps until a sequence ends or ``message_waits()``.

        A step that brought log-probabilities is the last too: ``emit`` carries none.
        Between two steps ``emit`` gets the tokens so far, so that clients need not wait for the last of them; the
        result then holds only the rest.

        An end token (unless ``ignore_eos``) ends its sequence with "stop": it was computed, but it is no output: it
        is in neither ``tokens`` nor ``first`` nor the count against ``max_tokens``. The ``max_tokens``-th output
        token ends it with "length". A sequence that ended has left the running set; naming it in ``stop`` is a no-op.
        Never raises for what the model does: StepFailed says why, and the sequences stay until they are stopped.
        """
        ...

"""What a replica and its hardware say to each other: a step, told as the difference to the last, and what it brought.

Part of the seam: ``events.py`` names these too. Blocks and sequences are numbers here, tokens are counts.
"""

from __future__ import annotations

from typing import Literal

from engine.values import Struct

# "busy", "refused": of upstreams only; it takes no more at the moment, or it will never take this one
EndReason = Literal["stop", "length", "aborted", "deadline", "failed", "draining", "lost", "busy", "refused"]


class SeqStart(Struct):
    """A sequence (re-)enters: its first ``computed`` tokens are already in the KV of ``blocks``."""

    sid: int
    computed: int
    blocks: tuple[int, ...]  # block table, in order; long enough for this step's tokens


class Grow(Struct):
    """Blocks appended to a running sequence's table."""

    sid: int
    blocks: tuple[int, ...]


class Chunk(Struct):
    """Compute the next ``tokens`` known tokens of ``sid``; reaching the last one yields a new token."""

    sid: int
    tokens: int


class StepShape(Struct):
    """What a step costs by: the features of ``sim/twin/cost.py``. For the first of ``at_most`` steps."""

    prefill_tokens: int = 0
    prefill_rows: int = 0
    decode_rows: int = 0
    decode_kv_tokens: int = 0  # sum over decode rows of the context each attends to, own token included
    attention_area: int = 0  # sum over chunks of chunk * (context before + chunk / 2), in half units: doubled


class RunStep(Struct):
    """One step, told as the difference to the last.

    A sequence joins the decode rows by itself in the step after the chunk that reached its last known token, and
    leaves them when it is stopped or has ended; one still short of its chunks and without one this time waits.
    With ``at_most > 1`` (pure decode) the driver may run up to that many equal steps, ending early when a sequence
    ends or a message waits.
    """

    step: int
    shape: StepShape
    start: tuple[SeqStart, ...] = ()
    grow: tuple[Grow, ...] = ()
    stop: tuple[int, ...] = ()  # preempted or aborted since the last plan; its blocks are no longer its own
    chunks: tuple[Chunk, ...] = ()
    at_most: int = 1


class SeqEnd(Struct):
    """A sequence that the runner saw end: "stop" (an end token) or "length" (``max_tokens`` reached), or "failed"."""

    sid: int
    reason: EndReason


class Filled(Struct):
    """A KV block that now holds generated tokens only known to the runner: index in the table, and its chained hash."""

    sid: int
    index: int
    digest: bytes


class StepDone(Struct):
    """``steps`` steps were run."""

    steps: int = 1
    first: tuple[int, ...] = ()  # sequences that produced their first token, in batch order
    ended: tuple[SeqEnd, ...] = ()
    filled: tuple[Filled, ...] = ()
    forward_ns: int = 0  # in the model, launch and device; over all steps; 0 where nothing was timed
    sample_ns: int = 0  # from logits to tokens


class StepFailed(Struct):
    """The step raised: nothing that it was to write may be trusted."""

    why: str


class Plan(Struct):
    """The hardware is free: what runs next?"""

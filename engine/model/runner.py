"""The hardware's side of a step: keeps the running set and the tokens, runs flat batches, samples, reports what ended.

A row is one sequence's new tokens, prefill chunk or decode alike; all rows of a step go through the model as one flat
batch. Which sequences run, on which blocks, was decided by the replica machine; text and clients are the worker's.
Method: flat token batches as in vLLM v1. Not thread-safe: one worker owns it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine.events import Chunk, Filled, RunStep, SeqEnd, StepDone, StepFailed
from engine.model import attention
from engine.model.attention import Span
from engine.model.blockhash import Hasher
from engine.model.graphs import ROWS, DecodeGraphs
from engine.model.loader import LoadedModel
from engine.model.sampler import SamplingParams, logprobs_of, sample
from engine.model.stepping import Emit, StepResult, TokenLogprobs
from engine.units import ceil_div

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Sequence:
    """Known tokens are the prompt and what was generated; ``computed`` of them have KV in ``table``."""

    sid: int
    tokens: list[int]
    prompt_tokens: int
    max_tokens: int
    chain: list[bytes]  # digest of each full block, prompt first; grows as generated tokens fill blocks
    params: SamplingParams
    computed: int = 0
    table: list[int] = field(default_factory=list)
    decoding: bool = False  # its chunks reached the last known token: from then on it runs by itself

    @property
    def outputs(self) -> int:
        return len(self.tokens) - self.prompt_tokens


@dataclass(slots=True)
class _Report:
    """What a run has to tell, gathered over its steps."""

    tokens: dict[int, list[int]] = field(default_factory=dict)
    first: list[int] = field(default_factory=list)
    ended: list[SeqEnd] = field(default_factory=list)
    filled: list[Filled] = field(default_factory=list)
    logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)
    forward_ns: int = 0
    sample_ns: int = 0

    def done(self, steps: int) -> StepDone:
        """For the machine."""
        ends = (tuple(self.first), tuple(self.ended), tuple(self.filled))
        return StepDone(steps, *ends, forward_ns=self.forward_ns, sample_ns=self.sample_ns)


class TorchRunner:
    """A ``stepping.Runner`` on a real model."""

    def __init__(self, model: LoadedModel, num_blocks: int, block_tokens: int, hasher: Hasher) -> None:
        self.model = model
        self.pool = model.pool(num_blocks + model.cuda_graphs, block_tokens)  # the last is trash: nobody owns it
        self._graphs: DecodeGraphs | None = None
        if model.cuda_graphs:
            self._graphs = DecodeGraphs(model, self.pool, num_blocks, record=self.pool.device.type == "cuda")
        self._hasher, self._block_tokens = hasher, block_tokens
        self._known: dict[int, _Sequence] = {}
        self._running: dict[int, _Sequence] = {}

    def submit(
        self, sid: int, prompt: list[int], max_tokens: int, blocks: tuple[bytes, ...], params: SamplingParams
    ) -> None:
        """See ``stepping.Runner``."""
        self._known[sid] = _Sequence(sid, list(prompt), len(prompt), max_tokens, list(blocks), params)

    def forget(self, sid: int) -> None:
        """See ``stepping.Runner``."""
        self._known.pop(sid, None)
        self._running.pop(sid, None)

    def run(self, step: RunStep, message_waits: Callable[[], bool], emit: Emit | None = None) -> StepResult:
        """See ``stepping.Runner``."""
        report, steps = _Report(), 0
        while True:
            try:
                if steps == 0:
                    self._apply(step)
                self._step(step.chunks if steps == 0 else (), report)
            except torch.AcceleratorError:
                raise  # the device is lost to this process: it ends, and is started anew
            except Exception as error:  # the machine decides what a failed step means; the worker lives on
                if not steps:
                    return StepResult(StepFailed(f"{type(error).__name__}: {error}"), [])
                # those before it stand, their tokens are out: what raised is tried again, as the first of its own plan
                log.warning("step %d of a run raised: %s: %s", steps + 1, type(error).__name__, error)
                break
            steps += 1
            if steps >= step.at_most or report.ended or report.logprobs or message_waits():
                break
            if emit is not None:
                emit(list(report.tokens.items()))
                report.tokens.clear()
        return StepResult(report.done(steps), list(report.tokens.items()), list(report.logprobs.items()))

    def _apply(self, step: RunStep) -> None:
        """Bring the running set up to date."""
        for sid in step.stop:
            self._running.pop(sid, None)
        fresh: list[int] = []
        for start in step.start:
            fresh += start.blocks[ceil_div(start.computed, self._block_tokens) :]
            seq = self._known[start.sid]
            seq.computed, seq.table, seq.decoding = start.computed, list(start.blocks), False
            self._running[start.sid] = seq
        for grow in step.grow:
            fresh += grow.blocks
            self._running[grow.sid].table += grow.blocks
        if fresh:
            self.pool.clear(fresh)

    def _step(self, chunks: tuple[Chunk, ...], report: _Report) -> None:
        rows = sorted(((seq, 1) for seq in self._running.values() if seq.decoding), key=lambda row: row[0].sid)
        rows += [(self._running[chunk.sid], chunk.tokens) for chunk in chunks]
        if not rows:
            raise ValueError("a step in which no sequence runs")
        for seq, count in rows:
            if not 0 < count <= len(seq.tokens) - seq.computed:
                raise ValueError(f"{count} tokens for sequence {seq.sid}: {seq.computed} of {len(seq.tokens)} are done")
        yielding = [seq for seq, count in rows if seq.computed + count == len(seq.tokens)]
        began_ns = time.perf_counter_ns()
        logits = self._forward(rows)
        if logits.is_cuda:
            torch.cuda.synchronize(logits.device)  # else the sampler's first look would wait for the model
        forward_ns = time.perf_counter_ns()
        positions = [len(seq.tokens) for seq in yielding]
        new = sample(logits, [seq.params for seq in yielding], positions) if yielding else []
        self._explain(logits, yielding, new, report)
        for seq, count in rows:  # nothing below raises: a step that did has changed no sequence
            seq.computed += count
        report.forward_ns += forward_ns - began_ns
        report.sample_ns += time.perf_counter_ns() - forward_ns
        failed = [seq.sid for seq, token in zip(yielding, new, strict=True) if token is None]
        for seq, _ in rows:
            if seq.sid not in failed:  # nobody may reuse what gave nan
                self._fill(seq, report)
        for seq, token in zip(yielding, new, strict=True):
            self._accept(seq, token, report)

    def _forward(self, rows: list[tuple[_Sequence, int]]) -> Tensor:
        """Logits ``[rows that reach their last known token, vocab]``."""
        ids: list[int] = []
        positions: list[int] = []
        last: list[int] = []
        spans: list[Span] = []
        for seq, count in rows:
            first, stop = seq.computed, seq.computed + count
            ids += seq.tokens[first:stop]
            positions += range(first, stop)
            spans.append(Span(count, first, seq.table))
            if stop == len(seq.tokens):
                last.append(len(ids) - 1)
        if self._graphs is not None and len(last) == len(ids) <= ROWS[-1]:  # one token a row, and each yields
            return self._graphs.run(ids, spans)
        device = self.model.device
        with torch.inference_mode():
            out = self.model.model(
                input_ids=torch.tensor([ids], device=device),
                position_ids=torch.tensor([positions], device=device),
                use_cache=False,
                logits_to_keep=torch.tensor(last or [0], device=device),  # an empty list would keep nothing to index
                paged=attention.plan(self.pool, spans),
            )
        logits: Tensor = out.logits[0]
        return logits

    def _explain(self, logits: Tensor, yielding: list[_Sequence], new: list[int | None], report: _Report) -> None:
        """Log-probabilities of those who asked, and whose token will be an output."""
        rows = [
            row for row, (seq, token) in enumerate(zip(yielding, new, strict=True))
            if seq.params.logprobs is not None and token is not None and not self._is_end(seq, token)
        ]
        if rows:
            counts = [yielding[row].params.logprobs or 0 for row in rows]
            for row, said in zip(rows, logprobs_of(logits[rows], [new[row] or 0 for row in rows], counts), strict=True):
                report.logprobs.setdefault(yielding[row].sid, []).append(said)

    def _is_end(self, seq: _Sequence, token: int) -> bool:
        return token in self.model.eos_ids and not seq.params.ignore_eos

    def _fill(self, seq: _Sequence, report: _Report) -> None:
        """Blocks that generated tokens have just completed. A prompt of less than a block has no chain to extend."""
        size = self._block_tokens
        while seq.chain and seq.computed >= (len(seq.chain) + 1) * size:
            index = len(seq.chain)
            digest = self._hasher.extend(seq.chain[-1], seq.tokens[index * size : (index + 1) * size])
            seq.chain.append(digest)
            report.filled.append(Filled(seq.sid, index, digest))

    def _accept(self, seq: _Sequence, token: int | None, report: _Report) -> None:
        if token is None:
            self._end(seq, "failed", report)
        elif self._is_end(seq, token):
            self._end(seq, "stop", report)
        else:
            seq.tokens.append(token)
            seq.decoding = True
            report.tokens.setdefault(seq.sid, []).append(token)
            if seq.outputs == 1:
                report.first.append(seq.sid)
            if seq.outputs >= seq.max_tokens:
                self._end(seq, "length", report)

    def _end(self, seq: _Sequence, reason: str, report: _Report) -> None:
        del self._running[seq.sid]
        report.ended.append(SeqEnd(seq.sid, reason))  # type: ignore[arg-type]

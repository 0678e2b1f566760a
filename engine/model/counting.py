"""A runner without tokens: it only counts. The twin runs on it; the fake model puts words to it.

Answers have a length that is known beforehand. Work per step follows what changes: ends and filled blocks stand in
calendars by step index, and a row that just decodes is not touched. Same semantics as ``stepping.Runner``.
"""

from __future__ import annotations

from dataclasses import dataclass
from heapq import heappop, heappush

from engine.events import EndReason, Filled, RunStep, SeqEnd, StepDone
from engine.model.blockhash import Hasher

NEVER = 1 << 40  # a prompt without a full block gives the first generated one nothing to chain from


@dataclass(slots=True, eq=False)
class Row:
    """One request in the runner. While it decodes, its numbers are those of ``decode_from``."""

    sid: int
    known: int
    end_at: int  # sampled tokens until it ends; an end token counts here, though it is no output
    reason: EndReason
    next_block: int  # index of the first block that is not reported as filled
    computed: int = 0
    sampled: int = 0
    decode_from: int | None = None
    epoch: int = 0


class CountingRunner:
    """Counts tokens, ends and blocks."""

    def __init__(self, hasher: Hasher) -> None:
        self._block_tokens, self._hasher = hasher.block_tokens, hasher
        self.rows: dict[int, Row] = {}
        self.decoding: dict[int, Row] = {}
        self._ends: list[tuple[int, int, int]] = []  # heap of (step, sid, epoch)
        self._fills: list[tuple[int, int, int]] = []

    def add(self, sid: int, prompt_tokens: int, output_tokens: int, max_tokens: int) -> None:
        """A request whose answer will have ``output_tokens`` tokens; less than ``max_tokens`` means an end token."""
        stops = output_tokens < max_tokens
        self.rows[sid] = Row(
            sid, known=prompt_tokens, end_at=output_tokens + 1 if stops else max_tokens,
            reason="stop" if stops else "length", next_block=prompt_tokens // self._block_tokens or NEVER,
        )

    def forget(self, sid: int) -> None:
        """Unknown ids are no-ops."""
        row = self.rows.pop(sid, None)
        if row is not None:
            self._leave(row, 0)

    def steps_until_end(self, step: RunStep) -> int:
        """How many of ``step.at_most`` steps run before a sequence ends. Only meaningful for pure decode."""
        while self._ends and not self._valid(self._ends[0]):
            heappop(self._ends)
        return min(step.at_most, self._ends[0][0] - step.step + 1) if self._ends else step.at_most

    def advance(self, step: RunStep, steps: int) -> StepDone:
        """Run ``steps`` steps of the plan; the caller has asked ``steps_until_end`` when there are several."""
        for sid in step.stop:
            if row := self.rows.get(sid):
                self._leave(row, step.step)
        for start in step.start:
            self.rows[start.sid].computed = start.computed
        last = step.step + steps - 1
        first: list[int] = []
        ended: list[SeqEnd] = []
        filled: list[Filled] = []
        self._decode(last, ended, filled)
        for chunk in step.chunks:
            self._chunk(self.rows[chunk.sid], chunk.tokens, last, first, ended, filled)
        return StepDone(steps, tuple(first), tuple(ended), tuple(filled))

    def _chunk(
        self, row: Row, tokens: int, step: int, first: list[int], ended: list[SeqEnd], filled: list[Filled]
    ) -> None:
        row.computed += tokens
        while (row.next_block + 1) * self._block_tokens <= row.computed:
            self._fill(row, filled)
        if row.computed < row.known:
            return
        row.sampled += 1
        row.known += 1
        if row.sampled == 1 and not (row.end_at == 1 and row.reason == "stop"):
            first.append(row.sid)
        if row.sampled == row.end_at:
            ended.append(SeqEnd(row.sid, row.reason))
            return
        row.decode_from = step + 1
        self.decoding[row.sid] = row
        heappush(self._ends, (step + row.end_at - row.sampled, row.sid, row.epoch))
        self._await_fill(row)

    def _decode(self, last: int, ended: list[SeqEnd], filled: list[Filled]) -> None:
        while self._fills and self._fills[0][0] <= last:
            entry = heappop(self._fills)
            if self._valid(entry):
                row = self.rows[entry[1]]
                self._fill(row, filled)
                self._await_fill(row)
        while self._ends and self._ends[0][0] <= last:
            entry = heappop(self._ends)
            if self._valid(entry):
                row = self.rows[entry[1]]
                ended.append(SeqEnd(row.sid, row.reason))
                self._leave(row, last + 1)

    def _await_fill(self, row: Row) -> None:
        assert row.decode_from is not None
        missing = (row.next_block + 1) * self._block_tokens - row.computed
        heappush(self._fills, (row.decode_from + missing - 1, row.sid, row.epoch))

    def _fill(self, row: Row, filled: list[Filled]) -> None:
        digest = self._hasher.digest("generated", str(row.sid), str(row.next_block))  # there are no tokens to digest
        filled.append(Filled(row.sid, row.next_block, digest))
        row.next_block += 1

    def _valid(self, entry: tuple[int, int, int]) -> bool:
        row = self.rows.get(entry[1])
        return row is not None and row.epoch == entry[2]

    def _leave(self, row: Row, step: int) -> None:
        """Out of the running set at the beginning of ``step``."""
        if row.decode_from is not None:
            row.sampled += step - row.decode_from
            row.known += step - row.decode_from
            row.decode_from = None
        self.decoding.pop(row.sid, None)
        row.epoch += 1

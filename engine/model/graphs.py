"""Decode steps at fixed shapes, so that CUDA can replay a recorded graph in place of launching each kernel anew.

Rows are padded to the next of ``ROWS``; whatever a step brings goes into buffers that stay where they are. A padding
row is a sequence of one token in the trash block, which no sequence ever owns. Only recording and replaying need CUDA:
without them the same padded step runs on any device. Method: CUDA graphs per batch size, as in vLLM and nano-vllm.
"""

from __future__ import annotations

from bisect import bisect_left

import torch
from torch import Tensor

from engine.errors import UserError
from engine.model.attention import Paged, Span
from engine.model.kvcache import KVPool
from engine.model.loader import LoadedModel
from engine.model.varlen import Varlen
from engine.units import ceil_div

ROWS = (1, 2, 4, 8, *range(16, 257, 8))


class DecodeGraphs:
    """Runs steps in which every row is one token that yields the next.

    ``trash``: a block of ``pool`` for padding rows. ``record``: as CUDA graphs, one for each number of rows, made when
    it is first needed; a model that cannot be recorded at all is a UserError at once.
    """

    def __init__(self, loaded: LoadedModel, pool: KVPool, trash: int, record: bool = True) -> None:
        self._model, self._pool, self._trash, self._record = loaded.model, pool, trash, record
        self._recorded: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        most, width = ROWS[-1], min(ceil_div(loaded.max_context, pool.block_tokens), pool.num_blocks)
        self._max_keys = width * pool.block_tokens

        def buffer(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=pool.device)

        self._ids, self._positions, self._slots = (buffer(most, dtype=torch.long) for _ in range(3))
        self._keys, self._table = buffer(most), buffer(most, width)
        self._borders = torch.arange(most + 1, dtype=torch.int32, device=pool.device)  # one query a row
        self._key_borders = self._borders * self._max_keys
        if record:
            self._memory = torch.cuda.graph_pool_handle()  # graphs run one at a time and may share it
            try:
                self.run([0], [Span(1, 0, [trash])])
            except RuntimeError as error:
                raise UserError(
                    f"{loaded.name} cannot be recorded as a CUDA graph", "model.cuda_graphs", str(error).split("\n")[0],
                    "--set model.cuda_graphs=false",
                ) from error

    def run(self, ids: list[int], spans: list[Span]) -> Tensor:
        """Logits ``[rows, vocab]`` of at most ``ROWS[-1]`` spans of one token each; valid until the next call."""
        rows = ROWS[bisect_left(ROWS, len(ids))]
        with torch.inference_mode():
            self._fill(rows, ids, spans)
            if not self._record:
                return self._forward(rows)[: len(ids)]
            if rows not in self._recorded:
                self._recorded[rows] = self._capture(rows)
            graph, logits = self._recorded[rows]
            graph.replay()
            return logits[: len(ids)]

    def _fill(self, rows: int, ids: list[int], spans: list[Span]) -> None:
        """The step into the buffers; what lies beyond a row's keys in its table stays, and is not read."""
        pads, size = rows - len(ids), self._pool.block_tokens
        slots = [slot for span in spans for slot in span.slots(size)]
        columns = ceil_div(max(span.keys for span in spans), size)
        tables = [(span.table + [self._trash] * columns)[:columns] for span in spans]
        for buffer, numbers in (
            (self._ids[:rows], ids + [0] * pads),
            (self._positions[:rows], [span.past for span in spans] + [0] * pads),
            (self._slots[:rows], slots + [self._trash * size] * pads),
            (self._keys[:rows], [span.keys for span in spans] + [1] * pads),
            (self._table[:rows, :columns], tables + [[self._trash] * columns] * pads),
        ):
            buffer.copy_(torch.tensor(numbers, dtype=buffer.dtype))

    def _forward(self, rows: int) -> Tensor:
        borders, key_borders = self._borders[: rows + 1], self._key_borders[: rows + 1]
        way = Varlen(borders, self._keys[:rows], key_borders, self._table[:rows], 1, self._max_keys)
        logits: Tensor = self._model(
            input_ids=self._ids[None, :rows], position_ids=self._positions[None, :rows], use_cache=False,
            logits_to_keep=0, paged=Paged(self._pool, self._slots[:rows], way),  # 0: all rows
        ).logits[0]
        return logits

    def _capture(self, rows: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """A graph and the logits that each replay of it leaves."""
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # once for libraries to set themselves up, which cannot be recorded
            self._forward(rows)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory):
            logits = self._forward(rows)
        return graph, logits

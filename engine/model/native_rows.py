"""Decode rows and short prompt chunks through the native kernel: no gather, each row reads its own pages in place."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.model.kvcache import KVPool
from engine.model.spans import Flavour, Span

LONG_SPAN = 32  # from this many rows on, matrix products over gathered keys win


def is_long(span: Span) -> bool:
    """Better attended to by ``gathered``?"""
    return span.length >= LONG_SPAN


@dataclass(slots=True)
class NativeRows:
    """One entry a query token."""

    rows: Tensor  # [n] in the flat batch
    last: Tensor  # [n] keys that it sees
    tables: Tensor  # [n] where its table begins in ``table``
    table: Tensor  # block ids of all spans, one after the other
    work: int

    def attend(self, pool: KVPool, layer: int, query: Tensor, out: Tensor, flavour: Flavour) -> None:
        """Query ``[T, heads, dim]`` to ``out`` likewise, at its rows."""
        assert pool.native is not None, "native rows: planned only where there are kernels"
        pool.native.attend(
            query, pool.keys[layer], pool.values[layer], self.rows, self.last, self.tables, self.table, out,
            flavour.scale, flavour.window, flavour.softcap, self.work,
        )


def plan(pool: KVPool, spans: list[Span]) -> NativeRows | None:
    """All rows of the spans that are not long."""
    rows: list[int] = []
    last: list[int] = []
    tables: list[int] = []
    table: list[int] = []
    row = 0
    for span in spans:
        if not is_long(span):
            rows += range(row, row + span.length)
            last += range(span.past + 1, span.keys + 1)
            tables += [len(table)] * span.length
            table += span.table[: -(-span.keys // pool.block_tokens)]
        row += span.length
    if not rows:
        return None
    return NativeRows(
        torch.tensor(rows), torch.tensor(last, dtype=torch.int32), torch.tensor(tables),
        torch.tensor(table, dtype=torch.int32), sum(last),
    )

"""All rows through the native kernel: no gather, each query token reads the pages of its own sequence in place.

Prompt chunks too: against SDPA over gathered blocks the kernel took 0 to 15 % less time for whole forwards of 128 to
512 new tokens after 0 to 3,500 old ones (AMD EPYC with AVX-512, one thread).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.model.kvcache import KVPool
from engine.model.spans import Flavour, Span
from engine.units import ceil_div


@dataclass(slots=True)
class NativeRows:
    """One entry a query token."""

    last: Tensor  # [T] keys that it sees
    tables: Tensor  # [T] where its table begins in ``table``
    table: Tensor  # block ids of all spans, one after the other
    work: int  # sum of ``last``

    def attend(self, pool: KVPool, layer: int, query: Tensor, out: Tensor, flavour: Flavour) -> None:
        """Query ``[T, heads, dim]`` to ``out`` likewise."""
        assert pool.native is not None, "native rows: planned only where there are kernels"
        pool.native.attend(
            query, pool.keys[layer], pool.values[layer], self.last, self.tables, self.table, out,
            flavour.scale, flavour.window, flavour.softcap, self.work,
        )


def plan(pool: KVPool, spans: list[Span]) -> NativeRows:
    """All rows of the spans."""
    last: list[int] = []
    tables: list[int] = []
    table: list[int] = []
    for span in spans:
        last += range(span.past + 1, span.keys + 1)
        tables += [len(table)] * span.length
        table += span.table[: ceil_div(span.keys, pool.block_tokens)]
    return NativeRows(
        torch.tensor(last, dtype=torch.int32), torch.tensor(tables), torch.tensor(table, dtype=torch.int32), sum(last)
    )

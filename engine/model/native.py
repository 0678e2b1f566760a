"""The four functions of ``kernels.cpp`` on tensors.

Where there is no C++ compiler, or the library gives another result than torch, ``kernels`` is None and the callers keep
to torch: slower, same tokens but for the last bits. fp32 tensors on the CPU only; a call lets go of Python's lock.
"""

from __future__ import annotations

import ctypes
import logging
import subprocess
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.model import compiling

log = logging.getLogger(__name__)

HEAD_DIMS = (16, 32, 64, 80, 96, 128, 256)
SMALL = 1024  # key vectors of a head: below this, waking a second thread costs more than it saves (measured: 30 us)

_POINTER, _LONG, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float


class Kernels:
    """The library's functions. Shapes are those of ``kernels.cpp``; all tensors contiguous but ``attend``'s query."""

    def __init__(self, library: ctypes.CDLL) -> None:
        p, n, i, f = _POINTER, _LONG, _INT, _FLOAT
        library.attend.argtypes = [p, n, n, p, p, p, p, p, p, n, i, i, i, i, i, f, f, i]
        library.add_norm.argtypes = [p, p, p, p, n, n, f, i]
        library.write_kv.argtypes = [p, p, p, p, p, p, p, p, f, n, i, i, i, i]
        library.gate.argtypes = [p, p, n, n, i]
        self._library = library

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, last: Tensor, tables: Tensor, table: Tensor,
        out: Tensor, scale: float, window: int = 0, softcap: float = 0.0, work: int = SMALL,
    ) -> None:
        """``query`` [rows, heads, dim] to ``out`` likewise.

        Row i sees tokens [last[i] - window, last[i]) of the table that begins at tables[i]. ``work``: sum of ``last``
        over all rows. ``dim`` is one of HEAD_DIMS.
        """
        kv_heads, dim = keys.shape[2:]
        refused = self._library.attend(
            query.data_ptr(), query.stride(0), query.stride(1), out.data_ptr(), keys.data_ptr(), values.data_ptr(),
            last.data_ptr(), tables.data_ptr(), table.data_ptr(), last.shape[0], keys.shape[1],
            kv_heads, query.shape[1] // kv_heads, dim, window, scale, softcap,
            torch.get_num_threads() if work * kv_heads > SMALL else 1,
        )
        if refused:
            raise ValueError(f"no native attention for heads of {dim}")

    def add_norm(self, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        """``x`` [rows, n] += ``delta`` in place; its RMS norm (Zhang and Sennrich 2019) times ``weight``."""
        out = torch.empty_like(x)
        rows, n = x.shape
        self._library.add_norm(
            x.data_ptr(), 0 if delta is None else delta.data_ptr(), weight.data_ptr(), out.data_ptr(), rows, n, eps,
            _threads(rows),
        )
        return out

    def write_kv(
        self, qkv: Tensor, keys: Tensor, values: Tensor, slots: Tensor, rotation: tuple[Tensor, Tensor] | None,
        norms: tuple[Tensor, Tensor] | None, eps: float,
    ) -> None:
        """Rows of ``qkv`` [rows, (heads + 2 kv_heads) * dim]: normed and rotated in place, K and V to ``slots``."""
        kv_heads, dim = keys.shape[2:]
        rows = qkv.shape[0]
        cosine, sine = (0, 0) if rotation is None else (part.data_ptr() for part in rotation)
        q_norm, k_norm = (0, 0) if norms is None else (part.data_ptr() for part in norms)
        self._library.write_kv(
            qkv.data_ptr(), keys.data_ptr(), values.data_ptr(), slots.data_ptr(), cosine, sine, q_norm, k_norm, eps,
            rows, qkv.shape[1] // dim - 2 * kv_heads, kv_heads, dim, _threads(rows),
        )

    def gate(self, both: Tensor) -> Tensor:
        """``silu(both[:, :n]) * both[:, n:]`` (SwiGLU, Shazeer 2020); n is a multiple of 16."""
        rows, n = both.shape[0], both.shape[1] // 2
        out = both.new_empty(rows, n)
        self._library.gate(both.data_ptr(), out.data_ptr(), rows, n, _threads(rows))
        return out


def _threads(rows: int) -> int:
    return torch.get_num_threads() if rows >= 64 else 1


@cache
def kernels() -> Kernels | None:
    """Loaded at the first call of a process, compiled unless the cache has it; None when not to be had or trusted."""
    try:
        made = Kernels(ctypes.CDLL(str(compiling.library())))
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("no native kernels, decode is up to twice as slow: %s", error)
        return None
    if not _agrees(made):
        log.warning("native kernels give another result than torch on this processor: not used")
        return None
    return made


def _agrees(made: Kernels) -> bool:
    """A small case of each function against torch."""
    draw = torch.Generator().manual_seed(1)
    pages = torch.randn(2, 4, 16, 2, 16, generator=draw)
    query = torch.randn(1, 4, 16, generator=draw)
    out = torch.empty_like(query)
    table = torch.tensor([2, 0, 3], dtype=torch.int32)
    seen = 37
    number = torch.zeros(1, dtype=torch.long)
    last = torch.tensor([seen], dtype=torch.int32)
    made.attend(query, pages[0], pages[1], last, number, table, out, 0.25)
    k, v = (x[table.long()].reshape(-1, 2, 16)[:seen].transpose(0, 1) for x in pages)
    wanted = F.scaled_dot_product_attention(query.view(2, 2, 16), k, v, scale=0.25).reshape(1, 4, 16)
    both = torch.randn(3, 64, generator=draw)
    gated = F.silu(both[:, :32]) * both[:, 32:]
    x, weight = torch.randn(3, 48, generator=draw), torch.randn(48, generator=draw)
    normed = F.rms_norm(x + 1.0, (48,), weight, 1e-5)
    added = made.add_norm(x.clone(), torch.ones(3, 48), weight, 1e-5)
    pairs = ((out, wanted), (made.gate(both), gated), (added, normed), *_written(made, draw))
    return all(torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5) for ours, theirs in pairs)


def _written(made: Kernels, draw: torch.Generator) -> tuple[tuple[Tensor, Tensor], ...]:
    """Two rows of one query, key and value head: normed, rotated, written to slots 3 and 0."""
    qkv = torch.randn(2, 48, generator=draw)
    angles = torch.randn(2, 8, generator=draw).repeat(1, 2)
    weights = torch.randn(2, 16, generator=draw)
    rotation = (angles.cos(), angles.sin())
    wanted = []
    for part, weight in zip(qkv.clone().split(16, 1)[:2], weights, strict=True):
        x = F.rms_norm(part, (16,), weight, 1e-5)
        wanted.append(x * rotation[0] + torch.cat((-x[:, 8:], x[:, :8]), 1) * rotation[1])
    values = qkv[:, 32:].clone()
    pages = torch.zeros(2, 1, 4, 1, 16)
    slots = torch.tensor([3, 0])
    made.write_kv(qkv, pages[0], pages[1], slots, rotation, (weights[0], weights[1]), 1e-5)
    k, v = (x.view(4, 16)[slots] for x in pages)
    return (qkv[:, :16], wanted[0]), (k, wanted[1]), (v, values)

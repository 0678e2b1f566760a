"""Rows of an index in one block: vectors in fp32 or 8 bits, the key and the age of each. Knows no structure above it.

Eight bits: a row is scaled so that its largest component is 127, rounded, and kept with one over the length of what
came of it. So a decoded row has length one again, and its cosine with a query in fp32 is off in the fourth digit.
"""

from __future__ import annotations

import sys
from typing import Literal

import numpy as np

Encoding = Literal["float32", "int8"]

GROWTH = 8  # a full block grows by 1 / GROWTH: a doubling would leave a third of the memory unused on the average
CHUNK = 256  # rows of 8 bits that are widened at a time: they stay in a core's own cache


def millionths(vectors: np.ndarray, query: np.ndarray) -> np.ndarray:
    """Cosines of unit vectors ``[n, dims]`` with one of them, rounded to integer millionths: int64 ``[n]``."""
    products = (vectors.astype(np.float64) * query.astype(np.float64)).sum(axis=1)  # row by row: no BLAS, no surprise
    cosines: np.ndarray = np.rint(products * 1e6).astype(np.int64).clip(-1_000_000, 1_000_000)
    return cosines


class Rows:
    """A block of rows without gaps: a removed one is filled with the last, so removal costs nothing."""

    def __init__(self, dims: int, encoding: Encoding) -> None:
        self.vectors = np.empty((0, dims), encoding)  # [capacity, dims]
        self.factors = np.empty(0, np.float32)  # 8 bits: what a row is multiplied by; else empty
        self.ages = np.empty(0, np.int64)  # insertion number
        self.keys: list[bytes] = []

    @classmethod
    def of(cls, keys: list[bytes], ages: np.ndarray, stored: np.ndarray, factors: np.ndarray) -> Rows:
        """Rows as they were stored; all is copied."""
        rows = cls(stored.shape[1], "int8" if stored.dtype == np.int8 else "float32")
        rows.keys, rows.ages, rows.vectors, rows.factors = list(keys), ages.copy(), stored.copy(), factors.copy()
        return rows

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def coded(self) -> bool:
        """Eight bits?"""
        return self.vectors.dtype == np.int8

    @property
    def nbytes(self) -> int:
        """Memory held, without the keys themselves."""
        return self.vectors.nbytes + self.factors.nbytes + self.ages.nbytes + sys.getsizeof(self.keys)

    def append(self, key: bytes, age: int, vector: np.ndarray) -> None:
        """A unit vector, which is encoded."""
        if not self.coded:
            self.put(key, age, vector, 0.0)
            return
        largest = np.abs(vector).max()
        codes = np.rint(vector * (127.0 / largest if largest else 0.0))
        length = float(np.sqrt(np.vecdot(codes, codes)))
        self.put(key, age, codes.astype(np.int8), 1.0 / length if length else 0.0)

    def put(self, key: bytes, age: int, stored: np.ndarray, factor: float) -> None:
        """A row as it is stored; ``factor`` counts with 8 bits only."""
        row = len(self.keys)
        if row == len(self.ages):
            self._resize(row + 1 + row // GROWTH)
        self.vectors[row], self.ages[row] = stored, age
        if self.coded:
            self.factors[row] = factor
        self.keys.append(key)

    def take(self, row: int) -> bytes | None:
        """Remove one; the key of the row that took its place, if one did."""
        last, moved = len(self.keys) - 1, self.keys.pop()
        if row != last:
            self.vectors[row], self.ages[row], self.keys[row] = self.vectors[last], self.ages[last], moved
            if self.coded:
                self.factors[row] = self.factors[last]
        if len(self.ages) > 4 + last + 2 * (last // GROWTH):
            self._resize(last + last // GROWTH)
        return moved if row != last else None

    def move(self, row: int, to: Rows) -> None:
        """Append one, as it is stored, to other rows; it stays here until ``take``."""
        to.put(self.keys[row], int(self.ages[row]), self.vectors[row], float(self.factors[row]) if self.coded else 0.0)

    def decoded(self, rows: np.ndarray | slice) -> np.ndarray:
        """fp32 ``[n, dims]``."""
        vectors: np.ndarray = self.vectors[rows]
        return vectors * self.factors[rows][:, None] if self.coded else vectors

    def cosines(self, rows: np.ndarray, query: np.ndarray) -> np.ndarray:
        """Of the stored vectors with a query, in fp64: integer millionths, int64 ``[n]``."""
        if not self.coded:
            return millionths(self.vectors[rows], query)
        return millionths(self.vectors[rows].astype(np.float64) * self.factors[rows][:, None], query)

    def products(self, query: np.ndarray) -> np.ndarray:
        """fp32 products of all rows with a query ``[dims]``, on this thread alone."""
        n = len(self.keys)
        if not self.coded:
            found: np.ndarray = np.vecdot(self.vectors[:n], query)
            return found
        products = np.empty(n, np.float32)
        for begin in range(0, n, CHUNK):
            chunk = slice(begin, min(begin + CHUNK, n))
            np.vecdot(self.vectors[chunk].astype(np.float32), query, out=products[chunk])
        products *= self.factors[:n]
        return products

    def _resize(self, capacity: int) -> None:
        """In place: a large block keeps its pages. Nobody keeps a view of a block beyond a call."""
        self.vectors.resize((capacity, self.vectors.shape[1]), refcheck=False)
        self.ages.resize(capacity, refcheck=False)
        if self.coded:
            self.factors.resize(capacity, refcheck=False)

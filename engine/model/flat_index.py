"""All rows of a hard key are looked at: exact, deterministic, and the same on every backend.

A backend only proposes rows, with some to spare. Cosines are then taken in fp64, rounded to millionths and ranked, ties
by insertion: so no backend's order of sums can show.
"""

from __future__ import annotations

import sys

import numpy as np

from engine.model.index_rows import Rows
from engine.model.index_scans import DeviceScan, Scan

SPARE = 8  # rows proposed beyond k
SLACK = 1e-5  # far above the error of an fp32 product of unit vectors, and above half a millionth


class FlatIndex:
    """The rows of one hard key."""

    def __init__(self, rows: Rows, scan: Scan) -> None:
        self.rows = rows
        self._scan = scan
        self._row_of = {key: row for row, key in enumerate(rows.keys)}

    def __len__(self) -> int:
        return len(self.rows)

    def __contains__(self, text_key: bytes) -> bool:
        return text_key in self._row_of

    def text_keys(self) -> list[bytes]:
        """Of all rows."""
        return list(self._row_of)

    @property
    def nbytes(self) -> int:
        """Memory held, without the keys themselves."""
        numbers = 32 * len(self.rows)  # the dict's values
        return self.rows.nbytes + sys.getsizeof(self._row_of) + numbers

    def add(self, text_key: bytes, age: int, vector: np.ndarray) -> None:
        """One that is not there."""
        row = len(self.rows)
        self.rows.append(text_key, age, vector)
        self._row_of[text_key] = row
        self._changed(row)

    def remove(self, text_key: bytes) -> bool:
        """Was it there?"""
        row = self._row_of.pop(text_key, None)
        if row is None:
            return False
        if (moved := self.rows.take(row)) is not None:
            self._row_of[moved] = row
        self._changed(row)
        self._changed(len(self.rows))
        return True

    def search(self, vector: np.ndarray, k: int, exactly: bool = False) -> list[tuple[bytes, int]]:
        """See ``VectorIndex.search``; it is exact anyway."""
        rows = self._candidates(np.ascontiguousarray(vector, np.float32), k)
        cosines = self.rows.cosines(rows, vector)
        best = np.lexsort((self.rows.ages[rows], -cosines))[: max(0, k)]
        return [(self.rows.keys[rows[i]], int(cosines[i])) for i in best]

    def _candidates(self, vector: np.ndarray, k: int) -> np.ndarray:
        """Rows among which the ``k`` best are for certain: the last proposed is clearly worse than the k-th."""
        n, count = len(self.rows), max(0, k) + SPARE
        while count < n:
            rows, products = self._scan(self.rows, vector, count)
            kth = np.partition(products, len(products) - k)[-k] if k > 0 else np.inf
            if products.min() < kth - SLACK:
                return rows
            count *= 4
        return np.arange(n)

    def _changed(self, row: int) -> None:
        if isinstance(self._scan, DeviceScan):
            self._scan.changed[row] = None

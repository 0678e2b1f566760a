"""Nearest neighbours by cosine, an index for each hard key: exact up to 10,000 rows, approximate beyond.

``flat_index.py`` is the exact one, ``inverted_index.py`` the other; on a GPU all is exact. In both, cosines are taken
in fp64 from the stored rows, rounded to millionths and ranked, ties by insertion. Owned by one thread; the same calls
give the same answers. Knows nothing of texts, encoders or thresholds.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from engine.model import index_file
from engine.model.flat_index import FlatIndex
from engine.model.index_rows import Encoding, Rows, millionths
from engine.model.index_scans import Backend, choose
from engine.model.inverted_index import InvertedIndex

__all__ = ["Backend", "Encoding", "IndexStats", "VectorIndex", "millionths"]

EXACT_ROWS = 10_000  # of a hard key: about a millisecond


class IndexStats(NamedTuple):
    """What an index is now. Splits and merges of lists are since the start, of the hard keys that are there."""

    rows: int
    hard_keys: int
    approximate_rows: int  # of hard keys that are searched approximately now
    lists: int
    splits: int
    merges: int
    backend: str  # of the exact part
    vectors: Encoding
    bytes: int  # all that it holds: vectors, keys, ages, lists, dicts

    @property
    def kind(self) -> str:
        """As a word for a report."""
        return "inverted lists" if self.approximate_rows else "flat"

    @property
    def entry_bytes(self) -> float:
        """Memory for one vector; 0 when it is empty."""
        return self.bytes / self.rows if self.rows else 0.0


class VectorIndex:
    """Vectors by (hard key, text key). ``backend`` auto: a GPU if faiss has one, else numpy.

    ``vectors`` int8: a quarter of the memory; cosines are those of the decoded rows. numpy reads them, on no GPU.
    """

    def __init__(
        self, dims: int, backend: Backend = "auto", vectors: Encoding = "float32", exact_rows: int = EXACT_ROWS
    ) -> None:
        """``exact_rows``: most rows of a hard key that are searched exactly."""
        self.dims, self.vectors, self.exact_rows = dims, vectors, exact_rows
        self.backend, self._make_scan = choose("numpy" if vectors == "int8" else backend)
        self._of: dict[bytes, FlatIndex | InvertedIndex] = {}
        self._added = self._key_bytes = 0

    def __len__(self) -> int:
        return sum(map(len, self._of.values()))

    def add(self, hard_key: bytes, text_key: bytes, vector: np.ndarray) -> None:
        """A unit vector; one that is there already under this text key is replaced and counts as new."""
        if vector.shape != (self.dims,):
            raise ValueError(f"a vector of shape {vector.shape}, not ({self.dims},)")
        self.remove(hard_key, text_key)
        found = self._of.get(hard_key)
        if found is None:
            found = self._of[hard_key] = FlatIndex(Rows(self.dims, self.vectors), self._make_scan())
        elif isinstance(found, FlatIndex) and len(found) >= self.exact_rows and self.backend != "gpu":
            found = self._of[hard_key] = InvertedIndex(found.rows, self.dims, self.vectors, self.exact_rows)
        found.add(text_key, self._added, vector)
        self._added += 1
        self._key_bytes += sys.getsizeof(text_key)

    def remove(self, hard_key: bytes, text_key: bytes) -> None:
        """Unknown keys are no-ops; a hard key without vectors takes no memory."""
        found = self._of.get(hard_key)
        if found is not None and found.remove(text_key):
            self._key_bytes -= sys.getsizeof(text_key)
            if not len(found):
                del self._of[hard_key]

    def search(self, hard_key: bytes, vector: np.ndarray, k: int = 8, exactly: bool = False) -> list[tuple[bytes, int]]:
        """The ``k`` nearest under this hard key: (text key, cosine in millionths), nearest first, then oldest first.

        ``exactly``: look at all rows, however many there are.
        """
        found = self._of.get(hard_key)
        return found.search(vector, k, exactly) if found is not None else []

    def recall(self, hard_key: bytes, queries: Sequence[np.ndarray], k: int = 1) -> float:
        """Of the ``k`` nearest of each query, the share that a search finds; equal cosines are equally good."""
        found = there = 0
        for query in queries:
            truth = [cosine for _, cosine in self.search(hard_key, query, k, exactly=True)]
            there += len(truth)
            found += sum(cosine >= truth[-1] for _, cosine in self.search(hard_key, query, k))
        return found / there if there else 1.0

    def stats(self) -> IndexStats:
        """A snapshot; it walks the lists, not the rows."""
        inverted = [found for found in self._of.values() if isinstance(found, InvertedIndex)]
        held = sum(found.nbytes for found in self._of.values()) + sys.getsizeof(self._of) + self._key_bytes
        return IndexStats(
            rows=len(self), hard_keys=len(self._of),
            approximate_rows=sum(len(found) for found in inverted if len(found) > self.exact_rows),
            lists=sum(len(found.cells) for found in inverted), splits=sum(found.splits for found in inverted),
            merges=sum(found.merges for found in inverted), backend=self.backend, vectors=self.vectors, bytes=held,
        )

    def holds(self, hard_key: bytes, text_key: bytes) -> bool:
        """Is there a vector under these keys?"""
        found = self._of.get(hard_key)
        return found is not None and text_key in found

    def keys(self) -> list[tuple[bytes, bytes]]:
        """(hard key, text key) of every vector."""
        return [(hard_key, text_key) for hard_key, found in self._of.items() for text_key in found.text_keys()]

    def pack(self, encoder: str) -> index_file.Packed:
        """All vectors, copied, with the encoder's digest."""
        none = np.empty((0, self.dims), np.float32)
        keys = [
            index_file.StoredKey(hard_key, True, [found.head, *(cell.rows for cell in found.cells)], found.centroids)
            if isinstance(found, InvertedIndex)
            else index_file.StoredKey(hard_key, False, [found.rows], none)
            for hard_key, found in self._of.items()
        ]
        return index_file.pack(index_file.Stored(self._added, keys), encoder, self.dims, self.vectors)

    @classmethod
    def unpack(
        cls, raw: bytes, where: str, encoder: str, dims: int, backend: Backend = "auto", vectors: Encoding = "float32",
        exact_rows: int = EXACT_ROWS,
    ) -> VectorIndex:
        """From ``pack``'s bytes; UserError when they cannot be read or are of another encoder, width or encoding."""
        index = cls(dims, backend, vectors, exact_rows)
        stored = index_file.read(raw, where, encoder, dims, vectors)
        index._added = stored.added
        for key in stored.keys:
            index._key_bytes += sum(sys.getsizeof(text) for block in key.blocks for text in block.keys)
            if key.lists:
                index._of[key.hard_key] = InvertedIndex.of_lists(
                    key.blocks[0], key.blocks[1:], key.centroids, vectors, exact_rows
                )
            else:
                index._of[key.hard_key] = FlatIndex(key.blocks[0], index._make_scan())
        return index

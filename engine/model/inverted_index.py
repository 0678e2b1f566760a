"""Rows of one hard key in many small lists, each round its own mean: a search reads the nearest lists only.

There is no training and no rebuild. A list that grows too long is split in two by 2-means, one that gets too short is
given to its neighbours, and after a split the rows round about go where they are nearer: LIRE (Xu et al., SPFresh, SOSP
2023), in memory. All of it happens inside ``add`` and ``remove``, a bounded piece at a time: so there is no thread, no
moment at which another index takes over, and the same calls always give the same lists. The flat rows that it begins
with go over in the same way, a few with each call, and are searched where they are until then.
"""

from __future__ import annotations

import sys

import numpy as np

from engine.model.flat_index import SLACK
from engine.model.index_rows import Encoding, Rows

LONGEST = 256  # rows; a longer list is split
SHORTEST = 24  # rows; a shorter list is given to its neighbours
MOVED = 32  # rows that leave the flat block with each call
NEIGHBOURS = 8  # lists round a split one, whose rows may be nearer to one of the two
ROUNDS = 6  # of 2-means
PROBED_ROWS = 2048  # a search reads the nearest lists until it has seen so many rows


class Cell:
    """A list. ``place``: which of the index's centroids is its own."""

    def __init__(self, rows: Rows, place: int) -> None:
        self.rows, self.place = rows, place


class InvertedIndex:
    """The rows of one hard key, searched approximately; exactly as long as there are at most ``exact_rows``."""

    def __init__(self, head: Rows, dims: int, encoding: Encoding, exact_rows: int) -> None:
        """``head``: rows that are there already; they are taken over bit by bit."""
        self.head, self.cells = head, list[Cell]()
        self.splits = self.merges = 0
        self._dims, self._encoding, self._exact_rows = dims, encoding, exact_rows
        self._centroids = np.empty((0, dims), np.float32)  # [capacity, dims], of ``cells`` in their order
        self._halves = np.empty(0, np.float32)  # half the squared length of each
        self._cell_of: dict[bytes, Cell] = dict.fromkeys(head.keys, Cell(head, -1))

    @classmethod
    def of_lists(
        cls, head: Rows, lists: list[Rows], centroids: np.ndarray, encoding: Encoding, exact_rows: int
    ) -> InvertedIndex:
        """As it was when ``centroids`` and the rows of its lists were written down."""
        index = cls(head, centroids.shape[1], encoding, exact_rows)
        for rows, centroid in zip(lists, centroids, strict=True):
            cell = index._new_cell(rows, centroid)
            index._cell_of.update(dict.fromkeys(rows.keys, cell))
        return index

    def __len__(self) -> int:
        return len(self._cell_of)

    def __contains__(self, text_key: bytes) -> bool:
        return text_key in self._cell_of

    @property
    def centroids(self) -> np.ndarray:
        """fp32 ``[lists, dims]``."""
        return self._centroids[: len(self.cells)]

    def text_keys(self) -> list[bytes]:
        """Of all rows."""
        return list(self._cell_of)

    @property
    def nbytes(self) -> int:
        """Memory held, without the keys themselves."""
        per_list = 500  # the Python objects round it
        return (
            self.head.nbytes + sum(cell.rows.nbytes + per_list for cell in self.cells) + self._centroids.nbytes
            + self._halves.nbytes + sys.getsizeof(self._cell_of)
        )

    def add(self, text_key: bytes, age: int, vector: np.ndarray) -> None:
        """One that is not there."""
        cell = self._nearest(vector[None])[0] if self.cells else self._new_cell(self._new_rows(), vector)
        cell.rows.append(text_key, age, vector)
        self._cell_of[text_key] = cell
        self._tidy(cell)

    def remove(self, text_key: bytes) -> bool:
        """Was it there?"""
        cell = self._cell_of.pop(text_key, None)
        if cell is None:
            return False
        cell.rows.take(cell.rows.keys.index(text_key))
        self._tidy(cell)
        return True

    def search(self, vector: np.ndarray, k: int, exactly: bool = False) -> list[tuple[bytes, int]]:
        """See ``VectorIndex.search``."""
        query = np.ascontiguousarray(vector, np.float32)
        blocks = [self.head] if len(self.head) else []
        if exactly or len(self) <= self._exact_rows:
            blocks += [cell.rows for cell in self.cells]
        elif self.cells:
            seen = 0
            for place in np.argsort(self._halves_less(query[None])[0], kind="stable").tolist():
                blocks.append(self.cells[place].rows)
                seen += len(blocks[-1])
                if seen >= PROBED_ROWS:
                    break
        if not blocks or k <= 0:
            return []
        return _best(blocks, query, k)

    # -- upkeep ---------------------------------------------------------------------------------------------------

    def _tidy(self, touched: Cell) -> None:
        """One piece of work after a call."""
        if len(touched.rows) > LONGEST and touched.place >= 0:
            self._split(touched)
        elif len(touched.rows) < SHORTEST and touched.place >= 0 and len(self.cells) > 1 and not len(self.head):
            self._dissolve(touched)
        elif len(self.head):
            self._drain()

    def _drain(self) -> None:
        if not self.cells:
            self._new_cell(self._new_rows(), self.head.decoded(np.array([0]))[0])
        first = max(0, len(self.head) - MOVED)
        last = range(len(self.head) - 1, first - 1, -1)
        cells = self._nearest(self.head.decoded(slice(first, len(self.head))))
        for row in last:
            self._move(self.head, row, cells[row - first])
        for cell in dict.fromkeys(cells):
            if len(cell.rows) > LONGEST:
                self._split(cell)

    def _split(self, cell: Cell) -> None:
        """By 2-means; then every row round about goes where it is nearest."""
        self.splits += 1
        vectors = cell.rows.decoded(slice(0, len(cell.rows)))
        first, second = two_means(vectors)
        around = self._around(cell.place)
        self._set(cell.place, first)
        other = self._new_cell(self._new_rows(), second)
        places = np.array([cell.place, other.place, *around])
        for source in [cell, *(self.cells[place] for place in around)]:
            rows = source.rows.decoded(slice(0, len(source.rows)))
            # a row of a neighbour goes to one of the two only, a row of the list itself anywhere round about
            there = places if source is cell else np.array([cell.place, other.place, source.place])
            scores = np.vecdot(self._centroids[there], rows[:, None]) - self._halves[there]
            nearest = there[scores.argmax(axis=1)]
            for row in np.flatnonzero(nearest != source.place)[::-1].tolist():
                self._move(source.rows, row, self.cells[nearest[row]])

    def _dissolve(self, cell: Cell) -> None:
        """Its rows to the nearest of the others; the last list takes its place."""
        self.merges += 1
        place, last = cell.place, self.cells.pop()
        if last is not cell:
            last.place, self.cells[place] = place, last
            self._set(place, self._centroids[len(self.cells)])
        if len(cell.rows):
            for row, to in reversed(list(enumerate(self._nearest(cell.rows.decoded(slice(0, len(cell.rows))))))):
                self._move(cell.rows, row, to)

    def _move(self, rows: Rows, row: int, to: Cell) -> None:
        self._cell_of[rows.keys[row]] = to
        rows.move(row, to.rows)
        rows.take(row)

    # -- lists ----------------------------------------------------------------------------------------------------

    def _halves_less(self, vectors: np.ndarray) -> np.ndarray:
        """Half the squared distance of each to each centroid, up to a constant: fp32 ``[n, lists]``."""
        n = len(self.cells)
        products = np.vecdot(self._centroids[:n], vectors[:, None])  # no BLAS: no threads, no order of sums of its own
        distances: np.ndarray = self._halves[:n] - products
        return distances

    def _nearest(self, vectors: np.ndarray) -> list[Cell]:
        return [self.cells[place] for place in self._halves_less(vectors).argmin(axis=1).tolist()]

    def _around(self, place: int) -> list[int]:
        distances = self._halves_less(self._centroids[place][None])[0]
        distances[place] = np.inf
        return np.argsort(distances, kind="stable")[: min(NEIGHBOURS, len(self.cells) - 1)].tolist()

    def _new_rows(self) -> Rows:
        return Rows(self._dims, self._encoding)

    def _new_cell(self, rows: Rows, centroid: np.ndarray) -> Cell:
        cell = Cell(rows, len(self.cells))
        if cell.place == len(self._halves):
            capacity = cell.place + 8 + cell.place // 8
            self._centroids.resize((capacity, self._dims), refcheck=False)
            self._halves.resize(capacity, refcheck=False)
        self.cells.append(cell)
        self._set(cell.place, centroid)
        return cell

    def _set(self, place: int, centroid: np.ndarray) -> None:
        self._centroids[place] = centroid
        self._halves[place] = np.vecdot(centroid, centroid) / 2


def two_means(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The means of two parts of ``[n >= 2, dims]``, each of at least a quarter; deterministic.

    It begins with the row that is farthest from the mean, and the one farthest from that. Each round cuts along the
    line between the two means, at the middle or where a quarter is on one side.
    """
    n, total = len(vectors), vectors.sum(axis=0)
    first = vectors[np.vecdot(vectors, total).argmin()]
    second = vectors[np.vecdot(vectors, first).argmin()]
    for _ in range(ROUNDS):
        along = np.vecdot(vectors, first - second) - (np.vecdot(first, first) - np.vecdot(second, second)) / 2
        order = np.argsort(-along, kind="stable")
        cut = min(max(int((along > 0).sum()), n // 4, 1), n - max(n // 4, 1))
        part = vectors[order[:cut]].sum(axis=0)
        first, second = part / cut, (total - part) / (n - cut)
    return first, second


def _best(blocks: list[Rows], query: np.ndarray, k: int) -> list[tuple[bytes, int]]:
    """The ``k`` best rows of all blocks: what fp32 products cannot tell from them, ranked as a flat index ranks."""
    products = np.concatenate([rows.products(query) for rows in blocks])
    begins = np.cumsum([0, *(len(rows) for rows in blocks)])
    kth = np.partition(products, len(products) - k)[-k] if k < len(products) else -np.inf
    found = np.flatnonzero(products >= kth - SLACK)
    owners = np.searchsorted(begins, found, side="right") - 1
    scored = []
    for owner in np.unique(owners).tolist():
        rows, mine = blocks[owner], found[owners == owner] - begins[owner]
        scored += [
            (-cosine, age, rows.keys[row])
            for cosine, age, row in zip(
                rows.cosines(mine, query).tolist(), rows.ages[mine].tolist(), mine.tolist(), strict=True
            )
        ]
    return [(key, -negative) for negative, _, key in sorted(scored)[:k]]

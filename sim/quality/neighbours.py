"""All neighbours of all questions, computed once, so that a replay looks them up in microseconds.

The same cosines, in millionths, and the same order as ``engine/model/index.py`` gives, ties by insertion. Each row's
neighbours are ranked to a depth; a look-up walks down that list and takes those that are in the cache now. Where the
list ends too early (a cache that is nearly empty) all that is there is ranked instead.
"""

from __future__ import annotations

import numpy as np

from engine.model.index import millionths
from sim.quality.questions import Questions

DEPTH = 384
BLOCK_ROWS = 512
OUT_OF_REACH = -3_000_000  # below any cosine: of another scope, or the row itself


class Neighbours:
    """Of ``n`` questions among themselves."""

    def __init__(self, questions: Questions, depth: int = DEPTH) -> None:
        vectors = questions.vectors.astype(np.float64)
        names = {scope: i for i, scope in enumerate(dict.fromkeys(questions.scopes))}
        self._scopes = np.array([names[scope] for scope in questions.scopes])
        self._vectors = questions.vectors
        size = len(questions)
        depth = min(depth, size)
        self._rows = np.empty((size, depth), np.int32)
        self._cosines = np.empty((size, depth), np.int32)
        for begin in range(0, size, BLOCK_ROWS):
            block = slice(begin, min(begin + BLOCK_ROWS, size))
            found = np.rint(vectors[block] @ vectors.T * 1e6).astype(np.int32).clip(-1_000_000, 1_000_000)
            found[self._scopes[block, None] != self._scopes[None, :]] = OUT_OF_REACH
            found[np.arange(block.stop - begin), np.arange(begin, block.stop)] = OUT_OF_REACH
            best = np.argpartition(-found, depth - 1, axis=1)[:, :depth]
            cosines = np.take_along_axis(found, best, axis=1)
            order = np.argsort(-cosines, axis=1, kind="stable")
            self._rows[block] = np.take_along_axis(best, order, axis=1)
            self._cosines[block] = np.take_along_axis(cosines, order, axis=1)

    def __len__(self) -> int:
        return len(self._rows)

    def nearest(self, row: int, present: Present, k: int) -> tuple[list[int], list[int]]:
        """Rows that are in the cache, and their cosines in millionths: nearest first, then oldest first."""
        there = present.at[self._rows[row]]
        rows, cosines = self._rows[row][there], self._cosines[row][there]
        if len(rows) <= k:  # one more than wanted, or else a tie at the end of the list could be cut in two
            rows = np.flatnonzero(present.at & (self._scopes == self._scopes[row]))
            rows = rows[rows != row]
            cosines = millionths(self._vectors[rows], self._vectors[row])
        else:
            reach = cosines >= cosines[k - 1]
            rows, cosines = rows[reach], cosines[reach]
        order = np.lexsort((present.age[rows], -cosines))[:k]
        wanted = cosines[order] > OUT_OF_REACH
        return rows[order][wanted].tolist(), cosines[order][wanted].tolist()


class Present:
    """Which of ``n`` questions are in the cache, and since which insertion."""

    def __init__(self, size: int) -> None:
        self.at = np.zeros(size, bool)
        self.age = np.zeros(size, np.int64)
        self._inserted = 0

    def insert(self, row: int) -> None:
        """Anew, if it is there already."""
        self.at[row] = True
        self.age[row] = self._inserted
        self._inserted += 1

"""The index against brute force in plain Python: every backend, through adds, removals and ties, gives the same lists.

    pytest tests/model/test_index.py

The approximate index, 8 bits and the file are in ``test_inverted_index.py`` and ``test_index_file.py``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import count

import numpy as np
import pytest

from engine.errors import UserError
from engine.model import index_scans as module
from engine.model.index import VectorIndex, millionths
from engine.model.index_scans import DeviceScan

DIMS = 16
BACKENDS = ["numpy", "faiss", "device"]


def make(backend: str) -> VectorIndex:
    """``device``: what a GPU would do, on faiss' CPU index."""
    if backend == "numpy":
        return VectorIndex(DIMS, "numpy")
    faiss = pytest.importorskip("faiss")
    index = VectorIndex(DIMS, "faiss")
    if backend == "device":

        def copy(vectors: np.ndarray) -> object:
            flat = faiss.IndexFlatIP(DIMS)
            flat.add(vectors.copy())
            return flat

        index._make_scan = lambda: DeviceScan(copy, from_rows=0)
    return index


class Brute:
    """The specification."""

    def __init__(self) -> None:
        self._age = count()
        self.entries: dict[tuple[bytes, bytes], tuple[int, list[float]]] = {}

    def add(self, hard_key: bytes, text_key: bytes, vector: np.ndarray) -> None:
        self.entries[hard_key, text_key] = (next(self._age), vector.tolist())

    def remove(self, hard_key: bytes, text_key: bytes) -> None:
        self.entries.pop((hard_key, text_key), None)

    def search(self, hard_key: bytes, vector: np.ndarray, k: int) -> list[tuple[bytes, int]]:
        query = vector.tolist()
        scored = [
            (-min(10**6, max(-(10**6), round(1e6 * sum(a * b for a, b in zip(query, row, strict=True))))), age, text)
            for (hard, text), (age, row) in self.entries.items()
            if hard == hard_key
        ]
        return [(text, -cosine) for cosine, _, text in sorted(scored)[:k]]


def unit(rng: np.random.Generator, near: np.ndarray | None = None) -> np.ndarray:
    vector = rng.normal(size=DIMS) if near is None else near + rng.normal(size=DIMS) * 1e-3
    return (vector / np.linalg.norm(vector)).astype(np.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", range(3))
def test_it_is_brute_force(backend: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clusters tighter than a millionth, exact copies, replaced and removed entries, three hard keys."""
    monkeypatch.setattr(module, "GPU_CHANGED", 20)
    rng, index, brute = np.random.default_rng(seed), make(backend), Brute()
    centres = [unit(rng) for _ in range(6)]
    hard_keys = [b"a", b"b", b"c"]
    for turn in range(600):
        hard, text = hard_keys[rng.integers(3)], b"t%d" % rng.integers(200)
        if rng.random() < 0.3:
            index.remove(hard, text)
            brute.remove(hard, text)
        else:
            centre = centres[rng.integers(6)]
            vector = [unit(rng), unit(rng, centre), centre][rng.integers(3)]
            index.add(hard, text, vector)
            brute.add(hard, text, vector)
        if turn % 3 == 0:
            query = [centres[rng.integers(6)], unit(rng)][rng.integers(2)]
            k = int(rng.choice([0, 1, 8, 50]))
            assert index.search(hard, query, k) == brute.search(hard, query, k), turn
    assert len(index) == len(brute.entries)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_hundred_equals_come_oldest_first(backend: str) -> None:
    """More ties than are proposed at first; the oldest is the last row by then, for removal moved it."""
    rng, index = np.random.default_rng(1), make(backend)
    same = unit(rng)
    for i in range(100):
        index.add(b"h", b"%d" % i, same)
        index.add(b"h", b"far%d" % i, unit(rng))
    for i in range(10):
        index.remove(b"h", b"%d" % i)
    assert index.search(b"h", same, 3) == [(b"10", 10**6), (b"11", 10**6), (b"12", 10**6)]
    index.add(b"h", b"10", same)  # again: the youngest now
    assert [text for text, _ in index.search(b"h", same, 2)] == [b"11", b"12"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_hard_key_sees_its_own_alone_and_leaves_nothing_behind(backend: str) -> None:
    rng, index = np.random.default_rng(2), make(backend)
    vector, other = unit(rng), unit(rng)
    index.add(b"bank", b"t", vector)
    index.add(b"shop", b"t", other)
    assert index.search(b"shop", vector) == [(b"t", int(millionths(other[None], vector)[0]))]
    assert index.search(b"nobody", vector) == []
    index.remove(b"bank", b"t")
    index.remove(b"bank", b"t")
    index.remove(b"nobody", b"t")
    assert index.search(b"bank", vector) == [] and len(index) == 1
    assert list(index._of) == [b"shop"]


def test_the_device_s_copy_is_made_anew_after_enough_changes_only(monkeypatch: pytest.MonkeyPatch) -> None:
    faiss = pytest.importorskip("faiss")
    monkeypatch.setattr(module, "GPU_CHANGED", 20)
    copies: list[int] = []

    def copy(vectors: np.ndarray) -> object:
        copies.append(len(vectors))
        flat = faiss.IndexFlatIP(DIMS)
        flat.add(vectors.copy())
        return flat

    rng, index = np.random.default_rng(3), VectorIndex(DIMS, "faiss")
    index._make_scan = lambda: DeviceScan(copy, from_rows=50)
    for i in range(100):
        index.add(b"h", b"%d" % i, unit(rng))
        index.search(b"h", unit(rng), 8)
    assert copies == [50, 71, 92]


def test_what_the_device_s_copy_ranks_first_may_be_gone() -> None:
    """More of its best rows have changed than are proposed to spare: those that follow must still be found."""
    rng, index, brute = np.random.default_rng(5), make("device"), Brute()
    centre, far = unit(rng), unit(rng)
    for i in range(300):
        vector = centre if i < 40 else unit(rng)
        index.add(b"h", b"%d" % i, vector)
        brute.add(b"h", b"%d" % i, vector)
    assert len(index.search(b"h", far, 8)) == 8  # copied now
    for i in range(40):
        vector = unit(rng, -centre) if i % 2 else unit(rng)
        index.add(b"h", b"%d" % i, vector)
        brute.add(b"h", b"%d" % i, vector)
    assert index.search(b"h", centre, 8) == brute.search(b"h", centre, 8)


def test_no_cosine_is_above_one() -> None:
    """fp32 leaves a unit vector a little longer than one."""
    vector = unit(np.random.default_rng(6)) * np.float32(1 + 1e-6)
    assert millionths(np.stack([vector, -vector]), vector).tolist() == [10**6, -(10**6)]


def test_vectors_are_copied_and_their_shape_is_checked() -> None:
    index, vector = VectorIndex(DIMS, "numpy"), unit(np.random.default_rng(4))
    index.add(b"h", b"t", vector)
    query = vector.copy()
    vector[:] = 0
    assert index.search(b"h", query) == [(b"t", 10**6)]
    with pytest.raises(ValueError, match="shape"):
        index.add(b"h", b"t", np.zeros(DIMS + 1, np.float32))
    assert index.search(b"h", query) == [(b"t", 10**6)]


@pytest.mark.parametrize("asked", ["faiss", "gpu"])
def test_without_faiss_it_is_numpy_unless_faiss_was_asked_for(
    monkeypatch: pytest.MonkeyPatch, asked: module.Backend
) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    assert VectorIndex(DIMS).backend == "numpy"
    with pytest.raises(UserError, match="pip install 'faiss-cpu"):
        VectorIndex(DIMS, asked)


def test_a_gpu_is_taken_where_faiss_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    faiss = pytest.importorskip("faiss")
    assert VectorIndex(DIMS).backend == ("gpu" if getattr(faiss, "get_num_gpus", int)() else "numpy")
    resources: Callable[[], object] = object
    monkeypatch.setattr(faiss, "StandardGpuResources", resources, raising=False)
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1, raising=False)
    assert VectorIndex(DIMS).backend == "gpu"
    assert VectorIndex(DIMS, "faiss").backend == "faiss"
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 0)
    assert VectorIndex(DIMS).backend == "numpy"
    with pytest.raises(UserError, match="no GPU"):
        VectorIndex(DIMS, "gpu")

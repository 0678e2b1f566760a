"""Nearest neighbours by cosine, one flat index for each hard key: exact, deterministic, the same on every backend.

A backend (numpy, faiss, faiss on a GPU) only proposes rows, by fp32 products and with some to spare. Cosines are then
taken in fp64, rounded to millionths and ranked, ties by insertion: so no backend's order of sums can show. Vectors lie
in one matrix that all backends scan in place; a removed row is filled with the last, so removal costs nothing.
Knows nothing of texts, encoders or thresholds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from engine.errors import UserError

Backend = Literal["auto", "numpy", "faiss", "gpu"]
Scan = Callable[[np.ndarray, np.ndarray, int], tuple[np.ndarray, np.ndarray]]  # rows, query, count -> rows, products

SPARE = 8  # rows proposed beyond k
SLACK = 1e-5  # far above the error of an fp32 product of unit vectors, and above half a millionth
GPU_MOST = 2048  # the most neighbours that faiss gives on a GPU
GPU_FROM = 20_000  # rows; fewer are scanned here in about a millisecond
GPU_CHANGED = 1000  # rows changed since they were copied to the device, before they are copied again


def millionths(vectors: np.ndarray, query: np.ndarray) -> np.ndarray:
    """Cosines of unit vectors ``[n, dims]`` with one of them, rounded to integer millionths: int64 ``[n]``."""
    products = (vectors.astype(np.float64) * query.astype(np.float64)).sum(axis=1)  # row by row: no BLAS, no surprise
    cosines: np.ndarray = np.rint(products * 1e6).astype(np.int64).clip(-1_000_000, 1_000_000)
    return cosines


class VectorIndex:
    """Vectors by (hard key, text key). ``backend`` auto: a GPU if faiss has one, else faiss, else numpy."""

    def __init__(self, dims: int, backend: Backend = "auto") -> None:
        self.dims = dims
        self.backend, self._make_scan = choose(backend)
        self._flat: dict[bytes, FlatIndex] = {}

    def __len__(self) -> int:
        return sum(map(len, self._flat.values()))

    def add(self, hard_key: bytes, text_key: bytes, vector: np.ndarray) -> None:
        """A unit vector; one that is there already under this text key is replaced and counts as new."""
        if vector.shape != (self.dims,):
            raise ValueError(f"a vector of shape {vector.shape}, not ({self.dims},)")
        if hard_key not in self._flat:
            self._flat[hard_key] = FlatIndex(self.dims, self._make_scan())
        self._flat[hard_key].add(text_key, vector)

    def remove(self, hard_key: bytes, text_key: bytes) -> None:
        """Unknown keys are no-ops; a hard key without vectors takes no memory."""
        flat = self._flat.get(hard_key)
        if flat is not None:
            flat.remove(text_key)
            if not len(flat):
                del self._flat[hard_key]

    def search(self, hard_key: bytes, vector: np.ndarray, k: int = 8) -> list[tuple[bytes, int]]:
        """The ``k`` nearest under this hard key: (text key, cosine in millionths), nearest first, then oldest first."""
        flat = self._flat.get(hard_key)
        return flat.search(vector, k) if flat is not None else []


class FlatIndex:
    """The vectors of one hard key."""

    def __init__(self, dims: int, scan: Scan) -> None:
        self._scan = scan
        self._vectors = np.empty((16, dims), np.float32)
        self._age = np.empty(16, np.int64)  # insertion number of each row
        self._keys: list[bytes] = []
        self._row_of: dict[bytes, int] = {}
        self._added = 0

    def __len__(self) -> int:
        return len(self._keys)

    def add(self, text_key: bytes, vector: np.ndarray) -> None:
        """See ``VectorIndex``."""
        self.remove(text_key)
        row = len(self._keys)
        if row == len(self._vectors):
            self._vectors = np.concatenate([self._vectors, np.empty_like(self._vectors)])
            self._age = np.concatenate([self._age, np.empty_like(self._age)])
        self._vectors[row], self._age[row] = vector, self._added
        self._keys.append(text_key)
        self._row_of[text_key] = row
        self._added += 1
        self._changed(row)

    def remove(self, text_key: bytes) -> None:
        """See ``VectorIndex``."""
        row = self._row_of.pop(text_key, None)
        if row is None:
            return
        last, last_key = len(self._keys) - 1, self._keys.pop()
        if row != last:
            self._vectors[row], self._age[row] = self._vectors[last], self._age[last]
            self._keys[row] = last_key
            self._row_of[last_key] = row
        self._changed(row)
        self._changed(last)

    def search(self, vector: np.ndarray, k: int) -> list[tuple[bytes, int]]:
        """See ``VectorIndex``."""
        rows = self._candidates(np.ascontiguousarray(vector, np.float32), k)
        cosines = millionths(self._vectors[rows], vector)
        best = np.lexsort((self._age[rows], -cosines))[: max(0, k)]
        return [(self._keys[rows[i]], int(cosines[i])) for i in best]

    def _candidates(self, vector: np.ndarray, k: int) -> np.ndarray:
        """Rows among which the ``k`` best are for certain: the last proposed is clearly worse than the k-th."""
        n, count = len(self._keys), max(0, k) + SPARE
        while count < n:
            rows, products = self._scan(self._vectors[:n], vector, count)
            kth = np.partition(products, len(products) - k)[-k] if k > 0 else np.inf
            if products.min() < kth - SLACK:
                return rows
            count *= 4
        return np.arange(n)

    def _changed(self, row: int) -> None:
        if isinstance(self._scan, DeviceScan):
            self._scan.changed[row] = None


def scan_numpy(vectors: np.ndarray, query: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """One matrix product."""
    products = vectors @ query
    rows = np.argpartition(products, len(products) - count)[-count:]
    return rows, products[rows]


def scan_faiss(vectors: np.ndarray, query: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """IndexFlatIP's own search, on our memory: no second copy, and no removal that moves all that follows."""
    import faiss

    products, rows = faiss.knn(query[None], vectors, count, metric=faiss.METRIC_INNER_PRODUCT)
    return rows[0], products[0]


class DeviceScan:
    """A copy of the rows on a device; what changed since it was made is scanned here. ``copy`` makes a faiss index."""

    def __init__(self, copy: Callable[[np.ndarray], Any], from_rows: int = GPU_FROM) -> None:
        self._copy, self._from_rows = copy, from_rows
        self._index: Any = None
        self.changed: dict[int, None] = {}  # rows set or removed since

    def __call__(self, vectors: np.ndarray, query: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """See ``Scan``."""
        if len(vectors) < self._from_rows or count + GPU_CHANGED > GPU_MOST:
            return scan_faiss(vectors, query, count)
        if self._index is None or len(self.changed) > GPU_CHANGED:
            self._index, self.changed = self._copy(vectors), {}
        theirs, found = self._index.search(query[None], min(self._index.ntotal, count + len(self.changed)))
        same = np.array([row not in self.changed for row in found[0].tolist()], bool)
        changed = np.array([row for row in self.changed if row < len(vectors)], np.int64)
        rows = np.concatenate([found[0][same], changed])
        products = np.concatenate([theirs[0][same], vectors[changed] @ query])
        best = np.argpartition(products, len(products) - count)[-count:]
        return rows[best], products[best]


def choose(backend: Backend) -> tuple[str, Callable[[], Scan]]:
    """The backend there is, and what makes a scan for one hard key; UserError when it is not the one asked for."""
    if backend == "numpy":
        return "numpy", lambda: scan_numpy
    try:
        import faiss
    except ImportError:
        if backend == "auto":
            return "numpy", lambda: scan_numpy
        raise UserError(f"no faiss for the index backend {backend!r}", fix="pip install 'faiss-cpu>=1.15,<2'") from None
    has_gpu = hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0
    if backend == "faiss" or (backend == "auto" and not has_gpu):
        return "faiss", lambda: scan_faiss
    if not has_gpu:
        raise UserError("faiss sees no GPU", fix="pip install 'faiss-gpu>=1.15,<2' where nvidia-smi answers")
    resources = faiss.StandardGpuResources()

    def copy(vectors: np.ndarray) -> Any:
        index = faiss.GpuIndexFlatIP(resources, vectors.shape[1])
        index.add(vectors)
        return index

    return "gpu", lambda: DeviceScan(copy)

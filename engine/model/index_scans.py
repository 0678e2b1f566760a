"""What proposes rows of a flat index: numpy, faiss, or faiss on a GPU. By fp32 products; somebody else ranks them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from engine.errors import UserError
from engine.model.index_rows import Rows

Backend = Literal["auto", "numpy", "faiss", "gpu"]
Scan = Callable[[Rows, np.ndarray, int], tuple[np.ndarray, np.ndarray]]  # rows, query, count -> row numbers, products

GPU_MOST = 2048  # the most neighbours that faiss gives on a GPU
GPU_FROM = 20_000  # rows; fewer are scanned here in about a millisecond
GPU_CHANGED = 1000  # rows changed since they were copied to the device, before they are copied again


def scan_numpy(rows: Rows, query: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Row by row; the only one that reads 8 bits."""
    products = rows.products(query)
    best = np.argpartition(products, len(products) - count)[-count:]
    return best, products[best]


def scan_faiss(rows: Rows, query: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """IndexFlatIP's own search, on our memory: no second copy, and no removal that moves all that follows."""
    import faiss

    products, found = faiss.knn(query[None], rows.vectors[: len(rows)], count, metric=faiss.METRIC_INNER_PRODUCT)
    return found[0], products[0]


class DeviceScan:
    """A copy of the rows on a device; what changed since it was made is scanned here. ``copy`` makes a faiss index."""

    def __init__(self, copy: Callable[[np.ndarray], Any], from_rows: int = GPU_FROM) -> None:
        self._copy, self._from_rows = copy, from_rows
        self._index: Any = None
        self.changed: dict[int, None] = {}  # rows set or removed since

    def __call__(self, rows: Rows, query: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """See ``Scan``."""
        n = len(rows)
        if n < self._from_rows or count + GPU_CHANGED > GPU_MOST:
            return scan_faiss(rows, query, count)
        if self._index is None or len(self.changed) > GPU_CHANGED:
            self._index, self.changed = self._copy(rows.vectors[:n]), {}
        theirs, found = self._index.search(query[None], min(self._index.ntotal, count + len(self.changed)))
        same = np.array([row not in self.changed for row in found[0].tolist()], bool)
        changed = np.array([row for row in self.changed if row < n], np.int64)
        proposed = np.concatenate([found[0][same], changed])
        products = np.concatenate([theirs[0][same], rows.vectors[changed] @ query])
        best = np.argpartition(products, len(products) - count)[-count:]
        return proposed[best], products[best]


def choose(backend: Backend) -> tuple[str, Callable[[], Scan]]:
    """The backend there is, and what makes a scan for one hard key; UserError when it is not the one asked for.

    ``auto`` leaves faiss alone on a CPU: its threads wait for each other, and on busy cores one search takes
    milliseconds (``README.md``, "Numpy or faiss").
    """
    if backend == "numpy":
        return "numpy", lambda: scan_numpy
    try:
        import faiss
    except ImportError:
        if backend == "auto":
            return "numpy", lambda: scan_numpy
        raise UserError(f"no faiss for the index backend {backend!r}", fix="pip install 'faiss-cpu>=1.15,<2'") from None
    has_gpu = hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0
    if backend == "faiss":
        return "faiss", lambda: scan_faiss
    if backend == "auto" and not has_gpu:
        return "numpy", lambda: scan_numpy
    if not has_gpu:
        raise UserError("faiss sees no GPU", fix="pip install 'faiss-gpu>=1.15,<2' where nvidia-smi answers")
    resources = faiss.StandardGpuResources()

    def copy(vectors: np.ndarray) -> Any:
        index = faiss.GpuIndexFlatIP(resources, vectors.shape[1])
        index.add(vectors)
        return index

    return "gpu", lambda: DeviceScan(copy)

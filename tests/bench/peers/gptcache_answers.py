"""GPTCache 0.1.44 with its defaults (sqlite and faiss, distance, 0.8): whose answer each question gets.

The arguments: a ``.npz`` and a folder for its files. In the ``.npz``: fp32 ``vectors [n, dims]``, int ``scopes [n]``
(a cache of its own for each), int ``stored [s]`` (rows in the caches before, by its own ``import_data``), int
``asked [m]`` (rows, in the order of asking), bool ``insert`` (whether a miss is put into the cache). An answer is the
number of its row; ``max_size`` is raised to hold all, which is not its default. Prints JSON: of each question the row
whose answer it got, -1 for a miss.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from gptcache import Cache
from gptcache.adapter.api import get, put
from gptcache.manager import manager_factory
from gptcache.processor.pre import get_prompt
from gptcache.similarity_evaluation import SearchDistanceEvaluation

BATCH = 5_000


def opened(folder: Path, vectors: np.ndarray, stored: np.ndarray) -> Cache:
    """A cache that holds these rows. A prompt is the number of its row."""
    cache = Cache()
    manager = manager_factory(
        "sqlite,faiss", data_dir=str(folder), vector_params={"dimension": vectors.shape[1]},
        eviction_params={"max_size": len(vectors) + 1},
    )
    cache.init(
        pre_embedding_func=get_prompt, embedding_func=lambda text, **_: vectors[int(text)], data_manager=manager,
        similarity_evaluation=SearchDistanceEvaluation(),
    )
    for begin in range(0, len(stored), BATCH):
        rows = stored[begin : begin + BATCH].tolist()
        names = [str(row) for row in rows]
        manager.import_data(names, names, [vectors[row] for row in rows], [None] * len(rows))
    return cache


def main() -> None:
    """Fill, ask."""
    with np.load(sys.argv[1]) as given:
        vectors, scopes, stored, asked = (given[name] for name in ("vectors", "scopes", "stored", "asked"))
        insert = bool(given["insert"])
    caches = {
        scope: opened(Path(sys.argv[2]) / str(scope), vectors, stored[scopes[stored] == scope])
        for scope in np.unique(scopes[asked]).tolist()
    }
    served = []
    for row in asked.tolist():
        cache = caches[int(scopes[row])]
        answer = get(str(row), cache_obj=cache)
        served.append(-1 if answer is None else int(answer))
        if answer is None and insert:
            put(str(row), str(row), cache_obj=cache)
    print(json.dumps(served))


if __name__ == "__main__":
    main()

"""GPTCache 0.1.44 with its defaults (sqlite and faiss, distance): seconds of each ``get``, the embedding left out.

The arguments: a ``.npz`` of fp32 ``rows [n, dims]`` and ``queries [m, dims]``, and a folder for its files. Filled by
its own ``import_data``; ``max_size`` is raised to hold all, which is not its default. Answers are 200 bytes. Prints
JSON.
"""

from __future__ import annotations

import json
import sys
from time import perf_counter

import numpy as np
from gptcache import Cache
from gptcache.adapter.api import get
from gptcache.manager import manager_factory
from gptcache.processor.pre import get_prompt
from gptcache.similarity_evaluation import SearchDistanceEvaluation

BATCH = 5_000


def main() -> None:
    """Fill, warm up, ask."""
    with np.load(sys.argv[1]) as given:
        rows, queries = given["rows"], given["queries"]
    cache = Cache()
    manager = manager_factory(
        "sqlite,faiss", data_dir=sys.argv[2], vector_params={"dimension": rows.shape[1]},
        eviction_params={"max_size": len(rows) + 1},  # the argument of this name beside it is for maps only
    )
    cache.init(
        pre_embedding_func=get_prompt, embedding_func=lambda text, **_: queries[int(text)], data_manager=manager,
        similarity_evaluation=SearchDistanceEvaluation(),
    )
    for begin in range(0, len(rows), BATCH):
        part = rows[begin : begin + BATCH]
        names = [f"question {begin + number}" for number in range(len(part))]
        manager.import_data(names, ["x" * 200] * len(part), list(part), [None] * len(part))
    seconds, hits = [], 0
    for number in range(len(queries)):
        began = perf_counter()
        answer = get(str(number), cache_obj=cache)
        seconds.append(perf_counter() - began)
        hits += answer is not None
    held = manager.v.count()
    assert held == len(rows), f"it holds {held} of {len(rows)}"
    print(json.dumps({"seconds": seconds[len(seconds) // 10 :], "hits": hits, "rows": held}))


if __name__ == "__main__":
    main()

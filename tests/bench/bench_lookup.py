"""A lookup of the semantic cache at 100,000 entries, one in a hundred of them replaced each second; and what it holds.

Vectors: MiniLM's of Banking77 where ``DOORBUSTER_BANKING77`` names the folder with its ``train.csv`` and ``test.csv``,
else of the bundled questions. Each row is a mix of two texts of one intent (up to half and half) with noise of up to
0.3 of its length, so the spectrum stays that of texts; queries are made in the same way, and none is a row. ``decide``
is the fixed rule on eight candidates. GPTCache answers the same queries over the same rows in its own process, right
afterwards; ``make bench-peers`` makes its environment. The table goes to stderr.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import tempfile
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import numpy as np

from engine.cache_config import ExactConfig, SemanticConfig
from engine.events import TextMarks
from engine.model.folder import cache_dir
from engine.model.index import Encoding, IndexStats, VectorIndex
from engine.policy.exact import ExactCache
from engine.policy.fixed import FixedRule
from engine.policy.rules import Candidate
from sim.twin.vectors import vectors_of
from tests.bench.figure import Figure

ROOT = Path(__file__).parents[2]
ROWS, LOOKUPS, RECALLS, CHURN_SHARE, EXACT_GETS = 100_000, 20_000, 500, 0.01, 200_000
PEER_PYTHON = cache_dir() / "peers" / "gptcache" / "bin" / "python"
HARD_KEY, MARKS = b"h" * 16, TextMarks()


class Seen(NamedTuple):
    """Of one kind of vectors; times in microseconds."""

    lookup_us: np.ndarray
    upkeep_us: np.ndarray  # an insertion and an expiry together
    recall: float  # at 1, against the exact search of the same rows
    recall_float32: float  # at 1, against the exact search in fp32
    traced_bytes: float  # for an entry
    stats: IndexStats


def texts_by_intent() -> tuple[str, dict[str, list[str]]]:
    """Whose they are, and texts by what they want."""
    folder = os.environ.get("DOORBUSTER_BANKING77")
    files = [Path(folder) / "train.csv", Path(folder) / "test.csv"] if folder else [ROOT / "data/corpora/questions.csv"]
    found: dict[str, list[str]] = {}
    for file in files:
        with file.open(newline="") as lines:
            for row in csv.DictReader(lines):
                found.setdefault(row.get("category") or row["answer_id"], []).append(row["text"])
    return "Banking77" if folder else "bundled questions", found


def likely_rows(groups: dict[str, list[str]], count: int) -> np.ndarray:
    """fp32 ``[count, 384]`` of length 1: see above; the seed is fixed."""
    known = vectors_of(text for texts in groups.values() for text in texts)
    blocks = [np.stack([known[text] for text in texts if text in known]) for texts in groups.values()]
    rng, sizes = np.random.default_rng(1), np.array([len(block) for block in blocks])
    begins, vectors = np.cumsum(sizes) - sizes, np.concatenate(blocks)
    owner = rng.choice(len(blocks), count, p=sizes / sizes.sum())
    first, second = (vectors[begins[owner] + rng.integers(sizes[owner])] for _ in range(2))
    share, loudness = rng.uniform(0, 0.5, (count, 1)), rng.uniform(0, 0.3, (count, 1))
    rows = (1 - share) * first + share * second + rng.normal(size=first.shape) / np.sqrt(first.shape[1]) * loudness
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def bench() -> list[Figure]:
    """p99 against the millisecond that is promised, bytes an entry, recall, the exact cache, and GPTCache."""
    whose, groups = texts_by_intent()
    made = likely_rows(groups, ROWS + LOOKUPS + 40_000)
    queries, fresh = made[ROWS : ROWS + LOOKUPS], made[ROWS + LOOKUPS :]
    figures, seen = [], {}
    encoding: Encoding
    for encoding in ("float32", "int8"):
        seen[encoding] = found = _measure(encoding, made[:ROWS], queries, fresh)
        low, high = np.quantile(found.lookup_us, [0.5, 0.99])
        promised = 2200 if encoding == "float32" else 700
        figures += [
            Figure(high, f"us a decision and search, p99, {encoding}", "the promised millisecond", 1000.0),
            Figure(found.traced_bytes, f"bytes an entry, {encoding}", "promised", promised),
            Figure(found.recall, f"recall@1, {encoding}", "exact search of the same rows", 1.0),
            Figure(found.recall_float32, f"recall@1, {encoding}", "exact search in fp32", 1.0),
        ]
        upkeep = " / ".join(f"{us:.0f}" for us in np.quantile(found.upkeep_us, [0.5, 0.99, 1.0]))
        _say(f"{encoding} ({whose}): lookup p50 / p99 {low:.0f} / {high:.0f} us, insertion and expiry p50 / p99 / most "
             f"{upkeep} us ({len(found.upkeep_us)}); recall@1 {found.recall:.4f}, of fp32 {found.recall_float32:.4f}; "
             f"traced {found.traced_bytes:.0f} B an entry, said {found.stats.entry_bytes:.0f}; {found.stats}")
    exact = _exact_get_us()
    _say(f"exact hit p50 / p99 / p99.9 {' / '.join(f'{us:.2f}' for us in np.quantile(exact, [0.5, 0.99, 0.999]))} us")
    figures.append(Figure(float(np.quantile(exact, 0.99)), "us an exact hit, p99", "promised", 50.0))
    return figures + list(_peer(made[:ROWS], queries[:500], seen["float32"]))


def _measure(encoding: Encoding, rows: np.ndarray, queries: np.ndarray, fresh: np.ndarray) -> Seen:
    """Fill, then look up as fast as it goes while the entries that are due come and go in between."""
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    index = VectorIndex(rows.shape[1], vectors=encoding)
    for number, row in enumerate(rows):
        index.add(HARD_KEY, b"%032d" % number, row)
    traced = (tracemalloc.get_traced_memory()[0] - before) / len(rows)
    tracemalloc.stop()
    rule = FixedRule(SemanticConfig())
    lookups, upkeep, began = [], [], perf_counter()
    for query in queries:
        at = perf_counter()
        while len(upkeep) < min((at - began) * len(rows) * CHURN_SHARE, len(fresh)):
            at = perf_counter()
            index.remove(HARD_KEY, b"%032d" % len(upkeep))
            index.add(HARD_KEY, b"%032d" % (len(rows) + len(upkeep)), fresh[len(upkeep)])
            upkeep.append(perf_counter() - at)
        at = perf_counter()
        near = index.search(HARD_KEY, query, 8)
        rule.judge(MARKS, [Candidate((HARD_KEY, key), cosine, "", MARKS) for key, cosine in near], False, 0)
        lookups.append(perf_counter() - at)
    there = np.concatenate([rows, fresh])[len(upkeep) : len(upkeep) + len(rows)]
    right = sum(
        int(index.search(HARD_KEY, query, 1)[0][0]) == len(upkeep) + int((there @ query).argmax())
        for query in queries[:RECALLS]
    )
    return Seen(
        np.array(lookups) * 1e6, np.array(upkeep) * 1e6, index.recall(HARD_KEY, list(queries[:RECALLS])),
        right / RECALLS, traced, index.stats(),
    )


def _exact_get_us() -> np.ndarray:
    """Hits in a cache of as many entries, in shuffled order."""
    cache = ExactCache(ExactConfig(max_mib=1024.0))
    keys = [b"%032d" % number for number in range(ROWS)]
    for number, key in enumerate(keys):
        cache.put(number, key, str(number), 200, "r", 32)
    times = []
    for number in np.random.default_rng(2).integers(ROWS, size=EXACT_GETS).tolist():
        began = perf_counter()
        entry = cache.get(ROWS, keys[number])
        times.append(perf_counter() - began)
        assert entry is not None
    return np.array(times) * 1e6


def _peer(rows: np.ndarray, queries: np.ndarray, ours: Seen) -> Iterator[Figure]:
    if not PEER_PYTHON.exists():
        _say("GPTCache is not here: make bench-peers brings it")
        return
    with tempfile.TemporaryDirectory() as folder:
        given = Path(folder) / "given.npz"
        np.savez(given, rows=rows, queries=queries)
        done = subprocess.run(
            [PEER_PYTHON, "-m", "tests.bench.peers.gptcache_lookup", given, folder], cwd=ROOT, check=True, text=True,
            stdout=subprocess.PIPE, env=dict(os.environ, OMP_WAIT_POLICY="PASSIVE", PIP_NO_INDEX="1"),
        )
    found = json.loads(done.stdout.splitlines()[-1])
    theirs = np.array(found["seconds"]) * 1e6
    _say(f"GPTCache 0.1.44: {found['rows']} vectors held, {found['hits']} of {len(queries)} hits")
    for name, share in (("p50", 0.5), ("p99", 0.99)):
        mine, its = float(np.quantile(ours.lookup_us, share)), float(np.quantile(theirs, share))
        _say(f"GPTCache 0.1.44, {found['rows']} rows, lookup {name} {its:.0f} us, ours {mine:.0f} us: "
             f"{its / mine:.1f} x")
        yield Figure(mine, f"us a lookup, {name}", "GPTCache 0.1.44, embedding left out", its)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)

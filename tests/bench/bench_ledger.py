"""The ledger beside a database that commits each row: records a second that are on disk, and bytes a record.

Timed from the first append to the return of the last fdatasync, with what the appender costs in between: one burst
through ``LedgerWriter`` and its thread. SQLite (WAL, synchronous=FULL, one commit a row) writes the same records into
the same folder in the same run. The ratio is that of the two fdatasync times as much as of anything else, so their
percentiles go to stderr beside it. The folder is under ``runs``: a temporary folder may be in memory.
"""

from __future__ import annotations

import sqlite3
import sys
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from random import Random

import msgspec
import numpy as np

from engine.ledger.columns import to_batch
from engine.ledger.commits import Limits
from engine.ledger.files import OsFiles
from engine.ledger.payload import encode, stream
from engine.ledger.record import LogRecord
from engine.ledger.ring import Ring
from engine.ledger.writer import LedgerWriter
from engine.records import RequestRecord
from engine.units import MS_NS, S_NS
from tests.bench.figure import Figure
from tests.ledger.trace import request

RECORDS, ROUNDS = 200_000, 3
ROWS_S = 3.0  # of SQLite
FRAME_ROWS = 2_000  # as Limits.flush_rows


class Event(msgspec.Struct, frozen=True):
    """Fifteen fields of an event that many logs know; 270 bytes as JSON."""

    event_id: str
    at_ns: int
    tenant: str
    session: str
    traffic_class: str
    outcome: str
    tier: str
    replica: int
    level: int
    prompt_tokens: int
    output_tokens: int
    queue_ns: int
    ttft_ns: int
    e2e_ns: int
    priority: int


class TimedFiles(OsFiles):
    """How long each fdatasync took."""

    def __init__(self) -> None:
        self.syncs_ns: list[int] = []

    def sync(self, handle: int) -> None:
        began_ns = time.monotonic_ns()
        super().sync(handle)
        self.syncs_ns.append(time.monotonic_ns() - began_ns)


def bench() -> list[Figure]:
    """Append, on disk, bytes."""
    rng = Random(1)
    records = [request(rng, number) for number in range(RECORDS)]
    events = [_event(rng, number) for number in range(FRAME_ROWS)]
    ring_us, deque_us = _append_us(records)
    Path("runs").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir="runs") as name:
        rates = [_durable_rps(Path(name) / f"ledger-{n}", records) for n in range(ROUNDS)]
        rows_rps = _sqlite_rps(Path(name) / "rows.sqlite", records)
        _say(f"a block of 4 KiB: {_percentiles(_probe_ns(Path(name) / 'probe'))}")
    rates.sort()
    _say(f"rounds: {', '.join(f'{rate:,.0f}' for rate in rates)} records/s; the middle one counts")
    event_bytes = len(stream(to_batch(Event, events))) / len(events)
    record_bytes = len(encode(records[:FRAME_ROWS])[1]) / FRAME_ROWS
    return [
        Figure(ring_us, "us an append", "deque.append", deque_us),
        Figure(rates[ROUNDS // 2], "RequestRecords/s on disk", "SQLite rows/s, one commit a row", rows_rps),
        Figure(event_bytes, "bytes an event of 15 fields, in frames of 2,000", "as JSON", _json_bytes(events)),
        Figure(record_bytes, "bytes a RequestRecord, in frames of 2,000", "as JSON", _json_bytes(records[:FRAME_ROWS])),
    ]


def _event(rng: Random, number: int) -> Event:
    e2e_ns = rng.randrange(10**9)
    return Event(
        f"e{number:07d}", number * 1_000_003, f"tenant-{rng.randrange(20)}", f"s{rng.randrange(500)}",
        rng.choice(["chat", "fraud", "checkout"]), rng.choice(["served", "rejected"]), rng.choice(["exact", "model"]),
        rng.randrange(2), rng.randrange(5), rng.randrange(300), rng.randrange(64), rng.randrange(10**8),
        e2e_ns // 2, e2e_ns, rng.randrange(4),
    )


def _append_us(records: Sequence[LogRecord]) -> tuple[float, float]:
    """Of the ring, and of the plain deque in it; the best of three, the loop counted in both."""
    best = [float("inf"), float("inf")]
    for _ in range(3):
        appends = Ring(len(records), 1, 1 << 30, lambda: None).append, deque[LogRecord]().append
        for number, append in enumerate(appends):
            began_ns = time.perf_counter_ns()
            for record in records:
                append(record)
            best[number] = min(best[number], (time.perf_counter_ns() - began_ns) / len(records) / 1_000)
    return best[0], best[1]


def _durable_rps(folder: Path, records: Sequence[LogRecord]) -> float:
    files = TimedFiles()
    writer = LedgerWriter(folder, Limits(ring_rows=len(records)), files)  # room for the burst: nothing is dropped
    append = writer.append
    cpu_ns, began_ns = time.process_time_ns(), time.monotonic_ns()
    for record in records:
        append(record)
    if not writer.wait(600):
        raise RuntimeError("the disk refused")
    took_ns, cpu_ns = time.monotonic_ns() - began_ns, time.process_time_ns() - cpu_ns
    stats = writer.stats()
    if stats.durable != len(records) or writer.close():
        raise RuntimeError(f"{stats.durable} of {len(records)} are on disk")
    size = sum(path.stat().st_size for path in folder.iterdir())
    rate, cpu_rate = len(records) * S_NS / took_ns, len(records) * S_NS / cpu_ns
    _say(f"{rate:,.0f} records/s, {cpu_rate:,.0f} per CPU second, {size / len(records):.1f} bytes a record in the "
         f"folder; {_percentiles(files.syncs_ns)}")
    return rate


def _sqlite_rps(path: Path, records: Sequence[LogRecord]) -> float:
    fields = RequestRecord.__struct_fields__
    base = sqlite3.connect(path, isolation_level=None)
    base.execute("PRAGMA journal_mode=WAL")
    base.execute("PRAGMA synchronous=FULL")
    base.execute(f"CREATE TABLE record ({', '.join(fields)})")
    insert = f"INSERT INTO record VALUES ({', '.join('?' * len(fields))})"
    rows = [msgspec.structs.astuple(record) for record in records[:50_000]]
    began_ns, count = time.monotonic_ns(), 0
    for row in rows:
        base.execute(insert, row)
        count += 1
        if time.monotonic_ns() - began_ns > ROWS_S * S_NS:
            break
    took_ns = time.monotonic_ns() - began_ns
    base.close()
    return count * S_NS / took_ns


def _probe_ns(path: Path) -> list[int]:
    files = TimedFiles()
    handle = files.create(path)
    for _ in range(1_000):
        files.write(handle, bytes(4_096))
        files.sync(handle)
    files.close(handle)
    return files.syncs_ns


def _json_bytes(rows: Sequence[msgspec.Struct]) -> float:
    return sum(len(msgspec.json.encode(row)) for row in rows) / len(rows)


def _percentiles(syncs_ns: Sequence[int]) -> str:
    p50, p99 = (float(np.quantile(syncs_ns, q)) / MS_NS for q in (0.5, 0.99))
    return f"fdatasync p50 {p50:.2f} ms, p99 {p99:.2f} ms ({len(syncs_ns)})"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)

"""Records to tidy frames, and back from a run folder: one row a request, one row a change of the overload level.

Live and twin write the same ``RequestRecord``; here they become the same frame, so everything behind it cannot tell
them apart. Times are integer nanoseconds from the start of the run; latencies count from the scheduled instant where
the client's own view is known (open loop: a late sender must not hide queueing). Knows no SLO and no figure.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import msgspec
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from engine.errors import STATUS_OF_CODE, JournalError
from engine.events import LedgerRecord, LevelRecord, RequestRecord

DTYPES = {
    "request_id": "string", "tenant": "string", "traffic_class": "string", "intent": "string", "arrived_ns": "Int64",
    "tier": "string", "outcome": "string", "error_code": "string", "level": "Int64", "cosine": "Float64",
    "wrong_hit": "boolean", "prompt_tokens": "Int64", "cached_tokens": "Int64", "output_tokens": "Int64",
    "ttft_ns": "Int64", "e2e_ns": "Int64", "queue_ns": "Int64", "lateness_ns": "Int64", "replica": "Int64",
    "source": "string", "trap": "boolean",
}  # the columns of requests.parquet, in order
CODE_OF_STATUS = {status: code for code, status in reversed(STATUS_OF_CODE.items())}  # the first code of each status
NO_ANSWER = "connection_failed"
NO_RECORD = "unrecorded"  # the client has an answer that the ledger knows nothing of
START_KEY, DURATION_KEY = b"doorbuster.start_ns", b"doorbuster.duration_ns"
RECORDS = Path("ledger", "records.ndjson")


@dataclass(frozen=True, slots=True)
class Run:
    """What a run folder holds of its requests. ``frame`` and ``levels`` count from the start, ``records`` do not."""

    frame: pd.DataFrame
    levels: pd.DataFrame
    records: list[LedgerRecord]
    start_ns: int
    duration_ns: int


def requests_frame(
    records: Iterable[LedgerRecord], seen: pd.DataFrame | None = None, start_ns: int = 0
) -> pd.DataFrame:
    """One row a request, in order of arrival; the columns of requests.parquet.

    ``start_ns`` is the start of the run on the records' clock. ``seen``, one row a request as its client saw it:
    ``request_id intent scheduled_ns ttft_ns e2e_ns lateness_ns status`` and, if known, ``tenant traffic_class
    error_code``. ``scheduled_ns`` counts from the start of the run; ``status`` is 0 or missing where no response came;
    a 200 with an error code is a stream that broke off. Where a client has a value, it replaces the gateway's.
    Raises ValueError when ``seen`` names a request twice.
    """
    rows = [
        {
            "request_id": r.request_id, "tenant": r.tenant, "traffic_class": r.traffic_class,
            "arrived_ns": r.arrived_ns - start_ns, "tier": r.tier, "outcome": r.outcome, "error_code": r.error_code,
            "level": r.level, "cosine": None if r.cosine_millionths is None else r.cosine_millionths / 1e6,
            "prompt_tokens": r.prompt_tokens, "cached_tokens": r.cached_tokens, "output_tokens": r.output_tokens,
            "ttft_ns": r.ttft_ns, "e2e_ns": r.e2e_ns, "queue_ns": r.queue_ns, "replica": r.replica,
            "source": r.source or None,
        }
        for r in records if isinstance(r, RequestRecord)
    ]
    frame = _typed(pd.DataFrame(rows, columns=list(DTYPES), dtype=object))
    if seen is not None:
        frame = _as_seen(frame, seen)
    return frame.sort_values("arrived_ns", kind="stable", ignore_index=True)


def level_frame(
    records: Iterable[LedgerRecord], duration_ns: int, start_ns: int = 0
) -> pd.DataFrame:
    """``at_ns level``, a step function from 0 to ``duration_ns``: each level holds until the next row."""
    changes = sorted(((r.at_ns - start_ns, r.level) for r in records if isinstance(r, LevelRecord)), key=lambda c: c[0])
    first = next((level for at, level in reversed(changes) if at <= 0), 0)
    steps = [(0, first), *(c for c in changes if 0 < c[0] < duration_ns)]
    return pd.DataFrame([*steps, (duration_ns, steps[-1][1])], columns=["at_ns", "level"], dtype="int64")


def write_run(
    folder: Path, frame: pd.DataFrame, records: Iterable[LedgerRecord] | None, duration_ns: int,
    start_ns: int = 0,
) -> None:
    """requests.parquet and ledger/records.ndjson below ``folder``. Raises FileExistsError: no run overwrites a run.

    ``records`` None: the engine has written its own ledger there already.
    """
    if records is not None:
        (folder / RECORDS).parent.mkdir(parents=True, exist_ok=True)
        encoder = msgspec.json.Encoder()
        with (folder / RECORDS).open("xb") as file:
            file.writelines(encoder.encode(record) + b"\n" for record in records)
    table = pa.Table.from_pandas(_typed(frame), preserve_index=False)
    table = table.replace_schema_metadata(
        {**(table.schema.metadata or {}), START_KEY: str(start_ns), DURATION_KEY: str(duration_ns)}
    )
    with (folder / "requests.parquet").open("xb") as file:
        pq.write_table(table, file, compression="zstd")


def read_run(folder: Path) -> Run:
    """The reverse. A torn last record (a killed process) is cut; damage before it is a JournalError."""
    path = folder / "requests.parquet"
    if not path.is_file():
        raise JournalError("no such run", where=str(folder), fix="give a run folder: one that holds requests.parquet")
    table = pq.read_table(path)
    meta = table.schema.metadata or {}
    start_ns, duration_ns = int(meta.get(START_KEY, 0)), int(meta.get(DURATION_KEY, 0))
    workers = _lives(folder) or [[]]
    levels = highest([level_frame(_one_life(lives), duration_ns, start_ns) for lives in workers])
    records = _merged(list(chain.from_iterable(workers)))
    return Run(_typed(table.to_pandas()), levels, records, start_ns, duration_ns)


def read_records(folder: Path) -> list[LedgerRecord]:
    """All that the gateways of a run folder wrote, one or several (``--workers``), by the instant of writing."""
    return _merged(list(chain.from_iterable(_lives(folder))))


def highest(levels: list[pd.DataFrame]) -> pd.DataFrame:
    """Several gateways' level frames as one: each has a level of its own, and the highest of them is the run's."""
    if len(levels) == 1:
        return levels[0]
    steps = [frame.groupby("at_ns")["level"].last().rename(n) for n, frame in enumerate(levels)]
    at = pd.concat(steps, axis=1).sort_index().ffill().max(axis=1).astype("int64")
    changed = at.ne(at.shift())
    changed.iloc[-1] = True
    return at[changed].rename("level").rename_axis("at_ns").reset_index().astype("int64")


def _lives(folder: Path) -> list[list[list[LedgerRecord]]]:
    """By worker, in order of its lives: ``records.ndjson``, or ``records-K.ndjson`` and ``records-K-life-N.ndjson``."""
    workers: dict[str, list[tuple[int, Path]]] = {}
    for path in (folder / RECORDS).parent.glob("records*.ndjson"):
        worker, _, life = path.stem.partition("-life-")
        workers.setdefault(worker, []).append((int(life or 1), path))
    return [[_read_records(path) for _, path in sorted(workers[name])] for name in sorted(workers)]


def _one_life(lives: list[list[LedgerRecord]]) -> list[LedgerRecord]:
    """A gateway that is started anew begins at level 0, and says nothing of that."""
    out: list[LedgerRecord] = []
    for records in lives:
        if out:
            out.append(LevelRecord(_written_ns(out[-1]), 0))
        out += records
    return out


def _merged(files: list[list[LedgerRecord]]) -> list[LedgerRecord]:
    return list(heapq.merge(*files, key=_written_ns))


def _written_ns(record: LedgerRecord) -> int:
    return record.arrived_ns + record.e2e_ns if isinstance(record, RequestRecord) else record.at_ns


def _read_records(path: Path) -> list[LedgerRecord]:
    records: list[LedgerRecord] = []
    if not path.is_file():
        return records
    decoder = msgspec.json.Decoder(LedgerRecord)
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break
            try:
                records.append(decoder.decode(line))
            except msgspec.DecodeError as error:
                raise JournalError(f"record {number} is damaged: {error}", where=str(path)) from None
    return records


def _typed(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.reindex(columns=list(DTYPES)).astype(DTYPES)


def _as_seen(frame: pd.DataFrame, seen: pd.DataFrame) -> pd.DataFrame:
    """Lay the clients' view over the gateway's, and add the requests that only clients know of."""
    twice = seen["request_id"][seen["request_id"].duplicated()]
    if len(twice):
        raise ValueError(f"seen: request {twice.iloc[0]!r} is there twice")
    view = seen.set_index(seen["request_id"].astype("string")).rename(columns={"scheduled_ns": "arrived_ns"})
    status = pd.to_numeric(view["status"], errors="coerce").fillna(0).astype("int64")
    why = status.map(lambda s: NO_ANSWER if s == 0 else CODE_OF_STATUS.get(s, f"http_{s}") if s >= 400 else NO_RECORD)
    own = view.get("error_code", pd.Series(pd.NA, index=view.index)).astype("string")
    view = _typed(view.drop(columns="request_id").rename_axis("request_id").reset_index())
    view["error_code"] = own.fillna(why.astype("string")).array

    strangers = view[~view["request_id"].isin(frame["request_id"])].copy()
    strangers["outcome"] = "failed"
    strangers["traffic_class"] = strangers["traffic_class"].fillna("unknown")

    index = view.set_index("request_id")
    frame = frame.copy()
    for column in ("intent", "arrived_ns", "ttft_ns", "e2e_ns", "lateness_ns"):
        theirs = frame["request_id"].map(index[column]).astype(DTYPES[column])
        frame[column] = theirs.fillna(frame[column])
    got = status.between(200, 399) & own.isna()
    lost = (frame["outcome"] == "served") & ~frame["request_id"].map(got).astype("boolean").fillna(True)
    frame.loc[lost, "error_code"] = frame["request_id"].map(index["error_code"])
    frame.loc[lost, "outcome"] = "failed"  # answered, but the client never had it
    return pd.concat([frame, strangers], ignore_index=True)

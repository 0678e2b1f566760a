"""A batch of records as the payload of one frame, and back. Two codecs; the frame says which.

``ARROW``: the order of kinds, then one Arrow IPC stream a kind, each zstd-compressed by buffer. ``ROWS``: tagged
msgpack under zstd, for few rows, where Arrow's frame around each column would outweigh what stands in it.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import msgspec
import pyarrow as pa

from engine.ledger.columns import to_batch, to_rows
from engine.ledger.record import KIND_OF, KINDS, LogRecord, LossRecord

FOOTER, ROWS, ARROW = 0, 1, 2  # the codec field of a frame
ARROW_FROM_ROWS = 256  # measured: below it msgpack under zstd is the smaller
ZSTD_LEVEL = 1
PART = struct.Struct("<HI")  # kind, bytes; the first part is the order of kinds
ORDER = 0xFFFF

_CODEC = pa.Codec("zstd", compression_level=ZSTD_LEVEL)
_OPTIONS = pa.ipc.IpcWriteOptions(compression=_CODEC)
_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(list[LogRecord])


class Batch(msgspec.Struct, frozen=True):
    """The rows of one kind, columns as they lie on disk, and each row's place in the frame."""

    kind: type[LogRecord]
    places: Sequence[int]
    columns: pa.RecordBatch


def encode(rows: Sequence[LogRecord]) -> tuple[int, bytes]:
    """Codec and payload of ``rows``."""
    if len(rows) < ARROW_FROM_ROWS:
        plain = _ENCODER.encode(rows)
        return ROWS, len(plain).to_bytes(4, "little") + _CODEC.compress(plain, asbytes=True)
    kinds = bytes([KIND_OF[type(row)] for row in rows])
    parts: list[bytes] = []
    numbers = sorted(set(kinds))
    if len(numbers) > 1:
        order = _CODEC.compress(kinds, asbytes=True)
        parts += PART.pack(ORDER, len(order)), order
    for number in numbers:
        kind = KINDS[number]
        chosen = rows if len(numbers) == 1 else [row for row in rows if type(row) is kind]
        part = stream(to_batch(kind, chosen))
        parts += PART.pack(number, len(part)), part
    return ARROW, b"".join(parts)


def encodable(rows: Sequence[LogRecord], first_seq: int) -> list[LogRecord]:
    """The same, those that cannot be written each replaced by the record of its loss: one bad row takes no other."""
    return [row if _fits(row) else LossRecord(seq, 1, type(row).__name__) for seq, row in enumerate(rows, first_seq)]


def _fits(row: LogRecord) -> bool:
    try:
        to_batch(type(row), [row])
    except (ValueError, TypeError, OverflowError):
        return False
    return True


def decode(codec: int, count: int, payload: bytes) -> list[LogRecord]:
    """The ``count`` rows of a payload whose checksum was right, in the order in which they were accepted."""
    if codec == ROWS:
        return _DECODER.decode(_unpacked(payload))
    rows: list[LogRecord | None] = [None] * count
    for batch in batches(codec, count, payload):
        for place, row in zip(batch.places, to_rows(batch.kind, batch.columns), strict=True):
            rows[place] = row
    return [row for row in rows if row is not None]


def batches(codec: int, count: int, payload: bytes) -> list[Batch]:
    """The same by kind, in columns: for views, which need no rows."""
    if codec == ROWS:
        rows = _DECODER.decode(_unpacked(payload))
        places: dict[type[LogRecord], list[int]] = {}
        for place, row in enumerate(rows):
            places.setdefault(type(row), []).append(place)
        return [Batch(kind, at, to_batch(kind, [rows[n] for n in at])) for kind, at in places.items()]
    kinds, found, at = b"", [], 0
    while at < len(payload):
        number, length = PART.unpack_from(payload, at)
        at += PART.size
        part = memoryview(payload)[at : at + length]
        at += length
        if number == ORDER:
            kinds = _CODEC.decompress(part, count, asbytes=True)
            continue
        columns = pa.ipc.open_stream(part).read_next_batch()
        chosen = [n for n, k in enumerate(kinds) if k == number] if kinds else range(count)
        found.append(Batch(KINDS[number], chosen, columns))
    return found


def _unpacked(payload: bytes) -> bytes:
    return _CODEC.decompress(memoryview(payload)[4:], int.from_bytes(payload[:4], "little"), asbytes=True)


def stream(batch: pa.RecordBatch) -> bytes:
    """One Arrow IPC stream of one batch."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema, options=_OPTIONS) as writer:
        writer.write_batch(batch)
    return sink.getvalue().to_pybytes()

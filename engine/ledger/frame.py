"""The frame: ``magic | length | crc32c | count | first_seq | codec | payload``, and the head of a segment before it.

Each checksum begins with the segment's random id, so that a block of another life of the same disk sectors is never
taken for one of this segment. At most one frame, the last, is not known to be on disk: the log syncs after each. So a
frame that is wrong with a right one behind it is damage, and a wrong one with nothing behind it is a torn tail.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

import google_crc32c
import msgspec

from engine.ledger.errors import LedgerError
from engine.ledger.payload import FOOTER

FORMAT_VERSION = 1
HEAD_MAGIC, FRAME_MAGIC = b"DBLEDGER", b"DBf\xa7"
HEAD = struct.Struct("<8sHHI16sQ")  # magic, format, schema, crc32c, id, first_seq
FRAME = struct.Struct("<4sIIIQI")  # magic, bytes of payload, crc32c, count, first_seq, codec
FOOT = struct.Struct("<QQI")  # count, next_seq, crc32c of the frames' checksums


class Frame(msgspec.Struct, frozen=True):
    """A whole frame whose checksum is right. ``offset`` of its first byte, ``end`` of the byte behind it."""

    offset: int
    end: int
    crc: int
    count: int
    first_seq: int
    codec: int
    payload: bytes

    @property
    def next_seq(self) -> int:
        """The sequence number behind its last record."""
        return self.first_seq + self.count


class Head(msgspec.Struct, frozen=True):
    """The first bytes of a segment."""

    id: bytes  # 16 random bytes
    first_seq: int
    schema: int


def pack_head(head: Head) -> bytes:
    """Head of a segment file."""
    crc = google_crc32c.value(HEAD.pack(HEAD_MAGIC, FORMAT_VERSION, head.schema, 0, head.id, head.first_seq))
    return HEAD.pack(HEAD_MAGIC, FORMAT_VERSION, head.schema, crc, head.id, head.first_seq)


def read_head(data: bytes, where: str) -> Head | None:
    """None: too short, or torn while it was written. LedgerError: of a later version."""
    if len(data) < HEAD.size:
        return None
    magic, version, schema, crc, segment_id, first_seq = HEAD.unpack_from(data)
    whole = HEAD.pack(magic, version, schema, 0, segment_id, first_seq)
    if magic != HEAD_MAGIC or google_crc32c.value(whole) != crc:
        return None
    if version != FORMAT_VERSION:
        what = f"ledger format {version}; this doorbuster reads {FORMAT_VERSION}"
        raise LedgerError(what, where, "it was written by another version", "read it with the doorbuster that wrote it")
    return Head(segment_id, first_seq, schema)


def pack_frame(segment_id: bytes, count: int, first_seq: int, codec: int, payload: bytes) -> bytes:
    """One frame, ready to be written."""
    bare = FRAME.pack(FRAME_MAGIC, len(payload), 0, count, first_seq, codec)
    return FRAME.pack(FRAME_MAGIC, len(payload), _crc(segment_id, bare, payload), count, first_seq, codec) + payload


def frame_at(data: bytes, offset: int, segment_id: bytes) -> Frame | None:
    """The frame at ``offset``; None where there is no whole and right one."""
    if len(data) - offset < FRAME.size:
        return None
    magic, length, crc, count, first_seq, codec = FRAME.unpack_from(data, offset)
    end = offset + FRAME.size + length
    if magic != FRAME_MAGIC or end > len(data):
        return None
    payload = data[offset + FRAME.size : end]
    bare = FRAME.pack(magic, length, 0, count, first_seq, codec)
    return Frame(offset, end, crc, count, first_seq, codec, payload) if _crc(segment_id, bare, payload) == crc else None


def frames(data: bytes, head: Head, offset: int = HEAD.size, next_seq: int | None = None) -> Iterator[Frame]:
    """Right frames from ``offset`` on, each going on where the last ended; stops at the first that does not."""
    while (frame := frame_at(data, offset, head.id)) is not None:
        if next_seq is not None and frame.first_seq != next_seq:
            return
        yield frame
        offset, next_seq = frame.end, frame.next_seq


def later_frame(data: bytes, offset: int, segment_id: bytes) -> int | None:
    """Offset of a right frame anywhere behind ``offset``; None: there is none, what stands there is a torn tail."""
    at = data.find(FRAME_MAGIC, offset + 1)
    while at >= 0:
        if frame_at(data, at, segment_id) is not None:
            return at
        at = data.find(FRAME_MAGIC, at + 1)
    return None


def pack_footer(segment_id: bytes, count: int, next_seq: int, crc_of_crcs: int) -> bytes:
    """The last frame of a sealed segment; holds no record."""
    return pack_frame(segment_id, 0, next_seq, FOOTER, FOOT.pack(count, next_seq, crc_of_crcs))


def chain(crc_of_crcs: int, crc: int) -> int:
    """The checksum over the checksums of all frames so far."""
    return google_crc32c.extend(crc_of_crcs, crc.to_bytes(4, "little"))


def _crc(segment_id: bytes, bare: bytes, payload: bytes) -> int:
    return google_crc32c.extend(google_crc32c.value(segment_id + bare), payload)

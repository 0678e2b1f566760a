"""Follows a ledger by position: whole frames only, in order, none twice, from any position on.

Of the segment that is being written the last frame is held back, for it may not be on disk yet: a frame is written
only when the one before it is. So a position is never ahead of what survives a power cut. In the writer's own process
``durable_seq`` says more exactly what is on disk. The writer knows of no reader and waits for none.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from engine.ledger import payload
from engine.ledger.errors import LedgerError
from engine.ledger.files import Files, OsFiles
from engine.ledger.frame import FRAME, HEAD, Frame, frame_at
from engine.ledger.manifest import Segment, read_manifest
from engine.ledger.payload import FOOTER, Batch
from engine.ledger.record import LogRecord
from engine.ledger.recovery import damaged, read_segment

MOST_BYTES = 8 << 20  # of payload in one poll, about


class Position(msgspec.Struct, frozen=True):
    """Where to read on: byte ``offset`` of segment number ``segment``, where the record ``next_seq`` begins."""

    segment: int
    offset: int
    next_seq: int


class Block(msgspec.Struct, frozen=True):
    """One frame: ``count`` records from ``first_seq`` on. ``after``: the position to keep once it is dealt with."""

    first_seq: int
    count: int
    codec: int
    payload: bytes
    after: Position

    def records(self) -> list[LogRecord]:
        """In order; the first has the number ``first_seq``."""
        return payload.decode(self.codec, self.count, self.payload)

    def batches(self) -> list[Batch]:
        """By kind, in columns."""
        return payload.batches(self.codec, self.count, self.payload)


class Reader:
    """``poll`` gives what is new since ``position``; None begins with the oldest record that is kept."""

    def __init__(self, folder: Path, position: Position | None = None, files: Files | None = None) -> None:
        self._folder, self._files = folder, files or OsFiles()
        self.position = position

    def poll(self, durable_seq: int | None = None) -> list[Block]:
        """New blocks, none where there is nothing new. LedgerError: damage, or records that retention took unread."""
        manifest = read_manifest(self._files, self._folder)
        if manifest is None:
            return []
        found: list[Block] = []
        for segment in manifest.segments:
            if self.position is not None and segment.number < self.position.segment:
                continue
            self._enter(segment)
            found += self._of(segment, durable_seq)
            if segment.end_bytes is None or sum(len(block.payload) for block in found) >= MOST_BYTES:
                break
        return found

    def _enter(self, segment: Segment) -> None:
        at = self.position
        if at is not None and at.segment == segment.number:
            return
        if at is not None and at.next_seq < segment.first_seq:
            what = f"records {at.next_seq} to {segment.first_seq - 1} are no longer kept"
            fix = "begin anew without a position, and keep more (keep_bytes, keep_ns)"
            raise LedgerError(what, str(self._folder), "retention took them before they were read", fix)
        self.position = Position(segment.number, HEAD.size, segment.first_seq)

    def _of(self, segment: Segment, durable_seq: int | None) -> list[Block]:
        at = self.position
        assert at is not None
        data = read_segment(self._files, self._folder, segment, at.offset)
        if segment.end_bytes is not None:
            data = data[: max(0, segment.end_bytes - at.offset)]
        found: list[Block] = []
        offset, next_seq, size = 0, at.next_seq, 0
        while size < MOST_BYTES and (frame := frame_at(data, offset, bytes.fromhex(segment.id))) is not None:
            if frame.codec == FOOTER or frame.first_seq != next_seq:
                break
            if not self._settled(segment, frame, data, durable_seq):
                break
            offset, next_seq, size = frame.end, frame.next_seq, size + len(frame.payload)
            after = Position(segment.number, at.offset + offset, next_seq)
            found.append(Block(frame.first_seq, frame.count, frame.codec, frame.payload, after))
        whole = segment.end_bytes is None or (offset == len(data) and next_seq == segment.next_seq)
        if not whole and size < MOST_BYTES:
            raise damaged(self._folder, segment, at.offset + offset)
        if found:
            self.position = found[-1].after
        return found

    @staticmethod
    def _settled(segment: Segment, frame: Frame, data: bytes, durable_seq: int | None) -> bool:
        if segment.end_bytes is not None:
            return True
        if durable_seq is not None:
            return frame.next_seq <= durable_seq
        return len(data) - frame.end >= FRAME.size  # another one follows

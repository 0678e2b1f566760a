"""Follows a ledger by position: whole frames only, in order, none twice, from any position on.

Of the segment that is being written the last frame is held back, for it may not be on disk yet: a frame is written
only when the one before it is. So a position is never ahead of what survives a power cut. In the writer's own process
``durable_seq`` says more exactly what is on disk. The writer knows of no reader and waits for none.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec

from engine.ledger import payload
from engine.ledger.errors import LedgerError
from engine.ledger.files import Files, OsFiles
from engine.ledger.frame import FRAME, HEAD, Frame, frame_at
from engine.ledger.manifest import Segment, read_manifest
from engine.ledger.payload import FOOTER, Batch
from engine.ledger.record import LogRecord
from engine.ledger.recovery import damaged, read_segment, refuse_without_manifest

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
        """New blocks, none where there is nothing new; about ``MOST_BYTES`` at once.

        LedgerError: damage, or records that retention took unread. What stands before it is given first.
        """
        found: list[Block] = []
        size = 0
        try:
            for block in self._new(durable_seq):
                found.append(block)
                self.position = block.after
                size += len(block.payload)
                if size >= MOST_BYTES:
                    break
        except LedgerError:
            if not found:
                raise
        return found

    def _new(self, durable_seq: int | None) -> Iterator[Block]:
        manifest = read_manifest(self._files, self._folder)
        if manifest is None:
            self._without_manifest()
            return
        if self.position is not None and self.position.segment >= manifest.next_number:
            raise self._foreign(f"segment {self.position.segment}", f"the next one here is {manifest.next_number}")
        for segment in manifest.segments:
            if self.position is not None and segment.number < self.position.segment:
                continue
            at = self._entry(segment)
            try:
                data = read_segment(self._files, self._folder, segment, at.offset)
            except LedgerError:
                if manifest == read_manifest(self._files, self._folder):
                    raise
                yield from self._new(durable_seq)  # retention took it since the manifest was read
                return
            yield from self._of(segment, at, data, durable_seq)
            if segment.end_bytes is None:
                return

    def _without_manifest(self) -> None:
        if self.position is not None:
            raise self._foreign(f"segment {self.position.segment}", "there is no manifest here")
        try:
            refuse_without_manifest(self._files, self._folder)
        except FileNotFoundError:
            return  # no folder yet
        except LedgerError:
            if read_manifest(self._files, self._folder) is None:  # it did not come only now
                raise

    def _entry(self, segment: Segment) -> Position:
        at = self.position
        if at is None:
            return Position(segment.number, HEAD.size, segment.first_seq)
        if at.segment == segment.number:
            return at
        if at.next_seq > segment.first_seq:
            raise self._foreign(f"record {at.next_seq}", f"segment {segment.number} begins with {segment.first_seq}")
        if at.next_seq < segment.first_seq:
            what = f"records {at.next_seq} to {segment.first_seq - 1} are no longer kept"
            fix = "begin anew without a position, and keep more (keep_bytes, keep_ns)"
            raise LedgerError(what, str(self._folder), "retention took them before they were read", fix)
        return Position(segment.number, HEAD.size, segment.first_seq)

    def _foreign(self, position: str, ledger: str) -> LedgerError:
        why = "it is of another ledger, or the end of this one was lost"
        what = f"the position to read on from, {position}, is not of this ledger: {ledger}"
        return LedgerError(what, str(self._folder), why, "begin anew without a position")

    def _of(self, segment: Segment, at: Position, data: bytes, durable_seq: int | None) -> Iterator[Block]:
        if segment.end_bytes is not None:
            data = data[: max(0, segment.end_bytes - at.offset)]
        offset, next_seq = 0, at.next_seq
        while (frame := frame_at(data, offset, bytes.fromhex(segment.id))) is not None:
            if frame.codec == FOOTER or frame.first_seq != next_seq:
                break
            if not self._settled(segment, frame, data, durable_seq):
                break
            offset, next_seq = frame.end, frame.next_seq
            after = Position(segment.number, at.offset + offset, next_seq)
            yield Block(frame.first_seq, frame.count, frame.codec, frame.payload, after)
        if segment.end_bytes is not None and (offset < len(data) or next_seq != segment.next_seq):
            raise damaged(self._folder, segment, at.offset + offset)

    @staticmethod
    def _settled(segment: Segment, frame: Frame, data: bytes, durable_seq: int | None) -> bool:
        if segment.end_bytes is not None:
            return True
        if durable_seq is not None:
            return frame.next_seq <= durable_seq
        return len(data) - frame.end >= FRAME.size  # another one follows

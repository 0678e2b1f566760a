"""The append-only log: one frame at a time, on disk when ``commit`` returns. No thread, no clock of its own.

After an error of the disk nothing is asked of that segment again: it is closed in the manifest where it was last
known to be on disk, and the caller commits the same frame once more, into a new segment. (A second fsync on the same
file may return 0 for pages that were dropped.)
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable
from pathlib import Path

from engine.ledger.files import Files
from engine.ledger.frame import HEAD, Head, chain, pack_footer, pack_frame, pack_head
from engine.ledger.manifest import Manifest, Segment, write_manifest
from engine.ledger.record import SCHEMA_VERSION
from engine.ledger.recovery import Recovered, closed, recover

LOCK = "LOCK"


class _Tail:
    """The segment that is written: how much of it is on disk."""

    __slots__ = ("crc", "end_bytes", "handle", "segment")

    def __init__(self, segment: Segment, handle: int) -> None:
        self.segment, self.handle = segment, handle
        self.end_bytes, self.crc = HEAD.size, 0


class Log:
    """The one writer of a folder. ``commit`` raises OSError and may be tried again; nothing else may come between."""

    def __init__(self, files: Files, folder: Path, segment_bytes: int, wall_ns: Callable[[], int]) -> None:
        self._files, self._folder, self._segment_bytes, self._wall_ns = files, folder, segment_bytes, wall_ns
        self._lock = files.lock(folder / LOCK)
        try:
            self.recovered: Recovered = recover(files, folder, wall_ns())
        except BaseException:
            files.close(self._lock)
            raise
        self._manifest = self.recovered.manifest
        self._next_number = self._manifest.next_number
        self._tail: _Tail | None = None
        self._failed: _Tail | None = None  # poisoned; the manifest does not say so yet
        self._leftovers: list[Path] = []  # of segments that could not begin; they go when one can
        self.next_seq = self._manifest.next_seq
        self.poisoned = 0  # segments

    @property
    def segments(self) -> tuple[Segment, ...]:
        """As the manifest names them."""
        return self._manifest.segments

    def commit(self, count: int, codec: int, payload: bytes) -> None:
        """``count`` records from ``next_seq`` on are on disk when this returns. OSError: try the same again later."""
        if self._tail is not None and self._tail.end_bytes >= self._segment_bytes:
            self.seal()
        tail = self._tail or self._begin()
        frame = pack_frame(bytes.fromhex(tail.segment.id), count, self.next_seq, codec, payload)
        try:
            self._files.write(tail.handle, frame)
            self._files.sync(tail.handle)
        except OSError:
            self._poison(tail)
            raise
        tail.end_bytes += len(frame)
        tail.crc = chain(tail.crc, int.from_bytes(frame[8:12], "little"))
        self.next_seq += count

    def seal(self) -> None:
        """The segment gets its footer and is closed; the next commit begins another."""
        tail = self._tail
        if tail is None:
            return
        segment = tail.segment
        try:
            count = self.next_seq - segment.first_seq
            self._files.write(tail.handle, pack_footer(bytes.fromhex(segment.id), count, self.next_seq, tail.crc))
            self._files.sync(tail.handle)
        except OSError:
            self._poison(tail)
            raise
        self._files.close(tail.handle)
        self._tail, self._failed = None, tail

    def retain(self, keep_bytes: int | None, keep_ns: int | None, keep_from: int | None = None) -> int:
        """Closed segments go, oldest first, while all are larger or this one is older; those from ``keep_from`` stay.

        ``keep_from``: number of the segment that a follower still reads. Returns how many went; raises OSError.
        """
        kept, now_ns = list(self._manifest.segments), self._wall_ns()
        total = sum(segment.end_bytes or 0 for segment in kept)
        gone: list[Segment] = []
        while kept and kept[0].end_bytes is not None and (keep_from is None or kept[0].number < keep_from):
            old = keep_ns is not None and kept[0].closed_ns is not None and now_ns - kept[0].closed_ns > keep_ns
            if not (old or (keep_bytes is not None and total > keep_bytes)):
                break
            total -= kept[0].end_bytes
            gone.append(kept.pop(0))
        if gone:
            self._publish(Manifest(tuple(kept), self._next_number, self._manifest.next_seq))
            for segment in gone:
                self._files.unlink(self._folder / segment.name)
        return len(gone)

    def close(self) -> None:
        """Seal, say so in the manifest, let go of the folder. Raises OSError, and has let go all the same."""
        try:
            self.seal()
            if self._failed is not None:
                self._publish(Manifest(self._closed_segments(), self._next_number, self.next_seq))
        finally:
            self._files.close(self._lock)

    def _begin(self) -> _Tail:
        number = self._next_number
        self._next_number += 1  # a number that failed is not used again: the disk may know it
        segment = Segment(number, secrets.token_hex(16), self.next_seq)
        path = self._folder / segment.name
        handle = self._files.create(path)
        try:
            self._files.write(handle, pack_head(Head(bytes.fromhex(segment.id), self.next_seq, SCHEMA_VERSION)))
            self._files.sync(handle)
            self._files.sync_folder(self._folder)
            self._leftovers.append(path)  # from here on a manifest that failed may name it
            self._publish(Manifest((*self._closed_segments(), segment), self._next_number, self.next_seq))
        except OSError:
            with contextlib.suppress(OSError):
                self._files.close(handle)
                if path not in self._leftovers:
                    self._files.unlink(path)
            raise
        self._leftovers.remove(path)
        while self._leftovers:
            with contextlib.suppress(OSError):
                self._files.unlink(self._leftovers.pop())
        self._tail, self._failed = _Tail(segment, handle), None
        return self._tail

    def _closed_segments(self) -> tuple[Segment, ...]:
        """All that hold something, the one that was written last closed where it is on disk."""
        segments, last = self._manifest.segments, self._failed
        if last is None or not segments or segments[-1].number != last.segment.number:
            return segments
        if last.end_bytes == HEAD.size:
            return segments[:-1]
        return (*segments[:-1], closed(last.segment, last.end_bytes, self.next_seq, self._wall_ns()))

    def _publish(self, manifest: Manifest) -> None:
        write_manifest(self._files, self._folder, manifest)
        self._manifest = manifest

    def _poison(self, tail: _Tail) -> None:
        self.poisoned += 1
        self._tail, self._failed = None, tail
        with contextlib.suppress(OSError):
            self._files.close(tail.handle)

"""The writing side in turns: look at the ring, perhaps take a batch, put it on disk, tell those who wait. No thread.

One frame is in work at a time. While the disk refuses it nothing more is taken: the ring fills, then drops and counts,
and the loss records come into the log when it goes on. Serving never waits for any of this.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import msgspec

from engine.ledger.log import Log
from engine.ledger.microbatch import MicroBatcher
from engine.ledger.payload import encodable, encode
from engine.ledger.ring import Ring
from engine.values import Positive


class Limits(msgspec.Struct, frozen=True):
    """How much is held, when it is written, how long it is kept. None: for ever."""

    ring_rows: Positive = 65_536  # what an outage of the disk may last before records are dropped
    reserved_rows: Positive = 4_096  # places behind these, for critical records only
    flush_rows: Positive = 2_000  # half a millisecond of one core for the columns of one frame
    window_ns: Positive = 50_000_000  # the most a kill -9 loses; a shorter one makes frames of few rows
    segment_bytes: Positive = 64 << 20
    keep_bytes: Positive | None = None
    keep_ns: Positive | None = None
    retry_ns: Positive = 250_000_000  # after the disk refused
    retry_most_ns: Positive = 5_000_000_000  # doubles up to this


class _Block(msgspec.Struct, frozen=True):
    """A frame's worth, kept in memory until it is on disk."""

    count: int
    codec: int
    payload: bytes
    covers: int  # accepted records that are on disk when this one is


class Commits:
    """``turn`` is called at the times that it returns, and when the ring wakes its thread."""

    def __init__(self, ring: Ring, log: Log, limits: Limits) -> None:
        self._ring, self._log, self._limits = ring, log, limits
        self._batcher = MicroBatcher(limits.flush_rows, limits.window_ns)
        self._block: _Block | None = None  # in work
        self._retry_ns = 0  # the pause now; 0: the disk is well
        self._again_ns = 0  # not before this
        self._waiters: deque[tuple[int, Callable[[bool], None]]] = deque()
        self.durable = 0  # accepted records that are on disk
        self.durable_seq = log.next_seq  # all below are on disk
        self.failures = 0  # commits that the disk refused
        self.last_error = ""
        self.keep_from: int | None = None  # retention leaves this segment and later ones to a follower

    def when_durable(self, target: int, call: Callable[[bool], None]) -> None:
        """``call(True)`` on the writing thread when ``target`` accepted records are on disk; ``False`` if never."""
        self._waiters.append((target, call))

    def turn(self, now_ns: int) -> int:
        """One look; returns when the next is due."""
        if self._block is None:
            ring = self._ring
            rows = len(ring) + (1 if ring.untold else 0)
            if not self._batcher.look(now_ns, rows, hurried=bool(self._waiters)):
                self._tell()
                return self._batcher.next_look_ns(now_ns)
            self.take()
            self._batcher.flushed(now_ns, len(ring))
        if now_ns >= self._again_ns:
            self._put(now_ns)
        return self._again_ns if self._block is not None else now_ns

    def take(self) -> None:
        """The next batch out of the ring, encoded."""
        found = self._ring.take(self._limits.flush_rows, self._log.next_seq)
        if found:
            try:
                codec, payload = encode(found)
            except (ValueError, TypeError, OverflowError):  # a surrogate, an integer of 65 bits
                found = encodable(found, self._log.next_seq)
                codec, payload = encode(found)
            self._block = _Block(len(found), codec, payload, self._ring.taken)

    def drain(self, now_ns: int) -> bool:
        """All that is left, in one go; False where the disk refuses."""
        while True:
            if self._block is None:
                self.take()
            if self._block is None:
                self._tell()
                return True
            if not self._put(now_ns):
                return False

    def close(self) -> None:
        """Those who still wait are told that it will not be; the log is sealed."""
        while self._waiters:
            target, call = self._waiters.popleft()
            call(target <= self.durable)
        try:
            self._log.close()
        except OSError as error:
            self._refused(error)

    @property
    def unwritten(self) -> int:
        """Accepted records that are not on disk."""
        return self._ring.accepted - self.durable

    def _put(self, now_ns: int) -> bool:
        block = self._block
        if block is None:
            return True
        segments = len(self._log.segments)
        try:
            self._log.commit(block.count, block.codec, block.payload)
        except OSError as error:
            self._refused(error)
            self._retry_ns = min(self._limits.retry_most_ns, self._retry_ns * 2 or self._limits.retry_ns)
            self._again_ns = now_ns + self._retry_ns
            return False
        self._block, self._retry_ns, self._again_ns = None, 0, 0
        self.durable, self.durable_seq = block.covers, self._log.next_seq
        self._tell()
        if len(self._log.segments) > segments:
            self._retain()
        return True

    def _retain(self) -> None:
        try:
            self._log.retain(self._limits.keep_bytes, self._limits.keep_ns, self.keep_from)
        except OSError as error:
            self._refused(error)

    def _refused(self, error: OSError) -> None:
        self.failures += 1
        self.last_error = error.strerror or str(error)

    def _tell(self) -> None:
        while self._waiters and self._waiters[0][0] <= self.durable:
            self._waiters.popleft()[1](True)

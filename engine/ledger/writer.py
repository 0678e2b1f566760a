"""The ledger as an engine holds it: ``append`` on the hot path, a thread of its own behind it.

``append`` takes under a microsecond, never waits and never raises for the disk. Whoever must know that a record is on
disk waits for it (``append_durable``, ``synced``, ``wait``); all who wait at once share one fsync. One thread appends:
the loop's.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from pathlib import Path

import msgspec

from engine.ledger.commits import Commits, Limits
from engine.ledger.errors import LedgerError, NotRecorded
from engine.ledger.files import Files, OsFiles
from engine.ledger.log import Log
from engine.ledger.record import LogRecord
from engine.ledger.recovery import Recovered
from engine.ledger.ring import Ring
from engine.units import S_NS


class LedgerStats(msgspec.Struct, frozen=True):
    """For metrics. ``accepted`` and ``durable`` count records of this life; ``next_seq`` counts all."""

    accepted: int
    durable: int
    dropped: int  # found no room; each is in a loss record, or will be
    waiting: int  # in the ring
    next_seq: int
    failures: int  # times that the disk refused
    poisoned: int  # segments given up
    last_error: str


class LedgerWriter:
    """Opens (and recovers) at once; LedgerError where that is not possible. ``close`` writes what is left."""

    def __init__(self, folder: Path, limits: Limits | None = None, files: Files | None = None) -> None:
        limits = limits or Limits()
        try:
            self._log = Log(files or OsFiles(), folder, limits.segment_bytes, time.time_ns)
        except OSError as error:
            why, fix = error.strerror or str(error), "free space, or give another folder"
            raise LedgerError("no ledger can be written", str(folder), why, fix) from None
        self._wake = threading.Event()
        self._closing = False
        self._close_by_ns = 0
        self._ring = Ring(limits.ring_rows, limits.reserved_rows, limits.flush_rows, self._wake.set)
        self._commits = Commits(self._ring, self._log, limits)
        self.append = self._ring.append  # the hot path has no frame of ours in between
        self._thread = threading.Thread(target=self._run, name="ledger", daemon=True)
        self._thread.start()

    @property
    def recovered(self) -> Recovered:
        """What the last life left: ``torn_bytes`` is worth a line on the screen."""
        return self._log.recovered

    @property
    def durable_seq(self) -> int:
        """All records below are on disk: a follower in this process reads up to it."""
        return self._commits.durable_seq

    def keep_from(self, segment: int | None) -> None:
        """Retention leaves this segment and later ones: a follower still reads them."""
        self._commits.keep_from = segment

    async def append_durable(self, record: LogRecord, critical: bool = False) -> None:
        """Returns when the record is on disk. NotRecorded: there was no room, or the ledger closed before."""
        dropped = self._ring.dropped
        self.append(record, critical)
        if self._ring.dropped > dropped:
            raise NotRecorded("the ledger's ring is full")
        await self.synced()

    async def synced(self) -> None:
        """Returns when all that was accepted until now is on disk."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[bool] = loop.create_future()

        def settle(written: bool) -> None:
            if not done.done():  # its task may have been cancelled
                done.set_result(written)

        def told(written: bool) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(settle, written)

        self._ask(told)
        if not await done:
            raise NotRecorded("the ledger was closed before the record was on disk")

    def wait(self, timeout_s: float) -> bool:
        """The same for a thread: is all that was accepted until now on disk, within ``timeout_s``?"""
        told, written = threading.Event(), [False]

        def tell(done: bool) -> None:
            written[0] = done
            told.set()

        self._ask(tell)
        return told.wait(timeout_s) and written[0]

    def stats(self) -> LedgerStats:
        """Read from any thread."""
        ring, commits = self._ring, self._commits
        return LedgerStats(
            ring.accepted, commits.durable, ring.dropped, len(ring), commits.durable_seq, commits.failures,
            self._log.poisoned, commits.last_error,
        )

    def close(self, timeout_s: float = 10.0) -> int:
        """Writes what is left, for at most ``timeout_s`` if the disk refuses. Returns the records it had to give up."""
        self._close_by_ns = time.monotonic_ns() + int(timeout_s * S_NS)
        self._closing = True
        self._wake.set()
        self._thread.join()
        return self._commits.unwritten

    def _ask(self, call) -> None:
        if not self._thread.is_alive():
            call(self._commits.unwritten == 0)
            return
        self._commits.when_durable(self._ring.accepted, call)
        self._wake.set()

    def _run(self) -> None:
        commits = self._commits
        while not self._closing:
            now_ns = time.monotonic_ns()
            until_ns = commits.turn(now_ns)
            if until_ns > now_ns:
                self._wake.wait(max(0, until_ns - time.monotonic_ns()) / S_NS)
            self._wake.clear()
        while not commits.drain(time.monotonic_ns()) and time.monotonic_ns() < self._close_by_ns:
            time.sleep(0.05)  # the disk refuses: the last chance for what is left
        commits.close()

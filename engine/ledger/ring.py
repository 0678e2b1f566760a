"""The bounded ring between the thread that appends and the thread that writes. No lock: each field has one writer.

The last ``reserved`` places are for critical records, so that ordinary ones cannot crowd out an audit. Where there is
no room a record is dropped and counted at its place; the place becomes one ``LossRecord`` a kind when the writer gets
there. It relies on ``deque.append``, ``popleft`` and a copy of a deque being atomic, which they are under the GIL.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from engine.ledger.record import KIND_OF, KINDS, LogRecord, LossRecord


class _Gap:
    """Records dropped between the accepted ``at - 1`` and ``at``, by kind; the appender counts, the writer tells."""

    __slots__ = ("at", "counts", "told")

    def __init__(self, at: int) -> None:
        self.at = at
        self.counts = [0] * len(KINDS)
        self.told = [0] * len(KINDS)


class Ring:
    """One thread appends, one takes. ``wake``: called by the appender when the ``wake_rows``-th record waits."""

    def __init__(self, capacity: int, reserved: int, wake_rows: int, wake: Callable[[], None]) -> None:
        self._rows: deque[LogRecord] = deque()
        self._gaps: deque[_Gap] = deque()
        self._ordinary, self._all = capacity, capacity + reserved
        self._wake_at, self._wake = wake_rows - 1, wake
        self.accepted = 0  # the appender's: records that got a place, ever
        self.dropped = 0  # the appender's: records that got none, ever
        self.taken = 0  # the writer's

    def __len__(self) -> int:
        return len(self._rows)

    def append(self, record: LogRecord, critical: bool = False) -> None:
        """Takes the record, or drops and counts it. Never waits."""
        waiting = len(self._rows)
        if waiting >= self._ordinary and (waiting >= self._all or not critical):
            self._drop(record)
            return
        self._rows.append(record)
        self.accepted += 1
        if waiting == self._wake_at:
            self._wake()

    def _drop(self, record: LogRecord) -> None:
        gaps = self._gaps
        if not gaps or gaps[-1].at != self.accepted:
            gaps.append(_Gap(self.accepted))
        gaps[-1].counts[KIND_OF[type(record)]] += 1
        self.dropped += 1

    @property
    def untold(self) -> bool:
        """Are there losses that no loss record tells yet?"""
        return any(gap.counts != gap.told for gap in tuple(self._gaps))

    def take(self, at_most: int, next_seq: int) -> list[LogRecord]:
        """Up to ``at_most`` records in the order of their coming, and loss records where others are missing.

        ``next_seq`` is the place in the log of the first record of the list.
        """
        rows = self._rows
        found: list[LogRecord] = []
        for _ in range(min(at_most, len(rows))):
            if self._gaps and self._gaps[0].at <= self.taken:
                found += self._told(next_seq + len(found))
            found.append(rows.popleft())
            self.taken += 1
        if not rows:
            found += self._told(next_seq + len(found))
        return found

    def _told(self, seq: int) -> list[LogRecord]:
        """Of the gaps before the next record. One that may still grow stays until a record stands behind it."""
        losses: list[LogRecord] = []
        while self._gaps and self._gaps[0].at <= self.taken:
            gap = self._gaps[0]
            closed = self.accepted > gap.at  # read before the counts: once true, they stand still
            for number, count in enumerate(gap.counts):
                if count > gap.told[number]:
                    losses.append(LossRecord(seq, count - gap.told[number], KINDS[number].__name__))
                    gap.told[number] = count
            if not closed:
                break
            self._gaps.popleft()
        return losses

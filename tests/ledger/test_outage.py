"""A disk that refuses for long: serving goes on, what finds no room is counted and told, and the log goes on after it.

Run: python -m pytest tests/ledger/test_outage.py -q
"""

from __future__ import annotations

import asyncio
import threading
from random import Random

import pytest

from engine.ledger.commits import Limits
from engine.ledger.errors import NotRecorded
from engine.ledger.frame import HEAD
from engine.ledger.manifest import read_manifest
from engine.ledger.record import ClickRecord, LogRecord, LossRecord
from engine.ledger.recovery import recover, verify
from engine.ledger.writer import LedgerWriter
from engine.records import LevelRecord
from tests.ledger.disk import Disk, Fault, SimFiles
from tests.ledger.gated import PATIENCE_S
from tests.ledger.trace import FOLDER, accounted, all_records, begun, click

LIMITS = Limits(
    ring_rows=40, reserved_rows=5, flush_rows=10, window_ns=10, segment_bytes=1_500, retry_ns=100, retry_most_ns=1_000,
)
QUICK = Limits(ring_rows=300, reserved_rows=20, flush_rows=50, window_ns=1_000_000, retry_ns=100_000,
               retry_most_ns=1_000_000, segment_bytes=5_000)
OUTAGES = [
    ("enospc", "create write"), ("enospc", "write"), ("eio", "create write sync replace sync_folder unlink"),
    ("eio", "sync"), ("eio", "create"), ("eio", "replace"), ("eio", "sync_folder"),
]


class Outage:
    """The plan of a disk on which the calls ``names`` fail while ``on``."""

    def __init__(self, fault: str, names: str) -> None:
        self._fault, self._names, self.on = fault, names.split(), False
        self._failures = threading.Semaphore(0)

    def __call__(self, number: int, name: str) -> Fault:
        if not self.on or name not in self._names:
            return None
        self._failures.release()
        return self._fault

    def failed(self, times: int) -> None:
        """Returns when so many more calls have failed."""
        for _ in range(times):
            assert self._failures.acquire(timeout=PATIENCE_S), "the disk was not asked"


class Service:
    """Offers a record a step of time and takes the ledger's turns when they are due; nothing of it waits."""

    def __init__(self, files: SimFiles, limits: Limits) -> None:
        self.ring, self.commits, self.log = begun(files, limits)
        self.offered: list[tuple[LogRecord, bool]] = []
        self.refused_ns: list[int] = []
        self._now_ns = self._due_ns = 0

    def serve(self, count: int) -> None:
        for _ in range(count):
            number = len(self.offered)
            record = LevelRecord(number, 1) if number % 9 == 0 else click(number)
            dropped = self.ring.dropped
            self.ring.append(record, critical=number % 9 == 0)
            self.offered.append((record, self.ring.dropped == dropped))
            self._now_ns += 7
            failures = self.commits.failures
            if self._now_ns >= self._due_ns or len(self.ring) == LIMITS.flush_rows:
                self._due_ns = self.commits.turn(self._now_ns)
            if self.commits.failures > failures:
                self.refused_ns.append(self._now_ns)

    def drain(self) -> None:
        assert self.commits.drain(self._now_ns)


@pytest.mark.parametrize(("fault", "names"), OUTAGES)
def test_a_long_outage_drops_counts_and_ends(fault: str, names: str) -> None:
    disk, outage = Disk(Random(1)), Outage(fault, names)
    files = SimFiles(disk, outage)
    service = Service(files, LIMITS)
    ring, commits = service.ring, service.commits
    service.serve(100)
    assert ring.dropped == 0 and commits.failures == 0
    for _ in range(3):
        outage.on = True
        dropped, durable = ring.dropped, 0
        service.serve(60)  # whole frames may still go into an open segment
        durable = commits.durable
        service.serve(2_000)
        assert commits.durable == durable and ring.dropped - dropped > 1_500
        assert len(ring) == LIMITS.ring_rows + LIMITS.reserved_rows, "full to the last reserved place"
        assert ring.accepted + ring.dropped == len(service.offered)
        outage.on = False
        service.serve(300)
        service.drain()
        assert commits.durable == ring.accepted and commits.unwritten == 0 and not ring.untold
    commits.close()
    found = all_records(SimFiles(disk))
    accounted(found, service.offered)
    losses = [record for record in found if isinstance(record, LossRecord)]
    assert sum(loss.count for loss in losses) == ring.dropped
    assert {loss.kind for loss in losses} == {"ClickRecord", "LevelRecord"}
    assert len(found) == ring.accepted + len(losses) == service.log.next_seq
    disk.cut_power()  # and all of it is on disk
    recover(SimFiles(disk), FOLDER, 0)
    assert all_records(SimFiles(disk)) == found
    for segment in read_manifest(SimFiles(disk), FOLDER).segments:
        assert verify(SimFiles(disk), FOLDER, segment)


def test_the_disk_is_asked_again_with_growing_pauses_up_to_the_longest() -> None:
    outage = Outage("enospc", "create write")
    service = Service(SimFiles(Disk(Random(1)), outage), LIMITS)
    service.serve(100)
    for _ in range(2):  # and from the shortest again after it was well
        outage.on = True
        service.refused_ns.clear()
        service.serve(2_000)
        pauses = [b - a for a, b in zip(service.refused_ns, service.refused_ns[1:], strict=False)]
        due = [100, 200, 400, 800] + [1_000] * (len(pauses) - 4)
        assert len(pauses) > 10
        assert all(want <= pause < want + 7 for pause, want in zip(pauses, due, strict=True))
        outage.on = False
        service.serve(300)


@pytest.mark.parametrize(("fault", "names"), OUTAGES)
def test_an_outage_leaves_no_files_behind(fault: str, names: str) -> None:
    disk, outage = Disk(Random(2)), Outage(fault, names)
    service = Service(SimFiles(disk, outage), LIMITS)
    service.serve(100)
    outage.on = True
    service.serve(2_000)
    assert len(service.refused_ns) > 10
    if "write" in names and "unlink" not in names:
        there = sum(path.suffix == ".ledger" for path in disk.names)
        assert there <= len(service.log.segments), "a full disk is not asked to keep what is no use"
    outage.on = False
    service.serve(300)
    service.drain()
    service.commits.close()
    named = {segment.name for segment in read_manifest(SimFiles(disk), FOLDER).segments}
    assert {path.name for path in disk.names} == {*named, "MANIFEST"}


def test_only_one_segment_is_given_up_however_long_it_lasts() -> None:
    outage = Outage("eio", "sync")
    disk = Disk(Random(3))
    service = Service(SimFiles(disk, outage), LIMITS)
    service.serve(95)
    outage.on = True
    service.serve(2_000)
    outage.on = False
    service.serve(300)
    service.drain()
    assert service.log.poisoned == 1
    assert all(segment.end_bytes is None or segment.end_bytes > HEAD.size for segment in service.log.segments)


def test_the_engine_serves_through_a_full_disk_and_those_who_wait_are_told_in_the_end() -> None:
    disk, outage = Disk(Random(4)), Outage("enospc", "create write")
    writer = LedgerWriter(FOLDER, QUICK, SimFiles(disk, outage))
    offered: list[tuple[LogRecord, bool]] = []

    def append(number: int, critical: bool = False) -> None:
        dropped = writer.stats().dropped
        writer.append(click(number), critical)
        offered.append((click(number), writer.stats().dropped == dropped))

    async def serve() -> None:
        await writer.append_durable(click(0))
        offered.append((click(0), True))
        outage.on = True
        waiting = asyncio.create_task(writer.append_durable(click(1), critical=True))
        await asyncio.to_thread(outage.failed, 1)  # from here on the writer takes nothing more
        offered.append((click(1), True))
        for number in range(2, 5_000):
            append(number, critical=number % 10 == 0)
        stats = writer.stats()
        assert stats.durable == 1 and stats.accepted == 2 + 320 and not waiting.done()
        assert stats.accepted + stats.dropped == 5_000 and stats.waiting == 320
        with pytest.raises(NotRecorded, match="full"):
            await writer.append_durable(click(5_000), critical=True)
        offered.append((click(5_000), False))
        await asyncio.to_thread(outage.failed, 5)
        outage.on = False
        await asyncio.wait_for(waiting, PATIENCE_S)
        for number in range(5_001, 5_200):
            append(number)
        await asyncio.wait_for(writer.synced(), PATIENCE_S)

    asyncio.run(serve())
    assert writer.close() == 0
    stats, found = writer.stats(), all_records(SimFiles(disk))
    accounted(found, offered)
    lost = sum(record.count for record in found if isinstance(record, LossRecord))
    assert lost == stats.dropped > 0 and stats.durable == stats.accepted
    assert sum(isinstance(record, ClickRecord) for record in found) == stats.accepted
    assert stats.last_error == "No space left on device" and stats.failures >= 6

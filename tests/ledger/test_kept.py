"""What is kept and for how long, and what a person reads where something is damaged or gone.

Run: python -m pytest tests/ledger/test_kept.py -q
"""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from engine.ledger.commits import Limits
from engine.ledger.errors import LedgerError
from engine.ledger.frame import HEAD, frame_at
from engine.ledger.log import Log
from engine.ledger.manifest import MANIFEST, Manifest, read_manifest, write_manifest
from engine.ledger.payload import encode
from engine.ledger.reader import Position, Reader
from engine.ledger.recovery import recover, verify
from tests.ledger.disk import Disk, SimFiles
from tests.ledger.test_crash import damage
from tests.ledger.trace import FOLDER, all_records, begun, click

SEGMENTS, FRAMES, ROWS = 6, 3, 4


class Clock:
    def __init__(self) -> None:
        self.now_ns = 0

    def __call__(self) -> int:
        return self.now_ns


def ledger(disk: Disk, clock: Clock) -> Log:
    """Segments of three frames of four rows; segment ``n`` was closed at ``n`` and a bit, the last is open."""
    log = Log(SimFiles(disk), FOLDER, 1 << 20, clock)
    for number in range(SEGMENTS):
        log.seal()
        for _ in range(FRAMES):
            clock.now_ns = number * 1_000
            log.commit(ROWS, *encode([click(log.next_seq + n) for n in range(ROWS)]))
    return log


def numbers(disk: Disk) -> list[int]:
    return [segment.number for segment in read_manifest(SimFiles(disk), FOLDER).segments]


def files_match(disk: Disk) -> None:
    named = {segment.name for segment in read_manifest(SimFiles(disk), FOLDER).segments}
    assert {path.name for path in disk.names} == {*named, MANIFEST}


def four_parts(error: LedgerError, where: str) -> None:
    assert error.what and where in error.where and error.why and error.fix


def test_the_oldest_go_while_all_are_larger_and_the_open_one_stays() -> None:
    disk = Disk(Random(0))
    log = ledger(disk, Clock())
    each = log.segments[0].end_bytes or 0
    assert log.retain(1 << 30, None) == 0 and log.retain(None, None) == 0
    assert log.retain(5 * each, None) == 0  # of the closed ones
    assert log.retain(4 * each, None) == 1 and numbers(disk) == [1, 2, 3, 4, 5]
    assert log.retain(2 * each, None) == 2 and numbers(disk) == [3, 4, 5]
    assert log.retain(1, None) == 2 and numbers(disk) == [5]
    files_match(disk)
    log.close()
    disk.cut_power()
    assert all_records(SimFiles(disk)) == [click(n) for n in range(60, 72)]
    again = Log(SimFiles(disk), FOLDER, 1 << 20, Clock())
    assert again.next_seq == 72 and again.retain(1, None) == 1
    again.commit(1, *encode([click(72)]))  # numbers go on where nothing is left
    assert numbers(disk) == [6] and again.segments[0].first_seq == 72


def test_the_older_ones_go_by_age() -> None:
    disk, clock = Disk(Random(0)), Clock()
    log = ledger(disk, clock)
    closed = [segment.closed_ns for segment in log.segments]
    assert closed == [0, 1_000, 2_000, 3_000, 4_000, None] or closed == [1_000, 2_000, 3_000, 4_000, 5_000, None]
    clock.now_ns = (closed[2] or 0) + 10_000
    assert log.retain(None, 10_000) == 2 and numbers(disk) == [2, 3, 4, 5]
    clock.now_ns += 1
    assert log.retain(None, 10_000) == 1 and numbers(disk) == [3, 4, 5]
    files_match(disk)


@pytest.mark.parametrize("limits", [(1, None), (None, 1)], ids=["size", "age"])
def test_a_follower_keeps_what_it_has_not_read(limits: tuple[int | None, int | None]) -> None:
    disk, clock = Disk(Random(0)), Clock()
    log = ledger(disk, clock)
    clock.now_ns = 1 << 40
    assert log.retain(*limits, keep_from=0) == 0
    assert log.retain(*limits, keep_from=2) == 2 and numbers(disk) == [2, 3, 4, 5]
    reader = Reader(FOLDER, Position(2, HEAD.size, 24), SimFiles(disk))
    assert sum(block.count for block in reader.poll(log.next_seq)) == 48
    assert log.retain(*limits, keep_from=99) == 3 and numbers(disk) == [5]


def test_commits_retain_when_a_segment_begins_and_leave_a_follower_its_own() -> None:
    disk = Disk(Random(0))
    ring, commits, log = begun(SimFiles(disk), Limits(flush_rows=5, segment_bytes=400, keep_bytes=2_000))
    commits.keep_from = 0

    def write(count: int) -> None:
        for _ in range(count):
            ring.append(click(ring.accepted))
        assert commits.drain(0)

    write(500)
    assert len(log.segments) > 30
    commits.keep_from = None
    write(200)
    total = sum(segment.end_bytes or 0 for segment in log.segments)
    assert 1_000 < total <= 2_000 + 800 and 2 < len(log.segments) < 8
    files_match(disk)
    kept = log.segments[0].first_seq
    commits.close()
    assert all_records(SimFiles(disk)) == [click(n) for n in range(kept, 700)]


def test_retention_that_the_disk_refuses_costs_no_record() -> None:
    for seed in range(20):
        rng, disk = Random(seed), Disk(Random(seed))

        def plan(number: int, name: str, rng: Random = rng) -> str | None:
            return "eio" if name in ("replace", "sync_folder", "unlink") and rng.random() < 0.2 else None

        ring, commits, _ = begun(SimFiles(disk, plan), Limits(flush_rows=5, segment_bytes=400, keep_bytes=1_000))
        for number in range(300):
            ring.append(click(number))
            while commits.durable < ring.accepted:
                commits.drain(0)
        assert commits.failures > 3
        disk.cut_power()
        recover(SimFiles(disk), FOLDER, 0)
        found = all_records(SimFiles(disk))
        assert found == [click(n) for n in range(300 - len(found), 300)] and len(found) >= 5, seed
        files_match(disk)


def test_a_reader_that_was_too_slow_is_told_what_it_missed() -> None:
    disk = Disk(Random(0))
    log = ledger(disk, Clock())
    reader = Reader(FOLDER, files=SimFiles(disk))
    reader = Reader(FOLDER, reader.poll()[0].after, SimFiles(disk))
    log.retain(1, None, keep_from=3)
    for _ in range(2):  # and it stays so
        with pytest.raises(LedgerError, match="records 4 to 35 are no longer kept") as told:
            reader.poll()
        four_parts(told.value, str(FOLDER))
    anew = Reader(FOLDER, files=SimFiles(disk))
    assert anew.poll(log.next_seq)[0].first_seq == 36


class Racing(SimFiles):
    """Retention runs right after the reader has read the manifest."""

    log: Log | None = None

    def read(self, path: Path, offset: int = 0) -> bytes:
        data = super().read(path, offset)
        if path.name == MANIFEST and self.log is not None:
            log, self.log = self.log, None
            log.retain(1, None, keep_from=3)
        return data


def test_retention_between_the_manifest_and_the_segment_is_no_damage() -> None:
    for position, outcome in ((None, 36), (Position(3, HEAD.size, 36), 36), (Position(1, HEAD.size, 12), None)):
        disk = Disk(Random(0))
        files = Racing(disk)
        files.log = log = ledger(disk, Clock())
        reader = Reader(FOLDER, position, files)
        if outcome is None:
            with pytest.raises(LedgerError, match="records 12 to 35 are no longer kept"):
                reader.poll(log.next_seq)
        else:
            assert reader.poll(log.next_seq)[0].first_seq == outcome


def test_damage_in_a_sealed_segment_is_told_after_what_stands_before_it() -> None:
    for seed in range(200):
        rng, disk = Random(seed), Disk(Random(seed))
        ledger(disk, Clock()).close()
        segment = read_manifest(SimFiles(disk), FOLDER).segments[number := rng.randrange(SEGMENTS)]
        inode = disk.names[FOLDER / segment.name]
        ends = [HEAD.size]
        for _ in range(FRAMES):
            ends.append(frame_at(inode.now, ends[-1], bytes.fromhex(segment.id)).end)
        hit = rng.randrange(FRAMES)
        inode.now = damage(inode.now[: ends[-1]], rng, ends[hit], ends[hit + 1])
        before = (number * FRAMES + hit) * ROWS
        recover(SimFiles(disk), FOLDER, 0)  # opening reads no closed segment
        reader, seen = Reader(FOLDER, files=SimFiles(disk)), []
        told = []
        while len(told) < 2:
            try:
                seen += [record for block in reader.poll() for record in block.records()]
            except LedgerError as error:
                told.append(error.what)
                four_parts(error, segment.name)
        assert seen == [click(n) for n in range(before)]
        assert told == [f"damaged at byte {ends[hit]}"] * 2
        with pytest.raises(LedgerError, match=f"damaged at byte {ends[hit]}\n"):
            verify(SimFiles(disk), FOLDER, segment)


def test_a_segment_that_is_gone_is_told() -> None:
    disk = Disk(Random(0))
    ledger(disk, Clock()).close()
    disk.change(FOLDER / "segment-00000002.ledger", None)
    reader = Reader(FOLDER, files=SimFiles(disk))
    assert sum(block.count for block in reader.poll()) == 24
    with pytest.raises(LedgerError, match="a segment is missing") as told:
        reader.poll()
    four_parts(told.value, "segment-00000002.ledger")


def both(disk: Disk, match: str, where: str) -> None:
    """Opening it to write and to read."""
    with pytest.raises(LedgerError, match=match) as told:
        recover(SimFiles(disk), FOLDER, 0)
    four_parts(told.value, where)
    with pytest.raises(LedgerError, match=match) as told:
        Reader(FOLDER, files=SimFiles(disk)).poll()
    four_parts(told.value, where)


def test_a_damaged_manifest_is_told() -> None:
    for seed in range(200):
        disk = Disk(Random(seed))
        ledger(disk, Clock()).close()
        inode = disk.names[FOLDER / MANIFEST]
        inode.now = damage(inode.now, Random(seed), 0, len(inode.now))
        both(disk, "the manifest is damaged", MANIFEST)


def test_a_missing_manifest_is_told_and_no_segment_is_taken_away() -> None:
    disk = Disk(Random(0))
    ledger(disk, Clock()).close()
    disk.change(FOLDER / MANIFEST, None)
    before = dict(disk.names)
    both(disk, "the manifest is missing", MANIFEST)
    assert disk.names == before
    with pytest.raises(LedgerError, match="not of this ledger: there is no manifest here") as told:
        Reader(FOLDER, Position(0, HEAD.size, 0), SimFiles(disk)).poll()
    four_parts(told.value, str(FOLDER))


def test_a_later_version_is_told() -> None:
    disk = Disk(Random(0))
    ledger(disk, Clock()).close()
    manifest = read_manifest(SimFiles(disk), FOLDER)
    write_manifest(SimFiles(disk), FOLDER, Manifest(manifest.segments, manifest.next_number, version=9))
    both(disk, "manifest version 9", MANIFEST)


@pytest.mark.parametrize("position", [Position(6, HEAD.size, 72), Position(3, HEAD.size, 60)], ids=["later", "ahead"])
def test_a_position_of_another_ledger_is_told(position: Position) -> None:
    disk = Disk(Random(0))
    log = ledger(disk, Clock())
    log.retain(1, None, keep_from=4)
    with pytest.raises(LedgerError, match="is not of this ledger") as told:
        Reader(FOLDER, position, SimFiles(disk)).poll()
    four_parts(told.value, str(FOLDER))

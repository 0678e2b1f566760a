"""Following a ledger while it is written: whole frames, each record once, across rotation, restarts and crashes.

Run: python -m pytest tests/ledger/test_reader.py -q
"""

from __future__ import annotations

import threading
from pathlib import Path
from random import Random

import msgspec
import pytest

from engine.ledger.commits import Limits
from engine.ledger.files import OsFiles
from engine.ledger.frame import FRAME, HEAD, frame_at
from engine.ledger.manifest import read_manifest
from engine.ledger.reader import Position, Reader
from engine.ledger.record import LogRecord
from engine.ledger.recovery import recover
from engine.ledger.writer import LedgerWriter
from tests.ledger.disk import Died, Disk, SimFiles
from tests.ledger.test_crash import CALLS, TRACE, Life
from tests.ledger.trace import FOLDER, all_records, begun, click, mixed

LIMITS = Limits(flush_rows=5, window_ns=1, segment_bytes=1_000)


class Follower:
    """Reads what is new and checks that it goes on where the last block ended; its cursor goes through JSON."""

    def __init__(self, folder: Path, files: SimFiles | OsFiles) -> None:
        self._folder, self._files = folder, files
        self._reader = Reader(folder, files=files)
        self._cursor = b"null"
        self.seen: list[LogRecord] = []

    def poll(self, durable_seq: int | None = None) -> int:
        before = len(self.seen)
        for block in self._reader.poll(durable_seq):
            assert block.first_seq == len(self.seen)
            self.seen += block.records()
            assert block.after.next_seq == len(self.seen) == block.first_seq + block.count
            self._cursor = msgspec.json.encode(block.after)
        return len(self.seen) - before

    def restart(self) -> None:
        position = msgspec.json.decode(self._cursor, type=Position | None)
        self._reader = Reader(self._folder, position, self._files)


@pytest.mark.parametrize("same_process", [True, False])
def test_it_follows_a_thread_that_writes_and_rotates(tmp_path: Path, same_process: bool) -> None:
    rows = mixed(Random(5), 12_000)
    writer = LedgerWriter(tmp_path, Limits(flush_rows=100, window_ns=200_000, segment_bytes=30_000))
    follower, done = Follower(tmp_path, OsFiles()), threading.Event()

    def append() -> None:
        for number, row in enumerate(rows):
            writer.append(row)
            if number % 500 == 499:
                assert writer.wait(60)
        done.set()

    thread = threading.Thread(target=append)
    thread.start()
    polls = 0
    while not done.is_set():
        durable = writer.durable_seq
        polls += follower.poll(durable if same_process else None) > 0
        assert len(follower.seen) <= writer.durable_seq
        if polls % 3 == 0:
            follower.restart()
    thread.join()
    if same_process:
        follower.poll(writer.durable_seq)
        assert follower.seen == rows, "all of it before the segment is closed"
    assert writer.close() == 0
    while follower.poll():
        pass
    assert follower.seen == rows and polls > 5
    assert len(read_manifest(OsFiles(), tmp_path).segments) > 5


@pytest.mark.parametrize("same_process", [True, False])
def test_at_every_byte_of_the_open_segment_it_gives_whole_frames_only(same_process: bool) -> None:
    disk = Disk(Random(0))
    ring, commits, _ = begun(SimFiles(disk), LIMITS)
    for number in range(20):
        ring.append(click(number))
    assert commits.drain(0)
    segment = read_manifest(SimFiles(disk), FOLDER).segments[-1]
    inode = disk.names[FOLDER / segment.name]
    whole, ends = inode.now, [HEAD.size]
    while (frame := frame_at(whole, ends[-1], bytes.fromhex(segment.id))) is not None:
        ends.append(frame.end)
    assert len(ends) == 5
    follower = Follower(FOLDER, SimFiles(disk))
    for size in range(len(whole) + 1):
        inode.now = whole[:size]
        follower.poll(10 if same_process else None)
        needed = 0 if same_process else FRAME.size  # another one has begun
        frames = sum(size >= end + needed for end in ends[1:])
        assert len(follower.seen) == 5 * (min(frames, 2) if same_process else frames), size
    assert follower.seen == [click(n) for n in range(10 if same_process else 15)]


def test_a_cursor_that_is_kept_gives_each_record_once() -> None:
    for seed in range(30):
        rng, disk, rows = Random(seed), Disk(Random(seed)), mixed(Random(seed), 200)
        ring, commits, log = begun(SimFiles(disk), LIMITS)
        follower, at = Follower(FOLDER, SimFiles(disk)), 0
        while at < len(rows):
            count = rng.randint(1, 20)
            for row in rows[at : at + count]:
                ring.append(row)
            at += count
            assert commits.drain(0)
            if rng.random() < 0.1:
                log.seal()
            if rng.random() < 0.5:
                follower.poll(log.next_seq if rng.random() < 0.5 else None)
            if rng.random() < 0.3:
                follower.restart()
        commits.close()
        while follower.poll():
            follower.restart()
        assert follower.seen == rows, seed
        assert len(log.segments) > 5


@pytest.mark.parametrize("power", [True, False], ids=["power", "kill"])
@pytest.mark.parametrize("fault", ["before", "half", "after"])
def test_it_is_never_ahead_of_what_a_crash_leaves_and_goes_on_after_it(fault: str, power: bool) -> None:
    """It polls before every call to the disk, up to the one at which the writer dies."""
    for number in range(len(CALLS)):
        disk = Disk(Random(number))
        follower = Follower(FOLDER, SimFiles(disk))

        def plan(n: int, name: str, follower: Follower = follower, last: int = number) -> str | None:
            follower.poll()
            return fault if n == last else None

        with pytest.raises(Died):
            Life().run(SimFiles(disk, plan))
        follower.poll()
        if power:
            disk.cut_power()
        recover(SimFiles(disk), FOLDER, 0)
        kept = all_records(SimFiles(disk))
        assert follower.seen == kept[: len(follower.seen)], f"call {number} {CALLS[number]}"
        ring, commits, _ = begun(SimFiles(disk), LIMITS)
        ring.append(click(999))
        assert commits.drain(0)
        commits.close()
        follower.restart()
        while follower.poll():
            pass
        assert follower.seen == [*kept, click(999)] and kept == TRACE[: len(kept)]


def test_a_poll_is_bounded_and_the_next_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.ledger.reader.MOST_BYTES", 500)
    disk, rows = Disk(Random(0)), mixed(Random(0), 300)
    ring, commits, _ = begun(SimFiles(disk), LIMITS)
    for row in rows:
        ring.append(row)
    assert commits.drain(0)
    commits.close()
    follower, polls = Follower(FOLDER, SimFiles(disk)), []
    while found := follower.poll():
        polls.append(found)
    assert follower.seen == rows and len(polls) > 20 and max(polls) < 60


def test_where_there_is_no_ledger_yet_there_is_nothing_new(tmp_path: Path) -> None:
    reader = Reader(tmp_path / "later")
    assert reader.poll() == []
    writer = LedgerWriter(tmp_path / "later")
    assert reader.poll() == []
    writer.append(click(0))
    assert writer.wait(60) and reader.poll() == [] and writer.close() == 0
    assert [block.records() for block in reader.poll()] == [[click(0)]]

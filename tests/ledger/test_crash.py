"""Death, a full disk and a failing disk at every call of a life that writes, rotates and closes.

Run: python -m pytest tests/ledger/test_crash.py -q
"""

from __future__ import annotations

from random import Random

import pytest

from engine.ledger.commits import Commits, Limits
from engine.ledger.errors import LedgerError
from engine.ledger.frame import HEAD, frame_at
from engine.ledger.log import Log
from engine.ledger.manifest import read_manifest
from engine.ledger.recovery import recover
from tests.ledger.disk import Died, Disk, Fault, SimFiles
from tests.ledger.trace import FOLDER, all_records, begun, click

LIMITS = Limits(flush_rows=3, window_ns=1, segment_bytes=300, retry_ns=1, retry_most_ns=1)
TRACE = [click(n) for n in range(36)]


class Life:
    """Appends the trace three records a turn; ``acked`` is what a waiter would have been told."""

    def __init__(self) -> None:
        self.acked = 0

    def run(self, files: SimFiles) -> Commits:
        ring, commits, _ = begun(files, LIMITS)
        now_ns = 0
        for at in range(0, len(TRACE), 3):
            for record in TRACE[at : at + 3]:
                ring.append(record)
            while commits.durable < ring.accepted:
                now_ns = max(now_ns + 1, commits.turn(now_ns))
                self.acked = commits.durable
        commits.close()
        return commits


def calls_of_a_life() -> list[str]:
    files = SimFiles(Disk(Random(0)))
    Life().run(files)
    return files.calls


CALLS = calls_of_a_life()


def at(number: int, fault: Fault):
    return lambda n, name: fault if n == number else None


def test_a_quiet_life_rotates_and_replaces_the_manifest() -> None:
    assert CALLS.count("create") >= 8 and CALLS.count("replace") >= 4
    disk = Disk(Random(0))
    Life().run(SimFiles(disk))
    assert all_records(SimFiles(disk)) == TRACE


@pytest.mark.parametrize("power", [True, False], ids=["power", "kill"])
@pytest.mark.parametrize("fault", ["before", "half", "after"])
def test_death_at_any_call_loses_nothing_acknowledged(fault: str, power: bool) -> None:
    for number in range(len(CALLS)):
        for seed in range(3):
            disk, life = Disk(Random(seed)), Life()
            with pytest.raises(Died):
                life.run(SimFiles(disk, at(number, fault)))
            if power:
                disk.cut_power()
            where = f"call {number} {CALLS[number]} seed {seed}"
            log = Log(SimFiles(disk), FOLDER, 300, lambda: 0)
            found = all_records(SimFiles(disk))
            assert found == TRACE[: len(found)] and len(found) >= life.acked, where
            assert log.next_seq == len(found), where
            log.close()
            ring, commits, _ = begun(SimFiles(disk), LIMITS)
            ring.append(click(999))
            assert commits.drain(0), where
            disk.cut_power()
            recover(SimFiles(disk), FOLDER, 0)
            assert all_records(SimFiles(disk)) == [*found, click(999)], where


def test_death_while_recovering_loses_nothing_either() -> None:
    for number in range(8):
        for fault in ("before", "half", "after"):
            for seed in range(10):
                disk, life = Disk(Random(seed)), Life()
                with pytest.raises(Died):
                    life.run(SimFiles(disk, at(len(CALLS) // 2 + seed, "half")))
                disk.cut_power()
                try:
                    recover(SimFiles(disk, at(number, fault)), FOLDER, 0)
                except Died:
                    disk.cut_power()
                recover(SimFiles(disk), FOLDER, 0)
                found = all_records(SimFiles(disk))
                assert found == TRACE[: len(found)] and len(found) >= life.acked


@pytest.mark.parametrize("fault", ["enospc", "eio"])
def test_a_disk_that_refuses_once_costs_no_record(fault: str) -> None:
    for number in range(len(CALLS)):
        disk = Disk(Random(number))
        commits = Life().run(SimFiles(disk, at(number, fault)))
        assert commits.durable == len(TRACE)
        disk.cut_power()
        recover(SimFiles(disk), FOLDER, 0)
        assert all_records(SimFiles(disk)) == TRACE, f"call {number} {CALLS[number]}"


def open_log(rng: Random) -> tuple[Disk, list[int]]:
    """One segment that is still written, and the offsets of its frames."""
    disk = Disk(rng)
    ring, commits, _ = begun(SimFiles(disk), Limits(flush_rows=3, window_ns=1))
    for record in TRACE:
        ring.append(record)
    assert commits.drain(0)
    segment = read_manifest(SimFiles(disk), FOLDER).segments[-1]
    data, offsets = disk.names[FOLDER / segment.name].now, [HEAD.size]
    while (frame := frame_at(data, offsets[-1], bytes.fromhex(segment.id))) is not None:
        offsets.append(frame.end)
    return disk, offsets


def damage(data: bytes, rng: Random, begin: int, end: int) -> bytes:
    """Cut, one bit, or a sector of zeros, somewhere in ``begin`` to ``end``; always a change."""
    place = rng.randrange(begin, end)
    match rng.randrange(3):
        case 0 if end == len(data) and place > begin:
            return data[:place]
        case 1:
            stop = min(place + 512, end)
            zeroed = data[:place] + bytes(stop - place) + data[stop:]
            if zeroed != data:
                return zeroed
    return data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]


def test_a_thousand_damaged_tails_are_all_seen_and_cut() -> None:
    for seed in range(1_000):
        rng = Random(seed)
        disk, offsets = open_log(rng)
        inode = next(i for p, i in disk.names.items() if p.suffix == ".ledger")
        inode.now = inode.durable = damage(inode.now, rng, offsets[-2], offsets[-1])
        found = recover(SimFiles(disk), FOLDER, 0)
        assert found.torn_bytes == len(inode.now) - offsets[-2], seed
        assert all_records(SimFiles(disk)) == TRACE[:-3], seed


def test_damage_before_the_tail_is_refused_with_its_offset() -> None:
    for seed in range(300):
        rng = Random(seed)
        disk, offsets = open_log(rng)
        hit = rng.randrange(len(offsets) - 2)
        inode = next(i for p, i in disk.names.items() if p.suffix == ".ledger")
        inode.now = damage(inode.now, rng, offsets[hit], offsets[hit + 1])
        with pytest.raises(LedgerError, match=rf"damaged at byte {offsets[hit]}\n") as told:
            recover(SimFiles(disk), FOLDER, 0)
        assert told.value.where and told.value.why and told.value.fix

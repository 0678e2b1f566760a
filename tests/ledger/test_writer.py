"""The ledger as an engine holds it: its thread, those who wait for it, its end, and a second one on the same folder.

Run: python -m pytest tests/ledger/test_writer.py -q
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from engine.ledger.commits import Limits
from engine.ledger.errors import LedgerError, NotRecorded
from engine.ledger.files import OsFiles
from engine.ledger.writer import LedgerWriter
from tests.ledger.appender import BATCH
from tests.ledger.disk import Disk, SimFiles
from tests.ledger.gated import PATIENCE_S, GatedFiles
from tests.ledger.trace import FOLDER, all_records, click, mixed

QUICK = Limits(window_ns=1_000_000)
NEVER = Limits(window_ns=1 << 60)  # nothing is written that nobody waits for


def test_who_waits_is_told_when_it_is_on_disk(tmp_path: Path) -> None:
    writer = LedgerWriter(tmp_path / "new" / "ledger", NEVER)

    async def serve() -> None:
        await writer.append_durable(click(0))
        assert writer.durable_seq == 1
        writer.append(click(1))
        writer.append(click(2))
        await writer.synced()
        assert writer.durable_seq == 3
        await writer.synced()  # nothing new: at once

    asyncio.run(serve())
    writer.append(click(3))
    assert writer.wait(PATIENCE_S) and writer.durable_seq == 4
    assert writer.close() == 0
    assert all_records(OsFiles(), tmp_path / "new" / "ledger") == [click(n) for n in range(4)]


def test_what_nobody_waits_for_is_written_within_the_window_all_the_same(tmp_path: Path) -> None:
    files = GatedFiles()
    writer = LedgerWriter(tmp_path, QUICK, files)
    files.shut()
    writer.append(click(0))
    files.reached()  # without a waiter
    files.open()
    assert writer.wait(PATIENCE_S) and writer.close() == 0


def test_all_who_wait_at_once_share_one_sync_and_none_is_told_before_it(tmp_path: Path) -> None:
    files = GatedFiles()
    writer = LedgerWriter(tmp_path, NEVER, files)

    async def serve() -> None:
        await writer.append_durable(click(0))
        files.shut()
        tasks = [asyncio.create_task(writer.append_durable(click(1)))]
        await asyncio.to_thread(files.reached)
        tasks += [asyncio.create_task(writer.append_durable(click(n))) for n in range(2, 50)]
        await asyncio.sleep(0)  # each has appended and waits
        syncs = files.syncs
        assert not any(task.done() for task in tasks) and writer.durable_seq == 1
        files.open()
        await asyncio.gather(*tasks)
        assert files.syncs == syncs + 1

    asyncio.run(serve())
    assert writer.close() == 0
    assert all_records(OsFiles(), tmp_path) == [click(n) for n in range(50)]


def test_a_waiter_that_is_cancelled_hurts_nobody(tmp_path: Path) -> None:
    files = GatedFiles()
    writer = LedgerWriter(tmp_path, NEVER, files)

    complaints: list[object] = []

    async def serve() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        files.shut()
        tasks = [asyncio.create_task(writer.append_durable(click(n))) for n in range(3)]
        await asyncio.to_thread(files.reached)
        tasks[1].cancel()
        with pytest.raises(asyncio.CancelledError):
            await tasks[1]
        files.open()
        await asyncio.gather(tasks[0], tasks[2])
        await writer.append_durable(click(3))

    asyncio.run(serve())
    assert not complaints, "a result for a task that is gone"
    assert writer.close() == 0
    assert all_records(OsFiles(), tmp_path) == [click(n) for n in range(4)]  # what was accepted is not taken back


def test_a_loop_that_is_closed_while_it_waits_hurts_nobody(tmp_path: Path) -> None:
    files = GatedFiles()
    writer = LedgerWriter(tmp_path, NEVER, files)

    async def leave() -> asyncio.Task[None]:
        files.shut()
        task = asyncio.create_task(writer.append_durable(click(0)))
        await asyncio.to_thread(files.reached)
        return task

    assert asyncio.run(leave()).cancelled()
    files.open()
    writer.append(click(1))
    assert writer.wait(PATIENCE_S) and writer.close() == 0
    assert all_records(OsFiles(), tmp_path) == [click(0), click(1)]


def test_wait_gives_up_in_time_and_the_record_is_written_later(tmp_path: Path) -> None:
    files = GatedFiles()
    writer = LedgerWriter(tmp_path, NEVER, files)
    files.shut()
    writer.append(click(0))
    assert not writer.wait(0.01)
    files.open()
    assert writer.wait(PATIENCE_S) and writer.close() == 0


def test_close_writes_all_that_is_left_and_a_second_close_nothing(tmp_path: Path) -> None:
    rows = mixed(Random(1), 5_000)
    writer = LedgerWriter(tmp_path, NEVER)
    for row in rows:
        writer.append(row)
    assert writer.close() == 0 and writer.close() == 0
    stats = writer.stats()
    assert (stats.accepted, stats.durable, stats.waiting, stats.dropped) == (5_000, 5_000, 0, 0)
    assert all_records(OsFiles(), tmp_path) == rows


def test_close_on_a_full_disk_returns_what_it_gave_up_and_tells_who_waits() -> None:
    disk = Disk(Random(0))
    writer = LedgerWriter(FOLDER, NEVER, SimFiles(disk))

    async def serve() -> None:
        await writer.append_durable(click(0))
        disk.full = True
        waiting = asyncio.create_task(writer.append_durable(click(1)))
        await asyncio.sleep(0)
        for number in range(2, 8):
            writer.append(click(number))
        assert await asyncio.to_thread(writer.close, 0.0) == 7
        with pytest.raises(NotRecorded, match="closed"):
            await waiting
        with pytest.raises(NotRecorded, match="closed"):
            await writer.append_durable(click(8))

    asyncio.run(serve())
    assert not writer.wait(0) and writer.stats().last_error == "No space left on device"
    disk.full = False
    again = LedgerWriter(FOLDER, NEVER, SimFiles(disk))
    assert again.durable_seq == 1
    again.append(click(1))
    assert again.close() == 0
    assert all_records(SimFiles(disk)) == [click(0), click(1)]


def test_a_full_ring_refuses_a_durable_record_at_once(tmp_path: Path) -> None:
    files = GatedFiles()
    writer = LedgerWriter(tmp_path, Limits(ring_rows=2, reserved_rows=1, flush_rows=2, window_ns=1 << 60), files)

    async def serve() -> None:
        files.shut()
        first = asyncio.create_task(writer.append_durable(click(0)))
        await asyncio.to_thread(files.reached)
        rest = [asyncio.create_task(writer.append_durable(click(n))) for n in (1, 2)]
        await asyncio.sleep(0)
        with pytest.raises(NotRecorded, match="full"):
            await writer.append_durable(click(3))
        rest.append(asyncio.create_task(writer.append_durable(click(4), critical=True)))
        await asyncio.sleep(0)
        files.open()
        await asyncio.gather(first, *rest)

    asyncio.run(serve())
    assert writer.close() == 0
    found = all_records(OsFiles(), tmp_path)
    assert [record for record in found if type(record) is type(click(0))] == [click(n) for n in (0, 1, 2, 4)]
    assert writer.stats().dropped == 1 and len(found) == 5


def test_a_second_writer_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    writer = LedgerWriter(tmp_path, QUICK)
    writer.append(click(0))
    with pytest.raises(LedgerError, match="another process writes this ledger") as told:
        LedgerWriter(tmp_path, QUICK)
    assert told.value.where == str(tmp_path) and told.value.why and told.value.fix
    other = subprocess.run([sys.executable, "-m", "tests.ledger.appender", str(tmp_path)], capture_output=True,
                           text=True, timeout=PATIENCE_S, check=False)
    assert other.returncode != 0 and "another process writes this ledger" in other.stderr and not other.stdout
    writer.append(click(1))
    assert writer.close() == 0
    LedgerWriter(tmp_path, QUICK).close()  # free again
    assert all_records(OsFiles(), tmp_path) == [click(0), click(1)]


def test_a_folder_that_cannot_be_is_a_mistake_in_four_parts(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LedgerError, match="no ledger can be written") as told:
        LedgerWriter(tmp_path / "file", QUICK)
    assert told.value.where == str(tmp_path / "file") and told.value.why and told.value.fix


def test_records_survive_many_lives(tmp_path: Path) -> None:
    rows = mixed(Random(2), 700)
    for at in range(0, len(rows), 100):
        writer = LedgerWriter(tmp_path, QUICK)
        assert writer.durable_seq == at and writer.recovered.torn_bytes == 0
        for row in rows[at : at + 100]:
            writer.append(row)
        assert writer.close() == 0
        assert all_records(OsFiles(), tmp_path) == rows[: at + 100]


@pytest.mark.parametrize("seed", range(5))
def test_a_real_kill_loses_nothing_that_was_acknowledged(tmp_path: Path, seed: int) -> None:
    """Two lives on one folder, each killed with SIGKILL after some acknowledgements, while it appends on."""
    rng, acknowledged = Random(seed), 0
    for _ in range(2):
        command = [sys.executable, "-m", "tests.ledger.appender", str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            begun = int(child.stdout.readline())
            assert begun >= acknowledged
            for _ in range(rng.randint(1, 60)):
                acknowledged = int(child.stdout.readline())
            child.kill()
            for line in child.stdout:  # told before it died
                acknowledged = int(line)
        assert child.returncode == -9 and acknowledged >= begun + BATCH
        before = all_records(OsFiles(), tmp_path)  # what a follower saw, the last frame held back
        assert before == [click(n) for n in range(len(before))]
        writer = LedgerWriter(tmp_path, QUICK)
        found = all_records(OsFiles(), tmp_path)
        assert found == [click(n) for n in range(len(found))]
        assert len(found) >= max(acknowledged, len(before)) and writer.durable_seq == len(found)
        assert writer.close() == 0

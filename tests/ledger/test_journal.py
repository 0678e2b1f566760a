"""The journal on disk: what a reader finds of it, and when.

Run: python -m pytest tests/ledger -q
"""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.config import ReplicaConfig
from engine.errors import JournalError
from engine.events import Plan
from engine.ledger.journal import FLUSH_NS, JournalWriter, ReplicaEntry, open_journal


def writer(path: Path) -> JournalWriter:
    return JournalWriter(path, "replica", ReplicaConfig(index=3), b"key")


def serials(path: Path) -> list[int]:
    return [entry.serial for entry in open_journal(path).entries()]


def test_what_was_written_is_read_again(tmp_path: Path) -> None:
    journal = writer(tmp_path / "new" / "j.ndjson")
    journal.write(5, Plan(), [])
    journal.close()
    journal.close()
    journal.flush()
    found = open_journal(tmp_path / "new" / "j.ndjson")
    assert found.config() == ReplicaConfig(index=3)
    assert found.torn_bytes == 0
    assert list(found.entries()) == [ReplicaEntry(0, 5, Plan(), [])]


def test_a_line_reaches_the_disk_within_the_interval_of_its_writers_time(tmp_path: Path) -> None:
    path = tmp_path / "j.ndjson"
    journal = writer(path)
    for at_ns in (0, 1, FLUSH_NS - 1):
        journal.write(at_ns, Plan(), [])
    assert serials(path) == [0], "no flush a line"
    journal.write(FLUSH_NS, Plan(), [])
    assert serials(path) == [0, 1, 2, 3]
    journal.write(FLUSH_NS + 1, Plan(), [])
    journal.write(9 * FLUSH_NS, Plan(), [])
    assert serials(path) == [0, 1, 2, 3, 4, 5]
    journal.write(9 * FLUSH_NS + 1, Plan(), [])
    journal.flush()
    assert serials(path) == [0, 1, 2, 3, 4, 5, 6]
    journal.close()


def test_a_torn_line_is_cut_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "j.ndjson"
    journal = writer(path)
    for at_ns in range(3):
        journal.write(at_ns, Plan(), [])
    journal.close()
    whole = path.read_bytes()
    path.write_bytes(whole[:-4])
    last = len(whole) - (whole[:-1].rfind(b"\n") + 1)
    assert open_journal(path).torn_bytes == last - 4
    assert serials(path) == [0, 1]


def test_nothing_is_written_over(tmp_path: Path) -> None:
    path = tmp_path / "j.ndjson"
    writer(path).close()
    before = path.read_bytes()
    with pytest.raises(JournalError, match="no journal can be written") as caught:
        writer(path)
    assert caught.value.where == str(path)
    assert "exists" in caught.value.why
    assert path.read_bytes() == before

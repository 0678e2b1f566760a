"""Records to append, and what a log may hold of them: the oracle of the crash tests."""

from __future__ import annotations

from pathlib import Path
from random import Random

from engine.ledger.commits import Commits, Limits
from engine.ledger.files import Files
from engine.ledger.log import Log
from engine.ledger.reader import Block, Reader
from engine.ledger.record import ClickRecord, FeedbackRecord, LogRecord, LossRecord, StepRecord
from engine.ledger.ring import Ring
from engine.records import BackgroundRecord, BreakerRecord, LevelRecord, RequestRecord

FOLDER = Path("ledger")


def click(number: int) -> ClickRecord:
    return ClickRecord(f"event-{number}", number, "shop", "click", item="x" * (number % 40))


def request(rng: Random, number: int) -> RequestRecord:
    served = rng.random() < 0.8
    return RequestRecord(
        f"r{number:06d}", f"tenant-{rng.randrange(20)}", rng.choice(["chat", "fraud"]), number * 1_000_003,
        "served" if served else "rejected", rng.randrange(5), rng.choice(["exact", "model"]) if served else None,
        None if served else "overloaded", rng.randrange(300), queue_ns=rng.randrange(10**9),
        ttft_ns=rng.randrange(10**9) if served else None, e2e_ns=rng.randrange(10**10),
        cosine_millionths=rng.randrange(10**6) if rng.random() < 0.1 else None,
        replica=rng.randrange(2) if served else None, answer_id=rng.randbytes(16).hex() if served else "",
    )


def mixed(rng: Random, count: int) -> list[LogRecord]:
    """All kinds, in a random order."""
    others = [
        lambda n: StepRecord(n, 0, n, forward_ns=rng.randrange(10**8)),
        lambda n: LevelRecord(n, rng.randrange(5), "chat", 7),
        lambda n: BreakerRecord(n, "replica-0", "closed", "open", "slow"), click,
        lambda n: BackgroundRecord(n, "audit", f"r{n}", "chat", True, rng.choice([True, False, None])),
        lambda n: FeedbackRecord(f"f{n}", n, "shop", f"r{n}", "bad", reason="wrong \N{SNOWMAN}"),
        lambda n: LossRecord(n, 3, "StepRecord"),
    ]
    return [request(rng, n) if rng.random() < 0.5 else rng.choice(others)(n) for n in range(count)]


def begun(files: Files, limits: Limits) -> tuple[Ring, Commits, Log]:
    """The writing side without its thread."""
    log = Log(files, FOLDER, limits.segment_bytes, lambda: 0)
    ring = Ring(limits.ring_rows, limits.reserved_rows, limits.flush_rows, lambda: None)
    return ring, Commits(ring, log, limits), log


def all_blocks(files: Files, folder: Path = FOLDER) -> list[Block]:
    reader, found = Reader(folder, files=files), []
    while new := reader.poll():
        found += new
    return found


def all_records(files: Files, folder: Path = FOLDER) -> list[LogRecord]:
    found: list[LogRecord] = []
    first = None
    for block in all_blocks(files, folder):
        first = block.first_seq if first is None else first
        assert block.first_seq == first + len(found), "a hole, or a record twice"
        records = block.records()
        assert len(records) == block.count
        found += records
    return found


def accounted(log: list[LogRecord], offered: list[tuple[LogRecord, bool]], place: int = 0) -> None:
    """``offered``: each record, and was there room. A loss record stands where as many of its kind were dropped.

    ``place``: the number of the first entry of ``log``.
    """
    lost: list[str] = []
    rest = iter(log)
    entry = next(rest, None)
    for record, room in offered:
        if not room:
            lost.append(type(record).__name__)
            continue
        entry, place = _losses(entry, rest, lost, place)
        assert entry == record
        entry, place, lost = next(rest, None), place + 1, []
    entry, place = _losses(entry, rest, lost, place)
    assert entry is None


def _losses(entry, rest, lost: list[str], place: int):
    told: dict[str, int] = {}
    first = place
    while isinstance(entry, LossRecord):
        assert first <= entry.from_seq <= place
        told[entry.kind] = told.get(entry.kind, 0) + entry.count
        entry, place = next(rest, None), place + 1
    assert told == {kind: lost.count(kind) for kind in set(lost)}
    return entry, place

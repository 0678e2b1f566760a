"""Any order of appending, flushing, rotating, following, faults of the disk, deaths and power cuts.

Run: python -m pytest tests/ledger/test_machine.py -q
Four mutations that it did not see: the tail not rewritten at recovery, no sync of the folder, leftovers unlinked too
early, a retry in the same segment. It has no retention.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from random import Random

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.ledger.commits import Limits
from engine.ledger.frame import HEAD
from engine.ledger.manifest import read_manifest
from engine.ledger.reader import Reader
from engine.ledger.record import LogRecord, LossRecord
from engine.ledger.recovery import recover, verify
from engine.records import LevelRecord
from tests.ledger.disk import Died, Disk, Fault, SimFiles
from tests.ledger.trace import FOLDER, accounted, all_records, begun, click

LIMITS = Limits(
    ring_rows=12, reserved_rows=3, flush_rows=4, window_ns=20, segment_bytes=600, retry_ns=10, retry_most_ns=80,
)
CALLS = ["create", "write", "sync", "replace", "sync_folder", "unlink"]


class LedgerMachine(RuleBasedStateMachine):
    """``kept``: what the log held when it was last opened; ``offered``: what came since, and was there room."""

    def __init__(self) -> None:
        super().__init__()
        self.disk = Disk(Random(0))
        self.kept: list[LogRecord] = []
        self.numbers = 0
        self.seen: list[LogRecord] = []
        self.faults: dict[str, Fault] = {}
        self.reader = Reader(FOLDER, files=SimFiles(self.disk))
        self._open()

    def _open(self) -> None:
        self.faults, self.dies_at, self.dies = {}, -1, "before"
        self.files = SimFiles(self.disk, self._plan)
        self.ring, self.commits, self.log = begun(self.files, LIMITS)
        self.offered: list[tuple[LogRecord, bool]] = []
        self.acknowledged, self.now_ns = 0, 0

    def _plan(self, number: int, name: str) -> Fault:
        return self.dies if number == self.dies_at else self.faults.get(name)

    def _do(self, step: Callable[[], object]) -> None:
        try:
            step()
        except Died:
            self._crash(power=self.disk.rng.random() < 0.5)

    @rule(count=st.integers(1, 9), critical=st.booleans(), level=st.booleans())
    def append(self, count: int, critical: bool, level: bool) -> None:
        for _ in range(count):
            record = LevelRecord(self.numbers, 1) if level else click(self.numbers)
            self.numbers += 1
            dropped = self.ring.dropped
            self.ring.append(record, critical)
            self.offered.append((record, self.ring.dropped == dropped))

    @rule(later_ns=st.integers(0, 100))
    def turn(self, later_ns: int) -> None:
        self.now_ns += later_ns
        self._do(lambda: self.commits.turn(self.now_ns))

    @rule()
    def flush(self) -> None:
        self._do(lambda: self.commits.drain(self.now_ns))

    @rule()
    def wait(self) -> None:
        target, commits = self.ring.accepted, self.commits

        def told(written: bool) -> None:
            if written and commits is self.commits:
                assert commits.durable >= target
                self.acknowledged = max(self.acknowledged, target)

        commits.when_durable(target, told)

    @rule()
    def rotate(self) -> None:
        with contextlib.suppress(OSError):
            self._do(self.log.seal)

    @rule(own=st.booleans())
    def follow(self, own: bool) -> None:
        for block in self.reader.poll(self.commits.durable_seq if own else None):
            assert block.first_seq == len(self.seen)
            self.seen += block.records()
            assert len(self.seen) <= self.commits.durable_seq
            self.reader = Reader(FOLDER, block.after, SimFiles(self.disk))

    @rule(fault=st.sampled_from(["enospc", "eio"]), names=st.sets(st.sampled_from(CALLS), min_size=1))
    def refuse(self, fault: str, names: set[str]) -> None:
        self.faults = dict.fromkeys(names, fault)

    @precondition(lambda self: self.faults)
    @rule()
    def be_well(self) -> None:
        self.faults = {}

    @rule(calls=st.integers(0, 12), where=st.sampled_from(["before", "half", "after"]), seed=st.integers(0, 1 << 16))
    def die_later(self, calls: int, where: str, seed: int) -> None:
        self.disk.rng.seed(seed)
        self.dies_at, self.dies = len(self.files.calls) + calls, where

    @rule(power=st.booleans(), seed=st.integers(0, 1 << 16))
    def die(self, power: bool, seed: int) -> None:
        self.disk.rng.seed(seed)
        self._crash(power)

    def _crash(self, power: bool) -> None:
        if power:
            self.disk.cut_power()
        durable = max(self.acknowledged, self.commits.durable)
        while True:  # and it may die while it recovers
            number = self.disk.rng.randrange(16)
            where = self.disk.rng.choice(["before", "half", "after"])
            try:
                recover(SimFiles(self.disk, lambda n, name, at=number, die=where: die if n == at else None), FOLDER, 0)
                break
            except Died:
                self.disk.cut_power()
        found = all_records(SimFiles(self.disk))
        self._check(found, durable)
        assert found[: len(self.seen)] == self.seen, "a follower was ahead"
        self.kept = found
        self._open()
        assert self.log.next_seq == len(found)

    def _check(self, found: list[LogRecord], durable: int) -> None:
        """What is there is a beginning of what was offered, with at least ``durable`` records of this life."""
        begin = len(self.kept)
        assert found[:begin] == self.kept
        new = found[begin:]
        while new and isinstance(new[-1], LossRecord):
            new.pop()  # of a gap that may have grown since
        count = sum(not isinstance(record, LossRecord) for record in new)
        assert count >= durable
        upto = [place for place, (_, room) in enumerate(self.offered, 1) if room][:count]
        accounted(new, self.offered[: upto[-1] if upto else 0], begin)

    @rule()
    def close_and_open(self) -> None:
        self.faults, self.dies_at = {}, -1
        assert self.commits.drain(self.now_ns)
        self.commits.close()
        assert self.commits.unwritten == 0 and not self.ring.untold
        self.disk.cut_power()
        found = all_records(SimFiles(self.disk))
        assert found[: len(self.kept)] == self.kept
        accounted(found[len(self.kept) :], self.offered, len(self.kept))
        named = read_manifest(SimFiles(self.disk), FOLDER)
        for segment in named.segments if named is not None else ():
            assert verify(SimFiles(self.disk), FOLDER, segment)
            assert (segment.end_bytes or 0) > HEAD.size
        self.kept = found
        self._open()

    @invariant()
    def counters_fit(self) -> None:
        ring, commits = self.ring, self.commits
        assert ring.accepted + ring.dropped == len(self.offered)
        assert self.acknowledged <= commits.durable <= ring.taken <= ring.accepted
        assert len(ring) <= LIMITS.ring_rows + LIMITS.reserved_rows

    def teardown(self) -> None:
        self.close_and_open()


TestLedgerMachine = LedgerMachine.TestCase
TestLedgerMachine.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)

"""Who is waited for until when, against a list that is looked through from end to end.

Run: python -m pytest tests/policy/test_patience.py -q
Mutations it caught: an ended one due; due at another instant; a rescued one due all the same; an older stranding's end.
"""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from engine.policy.patience import Patience


class PatienceMachine(RuleBasedStateMachine):
    """Times are small, so that many fall together."""

    def __init__(self) -> None:
        super().__init__()
        self.patience = Patience()
        self.now_ns = self.rid = 0
        self.open: dict[int, int] = {}
        self.stranded: dict[int, int] = {}

    @rule(within_ns=st.integers(1, 9))
    def begin(self, within_ns: int) -> None:
        self.patience.begin(self.rid, self.now_ns + within_ns)
        self.open[self.rid] = self.now_ns + within_ns
        self.rid += 1

    @rule(pick=st.integers(0, 9))
    def end(self, pick: int) -> None:
        if self.open:
            rid = list(self.open)[pick % len(self.open)]
            self.patience.end(rid)
            del self.open[rid]
            self.stranded.pop(rid, None)

    @rule(pick=st.integers(0, 9), within_ns=st.integers(1, 9))
    def strand(self, pick: int, within_ns: int) -> None:
        free = [rid for rid in self.open if rid not in self.stranded]
        if free:
            rid = free[pick % len(free)]
            self.patience.strand(rid, self.now_ns + within_ns)
            self.stranded[rid] = self.now_ns + within_ns

    @rule()
    def rescue(self) -> None:
        assert self.patience.rescue() == list(self.stranded)
        self.stranded.clear()

    @rule(ns=st.integers(0, 5))
    def time_passes(self, ns: int) -> None:
        self.now_ns += ns
        want = [(at_ns, rid, False) for rid, at_ns in self.open.items() if at_ns <= self.now_ns]
        want += [(at_ns, rid, True) for rid, at_ns in self.stranded.items() if at_ns <= self.now_ns]
        got: list[tuple[int, bool]] = []
        while due := self.patience.pop_due(self.now_ns):
            got.append(due)
        assert got == [(rid, stranded) for _, rid, stranded in sorted(want)]
        for rid, stranded in got:
            if stranded:
                del self.stranded[rid]
        for rid in {rid for rid, stranded in got if not stranded}:
            self.patience.end(rid)
            del self.open[rid]
            self.stranded.pop(rid, None)

    @invariant()
    def same(self) -> None:
        self.patience.check()
        assert self.patience.next_ns() == min([*self.open.values(), *self.stranded.values()], default=None)


TestPatience = PatienceMachine.TestCase


def test_who_was_rescued_and_waits_again_waits_for_the_new_end() -> None:
    patience = Patience()
    patience.begin(7, 100)
    patience.strand(7, 10)
    assert patience.rescue() == [7]
    patience.strand(7, 20)
    assert (patience.next_ns(), patience.pop_due(19)) == (20, None)
    assert (patience.pop_due(20), patience.pop_due(20)) == ((7, True), None)

"""A gateway's picture of its replicas against one that keeps every message and every submission for ever.

Mutations it caught:
- acknowledged: one too few; only the first; by another replica; own submissions not noted, or not forgotten
- the youngest of a class instead of the oldest, in what was heard or in what was sent; old words kept beside the last
"""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.events import Arrive, Pressure, Waiting
from engine.policy.flights import Flight
from engine.policy.pressure import Pressures

CLASSES = ["fraud", "chat", "reco"]


def flight_of(sid: int, name: str, sent_ns: int, replica: int = 0) -> Flight:
    return Flight(sid, replica, None, b"", 1, name, sent_ns, Arrive(sid, "r", "t", name, 0, 5, 4))


def said(acked_sid: int, replica: int = 0, **oldest_ns: int) -> Pressure:
    waiting = tuple(Waiting(name, 1, sent_ns) for name, sent_ns in oldest_ns.items())
    return Pressure(replica, acked_sid, running=0, waiting=waiting)


class PressuresMachine(RuleBasedStateMachine):
    """Submissions leave, replicas speak late, in any order of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.pressures = Pressures()
        self.sent: list[Flight] = []
        self.left: list[int] = []  # started or ended
        self.words: list[Pressure] = []
        self.now_ns = 0

    @rule(name=st.sampled_from(CLASSES), ns=st.integers(0, 5), replica=st.integers(0, 1))
    def submit(self, name: str, ns: int, replica: int) -> None:
        self.now_ns += ns
        self.sent.append(flight_of(len(self.sent), name, self.now_ns, replica))
        self.pressures.sent(self.sent[-1])

    @precondition(lambda self: self.sent)
    @rule(back=st.integers(0, 4))
    def start_or_end(self, back: int) -> None:
        sid = max(0, len(self.sent) - 1 - back)
        self.left.append(sid)
        self.pressures.forget(sid)

    @rule(
        replica=st.integers(0, 1), behind=st.integers(0, 4),
        waiting=st.dictionaries(st.sampled_from(CLASSES), st.integers(0, 30), max_size=3),
    )
    def speak(self, replica: int, behind: int, waiting: dict[str, int]) -> None:
        acked_sid = len(self.sent) - 1 - behind
        self.words.append(said(acked_sid, replica, **waiting))
        self.pressures.hear(self.words[-1])

    @invariant()
    def same(self) -> None:
        want: dict[str, int] = {}
        instants = [(f.traffic_class, f.sent_ns) for f in self.sent if self.unheard(f)]
        for replica in (0, 1):
            for word in [w for w in self.words if w.replica == replica][-1:]:
                instants += [(w.traffic_class, w.oldest_ns) for w in word.waiting]
        for name, sent_ns in instants:
            want[name] = min(sent_ns, want.get(name, sent_ns))
        assert self.pressures.oldest_ns() == want

    @rule(replica=st.integers(0, 1))
    def die(self, replica: int) -> None:
        self.words = [said(word.acked_sid, replica) if word.replica == replica else word for word in self.words]
        self.pressures.lose(replica)

    def unheard(self, flight: Flight) -> bool:
        """No replica speaks for another."""
        words = [word for word in self.words if word.replica == flight.replica]
        return flight.sid not in self.left and all(word.acked_sid < flight.sid for word in words)


PressuresMachine.TestCase.settings = settings(max_examples=120, stateful_step_count=30, deadline=None)
TestPressures = PressuresMachine.TestCase


def test_the_dead_keep_nobody_waiting() -> None:
    pressures = Pressures()
    pressures.hear(said(0, 0, chat=50))
    pressures.hear(said(-1, 1, chat=70))
    pressures.sent(flight_of(1, "chat", 100))
    pressures.lose(0)
    pressures.lose(5)  # never heard of
    assert pressures.oldest_ns() == {"chat": 70}
    pressures.lose(1)
    assert pressures.oldest_ns() == {"chat": 100}, "it was sent, and has not ended yet"


def test_a_burst_shows_before_the_replica_has_spoken() -> None:
    pressures = Pressures()
    pressures.hear(said(-1))
    for sid in range(3):
        pressures.sent(flight_of(sid, "chat", 100 + sid))
    assert pressures.oldest_ns() == {"chat": 100}
    pressures.forget(0)
    assert pressures.oldest_ns() == {"chat": 101}
    pressures.hear(said(1, chat=90))  # it has seen two, and an older one waits there
    assert pressures.oldest_ns() == {"chat": 90}
    pressures.hear(said(1))
    assert pressures.oldest_ns() == {"chat": 102}
    pressures.hear(said(2))
    assert pressures.oldest_ns() == {}

"""Whose turn a session is, against a naive list of who holds what; and the merge of two versions.

invariant: mutation that it caught
- one holder: begin without looking at the holder
- late: finish without the token
- merge: acknowledged ones taken up again; what the store lost not restored
"""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.policy.sessions import NEW, Begun, Conflict, Repeat, Session, SessionRules, Turn
from engine.redis_config import SessionsConfig
from engine.units import MS_NS

CONFIG = SessionsConfig(max_turns=4, session_bytes=40, turn_ms=10)
RULES = SessionRules(CONFIG)
WIDE = SessionRules(SessionsConfig(max_turns=1000))


class SessionMachine(RuleBasedStateMachine):
    """Requests that begin, finish, give up, stay away and come back late."""

    def __init__(self) -> None:
        super().__init__()
        self.session, self.now_ns, self.count = NEW, 0, 0
        self.out: dict[str, str] = {}  # token -> idempotency key, of all that have not ended
        self.holder, self.until_ns = "", 0
        self.said: list[Turn] = []

    @rule(ms=st.integers(0, 12))
    def later(self, ms: int) -> None:
        self.now_ns += ms * MS_NS

    @rule(key=st.sampled_from(["", "", "k1", "k2"]))
    def begin(self, key: str) -> None:
        self.count += 1
        token = f"t{self.count}"
        decided = RULES.begin(self.session, self.now_ns, token, key)
        answered = [turn for turn in self.session.turns if key and turn.key == key]
        held = bool(self.holder) and self.now_ns < self.until_ns
        if answered:
            assert decided == Repeat(answered[0])
        elif held:
            assert decided == Conflict(self.until_ns - self.now_ns)
        else:
            assert isinstance(decided, Begun) and decided.session.version == self.session.version + 1
            self.session, self.holder, self.until_ns = decided.session, token, self.now_ns + 10 * MS_NS
            self.out[token] = key

    @precondition(lambda self: self.out)
    @rule(data=st.data(), size=st.integers(0, 50), ends=st.booleans())
    def end(self, data: st.DataObject, size: int, ends: bool) -> None:
        token = data.draw(st.sampled_from(sorted(self.out)))
        turn = Turn(token, b"q" * size, b"a", self.out.pop(token))
        new = RULES.finish(self.session, token, turn) if ends else RULES.abandon(self.session, token)
        assert (new is not None) == (token == self.holder), "only the holder, and only once"
        if new is not None:
            assert new.version == self.session.version + 1
            self.session, self.holder = new, ""
            self.said += [turn] if ends else []

    @invariant()
    def bounded(self) -> None:
        RULES.check(self.session)
        kept = len(self.session.turns)
        assert list(self.session.turns) == self.said[len(self.said) - kept:], "the last ones, in order"
        assert self.session.let_go + kept == len(self.said)
        assert not self.said or kept


TestSessionMachine = SessionMachine.TestCase

TURNS = st.lists(st.integers(0, 9), unique=True, max_size=6)


def session(ids: list[int], version: int, origin: str = "o") -> Session:
    return Session(version, origin, tuple(Turn(str(n), b"q", b"a") for n in ids))


@given(shared=TURNS, local=TURNS, data=st.data(), versions=st.tuples(*[st.integers(1, 9)] * 3), other=st.booleans(),
       emptied=st.booleans())
def test_the_merge_rule(
    shared: list[int], local: list[int], data: st.DataObject, versions: tuple[int, int, int], other: bool,
    emptied: bool,
) -> None:
    if emptied:
        shared, versions = [], (0, *versions[1:])
    kept = NEW if emptied else session(shared, versions[0])
    copy = session(local, versions[1], "p" if other else "o")
    missing = frozenset(map(str, data.draw(st.lists(st.sampled_from(local)) if local else st.just([]))))
    one = WIDE.merge(kept, copy, versions[2], missing, "fresh")
    behind = versions[0] < versions[2] or other or emptied
    wanted = [str(n) for n in local if n not in shared and (behind or str(n) in missing)]
    assert [turn.turn_id for turn in one.turns] == [*map(str, shared), *wanted]
    assert one.version > max(versions[:2]) if wanted else one is kept
    assert one.origin == ("fresh" if emptied else "o") or not wanted
    assert WIDE.merge(one, copy, versions[2], missing, "fresh").turns == one.turns, "a second time changes nothing"
    WIDE.check(one)


@given(base=TURNS, left=TURNS, right=TURNS)
def test_two_gateways_bring_the_same_turns_in_either_order(base: list[int], left: list[int], right: list[int]) -> None:
    """Both went on alone from one version."""
    both = [f"l{n}" for n in left], [f"r{n}" for n in right]
    copies = [Session(5, "o", tuple(Turn(i, b"", b"") for i in (*map(str, base), *ids))) for ids in both]
    start = session(base, 4)
    ends = []
    for order in ((0, 1), (1, 0)):
        one = start
        for n in order:
            one = WIDE.merge(one, copies[n], 4, frozenset(both[n]), "fresh")
        ends.append([turn.turn_id for turn in one.turns])
        assert ends[-1] == [*map(str, base), *both[order[0]], *both[order[1]]]
    assert sorted(ends[0]) == sorted(ends[1])

"""Whose turn a session is, what its next version holds, and how two versions become one. Nothing is kept here.

A session is a value with a version. Whoever wants to change it makes the next version of what was read, and the store
takes that only if nobody else was first (compare and set), so every decision is made by one pure function on bytes that
everybody agrees on. A turn is held by at most one request: others hear of a conflict. A holder that stays away longer
than ``turn_ns`` has lost its turn: what it brings late is refused, for its token is no longer the session's.

The merge rule, for when the store was away or has lost what it had: the shared turns stay as and where they are; behind
them come, in their own order, the local ones that the store never acknowledged, or all of the local ones where the
store fell behind (a lower version than it once took, or another origin: it was emptied). A turn that is there already
is the same turn.
"""

from __future__ import annotations

from engine.redis_config import SessionsConfig
from engine.values import Struct


class Turn(Struct):
    """A client's new messages, and the answer to them. ``turn_id``: unique; ``key``: the client's word, "" = none."""

    turn_id: str
    asked: bytes
    answer: bytes
    key: str = ""

    @property
    def size_bytes(self) -> int:
        """What it takes of ``session_bytes``."""
        return len(self.asked) + len(self.answer)


class Session(Struct):
    """One version. ``version`` 0 = nothing was ever written; ``origin`` = of whoever wrote the first."""

    version: int = 0
    origin: str = ""
    turns: tuple[Turn, ...] = ()
    let_go: int = 0  # turns that were too many
    holder: str = ""  # token of the request that has the turn; "" = nobody
    until_ns: int = 0  # by the store's clock: then the turn is anybody's


class Begun(Struct):
    """The turn is yours, once ``session`` is written."""

    session: Session


class Conflict(Struct):
    """Another request has the turn: 409 ``session_conflict``."""

    retry_after_ns: int


class Repeat(Struct):
    """The idempotency key was answered before: by this turn."""

    turn: Turn


NEW = Session()


class SessionRules:
    """The functions, with their limits."""

    def __init__(self, config: SessionsConfig) -> None:
        self._turn_ns, self._max_turns, self._max_bytes = config.turn_ns, config.max_turns, config.session_bytes

    def begin(self, session: Session, now_ns: int, token: str, key: str = "") -> Begun | Conflict | Repeat:
        """A request comes. ``token``: unique; ``key``: its idempotency key."""
        assert token, "a holder has a token"
        if key and (turn := next((turn for turn in session.turns if turn.key == key), None)):
            return Repeat(turn)
        if session.holder and now_ns < session.until_ns and session.holder != token:
            return Conflict(session.until_ns - now_ns)
        origin = session.origin or token
        return Begun(Session(
            session.version + 1, origin, session.turns, session.let_go, token, now_ns + self._turn_ns
        ))

    def finish(self, session: Session, token: str, turn: Turn) -> Session | None:
        """The turn's answer is there. None: somebody else has taken the turn meanwhile."""
        if session.holder != token:
            return None
        return self._with(session, (*session.turns, turn))

    def abandon(self, session: Session, token: str) -> Session | None:
        """The request ended without an answer. None: the turn is not its own, nothing is to be done."""
        if session.holder != token:
            return None
        return self._with(session, session.turns)

    def behind(self, shared: Session, local: Session, acknowledged: int) -> bool:
        """Whether the store has lost what it once had. ``acknowledged``: the highest version that it is known to have
        taken, 0 = none."""
        return bool(acknowledged) and (shared.version < acknowledged or shared.origin != local.origin)

    def merge(
        self, shared: Session, local: Session, acknowledged: int, unacknowledged: frozenset[str], fresh: str
    ) -> Session:
        """Both as one: ``shared`` itself, if nothing is missing there. ``unacknowledged``: ids of local turns.

        ``fresh``: unique. Origin of what is put into an emptied store, so that other gateways see that it was emptied,
        however high its versions have become by then.
        """
        behind = self.behind(shared, local, acknowledged)
        there = {turn.turn_id for turn in shared.turns}
        more = [
            turn for turn in local.turns if turn.turn_id not in there and (behind or turn.turn_id in unacknowledged)
        ]
        if not more:
            return shared
        high = max(shared.version, local.version)
        kept = Session(
            high, shared.origin or fresh, shared.turns, shared.let_go, shared.holder, shared.until_ns
        )
        return self._with(kept, (*shared.turns, *more), keep_holder=True)

    def _with(self, session: Session, turns: tuple[Turn, ...], keep_holder: bool = False) -> Session:
        """The next version, bounded: the oldest turns go first, the last one stays however long it is."""
        first, size = max(0, len(turns) - self._max_turns), sum(turn.size_bytes for turn in turns)
        size -= sum(turn.size_bytes for turn in turns[:first])
        while size > self._max_bytes and first < len(turns) - 1:
            size -= turns[first].size_bytes
            first += 1
        holder, until_ns = (session.holder, session.until_ns) if keep_holder else ("", 0)
        return Session(
            session.version + 1, session.origin, turns[first:], session.let_go + first, holder, until_ns
        )

    def check(self, session: Session) -> None:
        """Invariants."""
        ids = [turn.turn_id for turn in session.turns]
        assert len(ids) == len(set(ids)), "turns: each stands there once"
        assert len(ids) <= self._max_turns, "turns: no more than allowed"
        size = sum(turn.size_bytes for turn in session.turns)
        assert size <= self._max_bytes or len(ids) == 1, "turns: no more bytes than allowed, but for a single one"
        assert bool(session.holder) == bool(session.until_ns), "a turn that is held is held until some time"

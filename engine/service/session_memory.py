"""Sessions in one gateway's memory: the only store where there is no Redis, else the copy that it goes on with.

Bounded by number and bytes, the least recently used go first; each leaves when nothing was written for ``ttl_s``.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from engine.policy.sessions import NEW, Session
from engine.redis_config import SessionsConfig
from engine.values import Struct

OVERHEAD_BYTES = 500  # of a session without turns, its keys and its place in the table


@dataclass(slots=True)
class Copy:
    """A session as this gateway knows it, and how much of that the shared store is known to have."""

    session: Session = NEW
    acknowledged: int = 0  # highest version that the store took
    unacknowledged: set[str] = field(default_factory=set)  # ids of turns that it did not
    over: str = ""  # token of the last turn that ended while the store was away
    written_ns: int = 0
    size_bytes: int = 0


class MemoryStats(Struct):
    """Now; and since the start."""

    sessions: int
    bytes: int
    evicted: int
    expired: int
    lost_turns: int  # went although the shared store never took them


class SessionMemory:
    """Owned by one event loop."""

    def __init__(self, config: SessionsConfig) -> None:
        self._config = config
        self._copies: OrderedDict[str, Copy] = OrderedDict()
        self._bytes = self._evicted = self._expired = self._lost = 0

    def get(self, now_ns: int, key: str) -> Copy | None:
        """None: there is none, or it is too old."""
        copy = self._copies.get(key)
        if copy is None:
            return None
        if now_ns - copy.written_ns > self._config.ttl_ns:
            self._remove(key)
            self._expired += 1
            return None
        self._copies.move_to_end(key)
        return copy

    def put(self, now_ns: int, key: str, copy: Copy) -> None:
        """In place of what was there."""
        old = self._copies.pop(key, None)
        self._bytes -= old.size_bytes if old else 0
        copy.written_ns = now_ns
        copy.size_bytes = OVERHEAD_BYTES + sum(turn.size_bytes for turn in copy.session.turns)
        self._copies[key] = copy
        self._bytes += copy.size_bytes
        while len(self._copies) > self._config.max_sessions or self._bytes > self._config.max_bytes:
            self._remove(next(iter(self._copies)))
            self._evicted += 1

    def _remove(self, key: str) -> None:
        copy = self._copies.pop(key)
        self._bytes -= copy.size_bytes
        self._lost += len(copy.unacknowledged)

    def apart(self) -> list[str]:
        """Keys of those that have turns which the shared store never took."""
        return [key for key, copy in self._copies.items() if copy.unacknowledged]

    def stats(self) -> MemoryStats:
        """A snapshot."""
        return MemoryStats(len(self._copies), self._bytes, self._evicted, self._expired, self._lost)

    def check(self) -> None:
        """Invariants."""
        assert self._bytes == sum(copy.size_bytes for copy in self._copies.values()), "bytes: the total is the total"
        assert len(self._copies) <= self._config.max_sessions and self._bytes <= self._config.max_bytes, "bounded"

"""Sessions' bytes on Redis: load, and compare-and-set by version in one script that also renews the time to live.

The write's own id is stored with its result, so a write whose reply was lost can be sent again and is done once. All of
one session's keys share a hash tag. The server's clock comes with every reply: leases are told by it, whoever asks.
"""

from __future__ import annotations

from typing import Any

import msgspec

from engine.policy.sessions import NEW, Session
from engine.service.redis_actor import RedisActor, script
from engine.units import S_NS
from engine.values import Struct

LOAD, SAVE = script("session_load.lua"), script("session_save.lua")


class Kept(Struct):
    """What the store has. ``saved``: this write is in it (then ``session`` is what was written)."""

    saved: bool
    session: Session
    now_ns: int  # the server's clock


class RedisSessions:
    """By a key of the caller's; who may see which is not known here."""

    def __init__(self, actor: RedisActor, prefix: str, ttl_ns: int) -> None:
        self._actor, self._prefix, self._ttl_ms = actor, prefix, ttl_ns // 1_000_000

    async def load(self, key: str) -> Kept:
        """Version 0, if there is none. Raises RedisAway."""
        return _kept(await self._actor.run(LOAD, [self._name(key)], []), None)

    async def save(self, key: str, expected: int, session: Session, write_id: str) -> Kept:
        """In place of version ``expected``, or not at all. Raises RedisAway: then it may have been written."""
        args = (str(expected), str(session.version), msgspec.msgpack.encode(session), self._ttl_ms, write_id)
        return _kept(await self._actor.run(SAVE, [self._name(key)], args), session)

    def _name(self, key: str) -> str:
        return f"{self._prefix}:session:{{{key}}}"


def _kept(reply: Any, written: Session | None) -> Kept:
    saved, _, data, seconds, micros = reply
    if written is None or not saved:
        written = msgspec.msgpack.decode(data, type=Session) if data else NEW
    return Kept(bool(saved), written, int(seconds) * S_NS + int(micros) * 1000)

"""Exact-answer cache: LRU by bytes of answer text, a time to live, and a window in which stale is better than nothing.

Holds facts about answers, never the text: the driver keeps that under ``answer_id`` and lets go of what
``drain_dropped`` names. Does not know who may see what: the tenant's scope is part of the key's digest.
Serving stale under overload is ``stale-if-error`` of RFC 5861.
"""

from __future__ import annotations

from collections import OrderedDict

from engine.cache_config import ExactConfig
from engine.units import s_to_ns
from engine.values import Struct

EXPIRED_PER_PUT = 2  # more than a put adds, so what nobody asks for again leaves too, though no call is long


class Entry(Struct):
    """An answer that was computed once: by the request ``source``, at ``stored_ns``."""

    key: bytes
    answer_id: str
    answer_bytes: int
    stored_ns: int
    source: str
    output_tokens: int


class ExactStats(Struct):
    """Gets are ``hits`` (fresh), ``stale_hits`` or ``misses``; entries leave by eviction, expiry or replacement."""

    entries: int
    bytes: int
    hits: int
    stale_hits: int
    misses: int
    evictions: int
    expirations: int


class ExactCache:
    """Key to answer; every call costs the same however much it holds."""

    def __init__(self, config: ExactConfig) -> None:
        self._enabled = config.enabled
        self._max_bytes = config.max_bytes
        self._ttl_ns = s_to_ns(config.ttl_s)
        self._keep_ns = s_to_ns(config.ttl_s) + s_to_ns(config.stale_s)
        self._entries: OrderedDict[bytes, Entry] = OrderedDict()  # least recently used first
        self._references: dict[str, int] = {}
        self._dropped: dict[str, None] = {}  # a dict for its order
        self._bytes = 0
        self._hits = self._stale_hits = self._misses = self._evictions = self._expirations = 0

    def get(self, now_ns: int, key: bytes, stale_ok: bool = False) -> Entry | None:
        """The answer, if young enough: within the time to live, or with ``stale_ok`` within the stale window after."""
        assert key, "an empty key means: never answer from a cache"
        if not self._enabled:
            return None
        entry = self._entries.get(key)
        if entry is not None and self._expired(entry, now_ns):
            self._expire(entry)
            entry = None
        if entry is None:
            self._misses += 1
            return None
        if now_ns - entry.stored_ns <= self._ttl_ns:
            self._hits += 1
        elif stale_ok:
            self._stale_hits += 1
        else:
            self._misses += 1
            return None
        self._entries.move_to_end(key)
        return entry

    def put(
        self, now_ns: int, key: bytes, answer_id: str, answer_bytes: int, source: str, output_tokens: int,
    ) -> bool:
        """Keep an answer in place of any older one of the key. False, and nothing changes, if it could never fit."""
        assert key, "an empty key means: never answer from a cache"
        assert answer_bytes >= 0, f"an answer cannot have {answer_bytes} bytes"
        if not self._enabled or answer_bytes > self._max_bytes:
            return False
        entry = Entry(key, answer_id, answer_bytes, now_ns, source, output_tokens)
        # Referenced before the old one is let go: a key stored again with the same answer must not drop its text.
        self._references[answer_id] = self._references.get(answer_id, 0) + 1
        self._dropped.pop(answer_id, None)
        if (old := self._entries.get(key)) is not None:
            self._remove(old)
        self._entries[key] = entry
        self._bytes += answer_bytes
        for _ in range(EXPIRED_PER_PUT):
            if self._expired(oldest := next(iter(self._entries.values())), now_ns):
                self._expire(oldest)
        while self._bytes > self._max_bytes:
            self._remove(next(iter(self._entries.values())))
            self._evictions += 1
        return True

    def refers_to(self, answer_id: str) -> bool:
        """Does an entry still need this text?"""
        return answer_id in self._references

    def drain_dropped(self) -> list[str]:
        """The answer ids that lost their last entry since the last call, in that order."""
        dropped = list(self._dropped)
        self._dropped.clear()
        return dropped

    def stats(self) -> ExactStats:
        """Size now, counters since the start."""
        return ExactStats(
            entries=len(self._entries), bytes=self._bytes, hits=self._hits, stale_hits=self._stale_hits,
            misses=self._misses, evictions=self._evictions, expirations=self._expirations,
        )

    def check(self) -> None:
        """Invariants."""
        references: dict[str, int] = {}
        for key, entry in self._entries.items():
            assert entry.key == key, f"an entry lies under its own key: {key.hex()}"
            references[entry.answer_id] = references.get(entry.answer_id, 0) + 1
        assert references == self._references, "every answer is referenced as often as entries name it"
        assert not any(answer_id in references for answer_id in self._dropped), "no answer in use is dropped"
        assert self._bytes == sum(entry.answer_bytes for entry in self._entries.values()), "bytes add up"
        assert self._bytes <= self._max_bytes, "never more bytes than the capacity"
        assert self._enabled or not self._entries, "a cache that is off holds nothing"

    def _expired(self, entry: Entry, now_ns: int) -> bool:
        return now_ns - entry.stored_ns > self._keep_ns

    def _expire(self, entry: Entry) -> None:
        self._remove(entry)
        self._expirations += 1

    def _remove(self, entry: Entry) -> None:
        del self._entries[entry.key]
        self._bytes -= entry.answer_bytes
        left = self._references[entry.answer_id] - 1
        if left:
            self._references[entry.answer_id] = left
        else:
            del self._references[entry.answer_id]
            self._dropped[entry.answer_id] = None

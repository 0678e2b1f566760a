"""Exact-answer cache: LRU by bytes of answer text, a time to live, and windows in which stale is better than nothing.

Holds facts about answers, never the text: the driver keeps that under ``answer_id`` and lets go of what
``drain_dropped`` names. Does not know who may see what: the tenant's scope is part of the key's digest.
RFC 5861 has both windows: ``stale-while-revalidate`` for everybody, and what is served under overload, where an error
would come else, is ``stale-if-error``.
"""

from __future__ import annotations

from collections import OrderedDict

from engine.cache_config import ExactConfig
from engine.events import Entry as Entry
from engine.events import Invalidate
from engine.policy.tags import TagIndex, meant
from engine.units import s_to_ns
from engine.values import Struct

EXPIRED_PER_PUT = 2  # more than a put adds, so what nobody asks for again leaves too, though no call is long


class ExactStats(Struct):
    """Gets are ``hits`` (fresh), ``stale_hits`` or ``misses``; they leave evicted, expired, replaced, called off."""

    entries: int
    bytes: int
    hits: int
    stale_hits: int
    misses: int
    evictions: int
    expirations: int
    invalidations: int = 0


class ExactCache:
    """Key to answer; every call costs the same however much it holds."""

    def __init__(self, config: ExactConfig) -> None:
        self._enabled = config.enabled
        self._max_bytes = config.max_bytes
        self._ttl_ns = s_to_ns(config.ttl_s)
        self._revalidate_ns = self._ttl_ns + s_to_ns(config.revalidate_s)
        self._keep_ns = self._ttl_ns + s_to_ns(max(config.stale_s, config.revalidate_s))
        self._entries: OrderedDict[bytes, Entry] = OrderedDict()  # least recently used first
        self._references: dict[str, int] = {}
        self._dropped: dict[str, None] = {}  # a dict for its order
        self._bytes = 0
        self._tagged: TagIndex[bytes] = TagIndex()
        self._hits = self._stale_hits = self._misses = self._evictions = self._expirations = self._invalidations = 0

    def get(self, now_ns: int, key: bytes, stale_ok: bool = False) -> Entry | None:
        """The answer, if young enough: fresh or worth to be renewed, or with ``stale_ok`` within the stale window."""
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
        elif stale_ok or now_ns - entry.stored_ns <= self._revalidate_ns:
            self._stale_hits += 1
        else:
            self._misses += 1
            return None
        self._entries.move_to_end(key)
        return entry

    def put(
        self, now_ns: int, key: bytes, answer_id: str, answer_bytes: int, source: str, output_tokens: int,
        tenant: str = "", tags: tuple[str, ...] = (),
    ) -> bool:
        """Keep an answer in place of any older one of the key. False, and nothing changes, if it could never fit."""
        assert key, "an empty key means: never answer from a cache"
        assert answer_bytes >= 0, f"an answer cannot have {answer_bytes} bytes"
        if not self._enabled or answer_bytes > self._max_bytes:
            return False
        self._keep(now_ns, Entry(key, answer_id, answer_bytes, now_ns, source, output_tokens, tenant, tags))
        return True

    def take_back(self, now_ns: int, entry: Entry) -> bool:
        """An entry of a former life. False, and nothing changes: too old, too large, or there is one already."""
        if not self._enabled or entry.answer_bytes > self._max_bytes or self._expired(entry, now_ns):
            return False
        if entry.key in self._entries:
            return False
        self._keep(now_ns, entry)
        return True

    def _keep(self, now_ns: int, entry: Entry) -> None:
        # Referenced before the old one is let go: a key stored again with the same answer must not drop its text.
        self._references[entry.answer_id] = self._references.get(entry.answer_id, 0) + 1
        self._dropped.pop(entry.answer_id, None)
        if (old := self._entries.get(entry.key)) is not None:
            self._remove(old)
        self._entries[entry.key] = entry
        self._tagged.add(entry.key, entry.tags)
        self._bytes += entry.answer_bytes
        for _ in range(EXPIRED_PER_PUT):
            if self._expired(oldest := next(iter(self._entries.values())), now_ns):
                self._expire(oldest)
        while self._bytes > self._max_bytes:
            self._remove(next(iter(self._entries.values())))
            self._evictions += 1

    def invalidate(self, what: Invalidate) -> int:
        """Let go of all that is meant; how many there were."""
        keys = self._tagged.keys(what.tag) if what.tag else list(self._entries)
        gone = [e for key in keys if meant(what, (e := self._entries[key]).tenant, e.tags, e.answer_id)]
        for entry in gone:
            self._remove(entry)
        self._invalidations += len(gone)
        return len(gone)

    def is_fresh(self, now_ns: int, key: bytes) -> bool:
        """Whether an answer within its time to live is there; counts as no lookup."""
        entry = self._entries.get(key)
        return entry is not None and now_ns - entry.stored_ns <= self._ttl_ns

    def entries(self) -> list[Entry]:
        """All, least recently used first."""
        return list(self._entries.values())

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
            invalidations=self._invalidations,
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
        self._tagged.check({key: entry.tags for key, entry in self._entries.items()})

    def _expired(self, entry: Entry, now_ns: int) -> bool:
        return now_ns - entry.stored_ns > self._keep_ns

    def _expire(self, entry: Entry) -> None:
        self._remove(entry)
        self._expirations += 1

    def _remove(self, entry: Entry) -> None:
        del self._entries[entry.key]
        self._tagged.remove(entry.key, entry.tags)
        self._bytes -= entry.answer_bytes
        left = self._references[entry.answer_id] - 1
        if left:
            self._references[entry.answer_id] = left
        else:
            del self._references[entry.answer_id]
            self._dropped[entry.answer_id] = None

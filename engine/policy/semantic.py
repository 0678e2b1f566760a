"""Semantic cache: may the answer to a similar question serve this one? First rule: a fixed cosine.

Hard key apart from similarity: who asks and under what context must be equal (an index of its own per hard key), only
what they ask may differ. Single-turn questions only. Under overload a sheddable class accepts a lower cosine and older
answers. Holds facts about answers; vectors and nearest neighbours are the driver's. Cosines are integer millionths.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from engine.cache_config import SemanticConfig
from engine.events import Neighbour
from engine.units import s_to_ns
from engine.values import Struct

EXPIRED_PER_PUT = 2  # more than a put adds, so what nobody asks for again leaves too

Key = tuple[bytes, bytes]  # (hard key, text key)


class SemanticEntry(Struct):
    """An answered question: by the request ``source``, at ``stored_ns``."""

    hard_key: bytes
    text_key: bytes
    answer_id: str
    stored_ns: int
    source: str
    output_tokens: int


class SemanticHit(Struct):
    """An entry that may serve, and how near it is."""

    entry: SemanticEntry
    cosine_millionths: int
    approximate: bool  # below the strict cosine, or past its time to live


class SemanticStats(Struct):
    """``asked`` = hits + approximate_hits + misses."""

    entries: int
    asked: int
    hits: int
    approximate_hits: int
    misses: int


class SemanticCache:
    """Entries by hard key and text key; the driver's index holds a vector for each of them."""

    def __init__(self, config: SemanticConfig) -> None:
        self._config = config
        self._ttl_ns = s_to_ns(config.ttl_s)
        self._keep_ns = self._ttl_ns + s_to_ns(config.stale_s)
        self._strict = round(config.cosine * 1_000_000)
        self._relaxed = round(config.approximate_cosine * 1_000_000)
        self._entries: OrderedDict[Key, SemanticEntry] = OrderedDict()  # least recently used first
        self._references: dict[str, int] = {}
        self._dropped: list[SemanticEntry] = []
        self._hits = self._approximate = self._misses = 0

    def decide(
        self, now_ns: int, hard_key: bytes, neighbours: Sequence[Neighbour], relaxed: bool
    ) -> SemanticHit | None:
        """The nearest entry that is near and young enough; ``relaxed``: an approximation is better than nothing."""
        for neighbour in neighbours:  # nearest first
            entry = self._entries.get((hard_key, neighbour.text_key))
            if entry is None:
                continue  # it left while the question was under way
            age_ns = now_ns - entry.stored_ns
            strict = neighbour.cosine_millionths >= self._strict and age_ns <= self._ttl_ns
            near = neighbour.cosine_millionths >= self._relaxed and age_ns <= self._keep_ns
            if strict or (relaxed and near):
                self._entries.move_to_end((hard_key, neighbour.text_key))
                self._hits += strict
                self._approximate += not strict
                return SemanticHit(entry, neighbour.cosine_millionths, not strict)
        self._misses += 1
        return None

    def put(self, entry: SemanticEntry, now_ns: int) -> None:
        """Keep an answered question, in place of an older answer to the very same one."""
        key = (entry.hard_key, entry.text_key)
        self._references[entry.answer_id] = self._references.get(entry.answer_id, 0) + 1
        if (old := self._entries.get(key)) is not None:
            self._drop(old)  # its text may go, its vector stays: the question is the same
        self._entries[key] = entry
        for _ in range(EXPIRED_PER_PUT):
            oldest = next(iter(self._entries.values()))
            if now_ns - oldest.stored_ns > self._keep_ns:
                self._drop(oldest)
        while len(self._entries) > self._config.max_entries:
            self._drop(next(iter(self._entries.values())))

    def holds(self, hard_key: bytes, text_key: bytes) -> bool:
        """Is there an answer to this question?"""
        return (hard_key, text_key) in self._entries

    def refers_to(self, answer_id: str) -> bool:
        """Does an entry still need this text?"""
        return answer_id in self._references

    def drain_dropped(self) -> list[SemanticEntry]:
        """Entries that left since the last call: their vectors may go, and their texts if nobody else needs them."""
        out, self._dropped = self._dropped, []
        return out

    def stats(self) -> SemanticStats:
        """Size now, counters since the start."""
        asked = self._hits + self._approximate + self._misses
        return SemanticStats(len(self._entries), asked, self._hits, self._approximate, self._misses)

    def check(self) -> None:
        """Invariants."""
        references: dict[str, int] = {}
        for key, entry in self._entries.items():
            assert key == (entry.hard_key, entry.text_key), "an entry lies under its own key"
            references[entry.answer_id] = references.get(entry.answer_id, 0) + 1
        assert references == self._references, "every answer is referenced as often as entries name it"
        assert len(self._entries) <= self._config.max_entries, "never more entries than allowed"

    def _drop(self, entry: SemanticEntry) -> None:
        del self._entries[(entry.hard_key, entry.text_key)]
        self._unreference(entry.answer_id)
        self._dropped.append(entry)

    def _unreference(self, answer_id: str) -> None:
        left = self._references[answer_id] - 1
        if left:
            self._references[answer_id] = left
        else:
            del self._references[answer_id]

"""The exact cache against a plain list, searched from end to end.

invariant: mutation that it caught
- fresh through the last nanosecond of the TTL: `<` for `<=`; one nanosecond more; age counted from the last hit
- stale only when asked for: always; never; counted as fresh
- gone after the stale window: `>=` for `>`; left in place by `get`; no expiry on `put` (small answers pile up)
- least recently used leaves: first in, first out; a refused stale answer touched, or removed
- never more bytes than the capacity: one byte late; one byte early; one eviction a put; a replaced entry's bytes kept
- too large: an answer of just the capacity refused; the older answer removed
- drained when the last entry went: at the first of several; though stored again; twice; never; in another order
- off means off: `get` (a miss counted), `put`; empty keys and negative sizes let in; counters not counted
"""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from engine.config import ExactConfig
from engine.policy.exact import EXPIRED_PER_PUT, Entry, ExactCache
from engine.units import MIB_BYTES, S_NS

TTL_NS, KEEP_NS, CAPACITY = 10 * S_NS, 30 * S_NS, 100
CONFIG = ExactConfig(max_mib=CAPACITY / MIB_BYTES, ttl_s=10.0, stale_s=20.0)
STEPS_NS = st.one_of(
    st.sampled_from([0, 1, TTL_NS - 1, TTL_NS, TTL_NS + 1, KEEP_NS - 1, KEEP_NS, KEEP_NS + 1]),
    st.integers(0, 4 * S_NS),
)
KEYS = st.sampled_from([b"a", b"b", b"c", b"d", b"e", b"f"])
ANSWERS = st.sampled_from(["one", "two", "three", "four", "five"])
SIZES = st.sampled_from([0, 1, 10, 25, 40, 60, 99, 100, 101])


class ExactMachine(RuleBasedStateMachine):
    """Random puts, gets and drains around the borders of age and size."""

    @initialize()
    def start(self) -> None:
        self.cache = ExactCache(CONFIG)
        self.entries: list[Entry] = []  # least recently used first
        self.dropped: list[str] = []
        self.now_ns = 0
        self.hits = self.stale_hits = self.misses = self.evictions = self.expirations = 0

    def remove(self, entry: Entry) -> None:
        self.entries = [other for other in self.entries if other is not entry]
        if all(other.answer_id != entry.answer_id for other in self.entries):
            self.dropped.append(entry.answer_id)

    @rule(step_ns=STEPS_NS)
    def forward(self, step_ns: int) -> None:
        self.now_ns += step_ns

    @rule(step_ns=st.integers(0, S_NS))
    def backward(self, step_ns: int) -> None:
        self.now_ns -= step_ns

    @rule(key=KEYS, answer_id=ANSWERS, size=SIZES)
    def put(self, key: bytes, answer_id: str, size: int) -> None:
        kept = self.cache.put(self.now_ns, key, answer_id, size, f"from {key!r}", size // 4)
        assert kept == (size <= CAPACITY)
        if not kept:
            return
        old = [entry for entry in self.entries if entry.key == key]
        self.entries.append(Entry(key, answer_id, size, self.now_ns, f"from {key!r}", size // 4))
        self.dropped = [other for other in self.dropped if other != answer_id]
        for entry in old:
            self.remove(entry)
        for _ in range(EXPIRED_PER_PUT):
            if self.now_ns > self.entries[0].stored_ns + KEEP_NS:
                self.remove(self.entries[0])
                self.expirations += 1
        while sum(entry.answer_bytes for entry in self.entries) > CAPACITY:
            self.remove(self.entries[0])
            self.evictions += 1

    @rule(key=KEYS, stale_ok=st.booleans())
    def get(self, key: bytes, stale_ok: bool) -> None:
        found = next((entry for entry in self.entries if entry.key == key), None)
        if found is not None and self.now_ns > found.stored_ns + KEEP_NS:
            self.remove(found)
            self.expirations += 1
            found = None
        if found is not None and self.now_ns > found.stored_ns + TTL_NS:
            if stale_ok:
                self.stale_hits += 1
            else:
                self.misses += 1
                found = None
        elif found is not None:
            self.hits += 1
        else:
            self.misses += 1
        if found is not None:
            self.entries = [entry for entry in self.entries if entry is not found] + [found]
        assert self.cache.get(self.now_ns, key, stale_ok) == found

    @rule()
    def drain(self) -> None:
        assert self.cache.drain_dropped() == self.dropped
        self.dropped = []

    @invariant()
    def holds(self) -> None:
        self.cache.check()
        stats = self.cache.stats()
        assert stats.entries == len(self.entries)
        assert stats.bytes == sum(entry.answer_bytes for entry in self.entries)
        assert (stats.hits, stats.stale_hits, stats.misses) == (self.hits, self.stale_hits, self.misses)
        assert (stats.evictions, stats.expirations) == (self.evictions, self.expirations)

    def teardown(self) -> None:
        if hasattr(self, "cache"):
            assert self.cache.drain_dropped() == self.dropped


ExactMachine.TestCase.settings = settings(max_examples=250, stateful_step_count=50, deadline=None)
TestExactMachine = ExactMachine.TestCase


def put(cache: ExactCache, now_ns: int, key: bytes, answer_id: str, size: int = 10) -> bool:
    return cache.put(now_ns, key, answer_id, size, "request", 3)


def test_an_answer_is_fresh_then_stale_then_gone() -> None:
    cache = ExactCache(CONFIG)
    put(cache, 5, b"k", "one")
    entry = Entry(b"k", "one", 10, 5, "request", 3)
    assert cache.get(5 + TTL_NS, b"k") == entry
    assert cache.get(6 + TTL_NS, b"k") is None
    assert cache.get(5 + KEEP_NS, b"k", stale_ok=True) == entry
    assert cache.drain_dropped() == []
    assert cache.get(6 + KEEP_NS, b"k", stale_ok=True) is None
    assert cache.drain_dropped() == ["one"]
    assert cache.stats().entries == 0


def test_what_was_asked_for_lately_stays() -> None:
    cache = ExactCache(CONFIG)
    for key in (b"a", b"b", b"c", b"d"):
        put(cache, 0, key, key.decode(), 25)
    cache.get(1, b"a")
    put(cache, 2, b"e", "e", 30)
    assert cache.drain_dropped() == ["b", "c"]
    assert cache.get(3, b"a") is not None


def test_a_refused_stale_answer_does_not_count_as_used() -> None:
    cache = ExactCache(CONFIG)
    put(cache, 0, b"old", "old", 50)
    put(cache, 1, b"young", "young", 50)
    assert cache.get(TTL_NS + 1, b"old") is None
    put(cache, TTL_NS + 1, b"new", "new", 50)
    assert cache.drain_dropped() == ["old"]


def test_an_answer_goes_with_its_last_key() -> None:
    cache = ExactCache(CONFIG)
    put(cache, 0, b"a", "shared", 40)
    put(cache, 0, b"b", "shared", 40)
    put(cache, 1, b"c", "other", 50)  # a goes
    assert cache.drain_dropped() == []
    put(cache, 2, b"d", "third", 50)  # b goes
    assert cache.drain_dropped() == ["shared"]
    assert cache.drain_dropped() == []


def test_an_answer_stored_again_before_the_drain_is_kept() -> None:
    cache = ExactCache(CONFIG)
    put(cache, 0, b"a", "one", 60)
    put(cache, 0, b"b", "two", 60)
    put(cache, 0, b"c", "one", 10)
    put(cache, 0, b"c", "one", 20)  # same key, same answer: never without a reference in between
    assert cache.drain_dropped() == []
    cache.check()


def test_what_cannot_fit_changes_nothing() -> None:
    cache = ExactCache(CONFIG)
    put(cache, 0, b"a", "one", 100)
    assert not put(cache, 1, b"a", "two", 101)
    assert cache.get(2, b"a") == Entry(b"a", "one", 100, 0, "request", 3)
    assert cache.drain_dropped() == []


def test_small_answers_that_nobody_asks_for_again_do_not_pile_up() -> None:
    cache = ExactCache(ExactConfig(max_mib=64.0, ttl_s=10.0, stale_s=20.0))
    highest = 0
    for i in range(20_000):  # 100 a second; bytes alone would never let one go
        put(cache, i * S_NS // 100, b"%d" % i, f"answer {i}", 1)
        if i % 7 == 0:
            cache.get(i * S_NS // 100, b"%d" % (i // 2))
        highest = max(highest, cache.stats().entries)
    assert highest <= 2 * 30 * 100
    cache.check()


def test_a_cache_that_is_off_knows_nothing() -> None:
    cache = ExactCache(ExactConfig(enabled=False))
    assert not put(cache, 0, b"a", "one")
    assert cache.get(0, b"a", stale_ok=True) is None
    assert cache.stats().misses == 0
    assert cache.drain_dropped() == []
    cache.check()


def test_an_empty_key_or_a_negative_size_is_a_programming_error() -> None:
    for config in (CONFIG, ExactConfig(enabled=False)):
        cache = ExactCache(config)
        with pytest.raises(AssertionError):
            cache.get(0, b"")
        with pytest.raises(AssertionError):
            put(cache, 0, b"", "one")
        with pytest.raises(AssertionError):
            put(cache, 0, b"a", "one", -1)

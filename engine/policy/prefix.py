"""KV blocks and the prefix cache over them: which block holds what, who uses it, which goes next.

A block is free, used (reference count > 0) or *evictable*: unused, but its content is known by hash and may be
revived. Free and evictable blocks share one intrusive doubly linked list, least recently used first, so that taking,
returning and reviving are O(1) (the scheme of vLLM's block pool). Hash chains make a lookup a walk of dict gets.

Knows block numbers and digests, never tokens or tensors. A digest is published when its step is planned, so that one
step can share a new prefix; a step that fails must ``unpublish``. Tenants are kept apart by the root of their chain.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from engine.config import PrefixConfig
from engine.units import s_to_ns
from engine.values import Struct

_NONE = -1


class PrefixStats(Struct):
    """Blocks by state, and the counters behind the hit rate (tokens; recomputation excluded)."""

    total: int
    free: int
    evictable: int
    used: int
    pinned: int
    query_tokens: int
    hit_tokens: int
    evictions: int
    pins_refused: int


class BlockPool:
    """``config.blocks`` blocks of ``config.block_tokens`` tokens."""

    def __init__(self, config: PrefixConfig) -> None:
        self.enabled = config.enabled
        self._news: dict[bytes, bool] | None = None  # digest -> findable now, unlike at the last drain
        self.block_tokens = config.block_tokens
        n = self.total = int(config.blocks)
        self.pin_cap, self._pin_ttl_ns = config.pinned_blocks, s_to_ns(config.pin_ttl_s)
        self._refs = [0] * n
        self._digest: list[bytes | None] = [None] * n
        self._block_of: dict[bytes, int] = {}
        # the list of unused blocks is threaded through two arrays; index n is its sentinel (head = next of n)
        self._next: list[int] = [*range(1, n + 1), 0]
        self._prev: list[int] = [n, *range(n)]
        self.available = n  # free or evictable
        self._evictable = 0  # of these, with a name
        self._pins: dict[int, int] = {}  # block -> expiry, in order of expiry
        self._query_tokens = self._hit_tokens = self._evictions = self._pins_refused = 0

    # ------------------------------------------------------------ lookup

    def match(self, digests: Sequence[bytes], known_tokens: int) -> list[int]:
        """Blocks of the longest cached prefix; at least one of ``known_tokens`` is always left to compute."""
        hits: list[int] = []
        if not self.enabled:
            return hits
        for digest in digests[: (known_tokens - 1) // self.block_tokens]:
            block = self._block_of.get(digest)
            if block is None:
                break
            hits.append(block)
        return hits

    def count(self, prompt_tokens: int, hit_tokens: int) -> None:
        """One first admission, for the hit rate."""
        self._query_tokens += prompt_tokens
        self._hit_tokens += hit_tokens

    # ------------------------------------------------------------ taking and returning

    def cost_of(self, hits: Sequence[int], fresh: int) -> int:
        """How far ``take`` would lower ``available``."""
        return fresh + sum(1 for block in hits if self._refs[block] == 0)

    def take(self, hits: Sequence[int], fresh: int) -> list[int]:
        """A block table: ``hits`` gain a reference, ``fresh`` more blocks are allocated behind them.

        The caller has checked ``cost_of(...) <= available``; a refused admission therefore changes nothing.
        """
        for block in hits:
            if self._refs[block] == 0:
                self._unlink(block)
            self._refs[block] += 1
        return [*hits, *(self._allocate() for _ in range(fresh))]

    def release(self, table: Sequence[int]) -> None:
        """Give a table back, tail first: the end of a chain must be evicted before its beginning."""
        for block in reversed(table):
            self._drop_reference(block)

    # ------------------------------------------------------------ publishing

    def publish(self, block: int, digest: bytes) -> bool:
        """From now on ``digest`` is found in ``block``. False when another block already holds it."""
        if not self.enabled or digest in self._block_of:
            return False
        assert self._refs[block] > 0 and self._digest[block] is None, "publish: block must be in use and unnamed"
        self._digest[block] = digest
        self._block_of[digest] = block
        self._note(digest, True)
        return True

    def unpublish(self, block: int) -> None:
        """The block was never written after all: nobody may find it, and a pin on it is void."""
        digest = self._digest[block]
        if digest is not None:
            assert self._refs[block] > 0, "unpublish: only while its step still holds it"
            del self._block_of[digest]
            self._digest[block] = None
            self._note(digest, False)
        if self._pins.pop(block, None) is not None:
            self._drop_reference(block)

    # ------------------------------------------------------------ pins

    def pin(self, now_ns: int, blocks: Iterable[int]) -> None:
        """Keep published blocks resident for ``pin_ttl_s`` from now; beyond the cap a pin is refused and counted."""
        for block in blocks:
            if block in self._pins:
                del self._pins[block]  # renewed: to the end of the expiry order
            elif self._digest[block] is None:
                continue
            elif len(self._pins) >= self.pin_cap:
                self._pins_refused += 1
                continue
            else:
                if self._refs[block] == 0:
                    self._unlink(block)
                self._refs[block] += 1
            self._pins[block] = now_ns + self._pin_ttl_ns

    def expire_pins(self, now_ns: int) -> None:
        """Let go of pins that nobody asked for in time."""
        while self._pins:
            block = next(iter(self._pins))
            if self._pins[block] > now_ns:
                return
            del self._pins[block]
            self._drop_reference(block)

    # ------------------------------------------------------------ what a router hears

    def listen(self) -> None:
        """From now on what changes is noted, for whoever calls ``drain``."""
        self._news = {}

    def drain(self) -> tuple[tuple[bytes, ...], tuple[bytes, ...]]:
        """Digests that are findable and were not at the last call, and the reverse. What came and went is in neither.

        O(changes), and never more than two digests for each block.
        """
        if not self._news:
            return (), ()
        news, self._news = self._news, {}
        return tuple(d for d, found in news.items() if found), tuple(d for d, found in news.items() if not found)

    def _note(self, digest: bytes, found: bool) -> None:
        if self._news is None:
            return
        if digest in self._news:
            del self._news[digest]  # back to what was last said
        else:
            self._news[digest] = found

    # ------------------------------------------------------------ windows for others

    def holds(self, digest: bytes) -> bool:
        """Would it be found?"""
        return digest in self._block_of

    def references(self, block: int) -> int:
        """How many tables and pins hold the block."""
        return self._refs[block]

    def is_pinned(self, block: int) -> bool:
        """Held resident by a pin?"""
        return block in self._pins

    def stats(self) -> PrefixStats:
        """Counts by state, O(1)."""
        return PrefixStats(
            total=self.total, free=self.available - self._evictable, evictable=self._evictable,
            used=self.total - self.available, pinned=len(self._pins), query_tokens=self._query_tokens,
            hit_tokens=self._hit_tokens, evictions=self._evictions, pins_refused=self._pins_refused,
        )

    def check(self) -> None:
        """Invariants; O(blocks)."""
        unused: list[int] = []
        at = self._next[self.total]
        while at != self.total:
            unused.append(at)
            assert len(unused) <= self.total, "list: no cycle"
            assert self._prev[self._next[at]] == at, "list: forwards and backwards agree"
            at = self._next[at]
        assert len(unused) == self.available, "list: as long as available says"
        assert sorted(unused) == [b for b in range(self.total) if self._refs[b] == 0], "a block is unused or referenced"
        assert len(self._pins) <= self.pin_cap, "pins: under the cap"
        assert all(self._refs[b] > 0 and self._digest[b] is not None for b in self._pins), "pins: resident and named"
        for digest, block in self._block_of.items():
            assert self._digest[block] == digest, "index: points only to blocks with that digest"
        assert sum(d is not None for d in self._digest) == len(self._block_of), "index: every named block is found"
        for digest, found in (self._news or {}).items():
            assert found == (digest in self._block_of), "news: what is true now"
        assert self._evictable == sum(self._digest[b] is not None for b in unused), "evictable: unused and named"

    # ------------------------------------------------------------ the list

    def _allocate(self) -> int:
        block = self._next[self.total]
        assert block != self.total, "allocate: the caller checked that a block is available"
        self._unlink(block)
        digest = self._digest[block]
        if digest is not None:
            del self._block_of[digest]
            self._digest[block] = None
            self._note(digest, False)
            self._evictions += 1
        self._refs[block] = 1
        return block

    def _unlink(self, block: int) -> None:
        before, after = self._prev[block], self._next[block]
        self._next[before], self._prev[after] = after, before
        self._next[block] = self._prev[block] = _NONE
        self.available -= 1
        self._evictable -= self._digest[block] is not None

    def _drop_reference(self, block: int) -> None:
        self._refs[block] -= 1
        assert self._refs[block] >= 0, "release: never more often than taken"
        if self._refs[block]:
            return
        end = self.total
        # a block without a name is worth nothing to anyone: it goes to the front, to be taken first
        before = self._prev[end] if self._digest[block] is not None else end
        after = self._next[before]
        self._next[before] = self._prev[after] = block
        self._prev[block], self._next[block] = before, after
        self.available += 1
        self._evictable += self._digest[block] is not None

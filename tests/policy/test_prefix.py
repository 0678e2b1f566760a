"""The block pool against lists and dicts that are searched from end to end.

Mutations it caught:
- match: no cap at n-1; goes on behind a gap in the chain
- cost_of: hits that are unused cost nothing
- take: a hit stays in the list of the unused; sets the reference count to one; evicted content stays findable
- release: head of a chain before its tail; unnamed blocks to the end of the list; named ones to its front
- publish: the same content under two blocks; although the cache is off
- unpublish: the digest stays in the index; the pin stays
- pin: one above the cap; of a block without a name; without a reference; renewal keeps the old expiry
- expire_pins: one nanosecond late
- drain: evicted, unpublished or published not noted; what came and went told; told twice
- stats: evictions, refused pins, evictable not counted
- Hasher: root without tenant; fields without length; no tag; chain without parent
"""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.config import PrefixConfig, RouterConfig
from engine.events import Arrive
from engine.model.blockhash import Hasher
from engine.policy.prefix import BlockPool
from engine.policy.router import Router
from engine.units import S_NS

SIZE = 4


def pool_of(blocks: int, pinned: int = 0, enabled: bool = True) -> BlockPool:
    config = PrefixConfig(enabled=enabled, block_tokens=SIZE, blocks=blocks, pinned_blocks=pinned, pin_ttl_s=10)
    return BlockPool(config)


def chain(name: str, length: int) -> list[bytes]:
    return [f"{name}{i}".encode() for i in range(length)]


def order_of(pool: BlockPool) -> list[int]:
    """The blocks that are still to be had, in the order in which they would be given out. Leaves nothing."""
    return pool.take((), pool.available)


def filled(pool: BlockPool, digests: list[bytes], extra: int = 0) -> list[int]:
    """A sequence that computes ``digests`` and a rest: the table it holds."""
    hits = pool.match(digests, len(digests) * SIZE + 1)
    table = pool.take(hits, len(digests) - len(hits) + extra)
    for block, digest in zip(table[len(hits) :], digests[len(hits) :], strict=False):
        pool.publish(block, digest)
    return table


class NaivePool:
    """What a block pool means, without a thought for speed."""

    def __init__(self, blocks: int, pinned: int, enabled: bool) -> None:
        self.unused = list(range(blocks))  # first to be given out, first
        self.refs = [0] * blocks
        self.names: dict[int, bytes] = {}
        self.pins: list[tuple[int, int]] = []  # (expiry, block), oldest first
        self.cap, self.enabled = pinned, enabled
        self.evictions = self.refused = 0

    def match(self, digests: list[bytes], tokens: int) -> list[int]:
        hits = []
        for i, digest in enumerate(digests):
            holder = [block for block, name in self.names.items() if name == digest]
            if not holder or (i + 1) * SIZE > tokens - 1:
                break
            hits += holder
        return hits

    def take(self, hits: list[int], fresh: int) -> list[int]:
        for block in hits:
            if block in self.unused:
                self.unused.remove(block)
            self.refs[block] += 1
        table = list(hits)
        for _ in range(fresh):
            block = self.unused.pop(0)
            self.evictions += self.names.pop(block, None) is not None
            self.refs[block] = 1
            table.append(block)
        return table

    def drop(self, block: int) -> None:
        self.refs[block] -= 1
        if self.refs[block] == 0:
            self.unused.insert(len(self.unused) if block in self.names else 0, block)

    def publish(self, block: int, digest: bytes) -> bool:
        if not self.enabled or digest in self.names.values():
            return False
        self.names[block] = digest
        return True

    def unpublish(self, block: int) -> None:
        self.names.pop(block, None)
        self.expire([pin for pin in self.pins if pin[1] == block])

    def expire(self, gone: list[tuple[int, int]]) -> None:
        for pin in gone:
            self.pins.remove(pin)
            self.drop(pin[1])

    def pin(self, now_ns: int, blocks: list[int]) -> None:
        for block in blocks:
            old = [pin for pin in self.pins if pin[1] == block]
            if old:
                self.pins.remove(old[0])
            elif block not in self.names:
                continue
            elif len(self.pins) == self.cap:
                self.refused += 1
                continue
            else:
                if block in self.unused:
                    self.unused.remove(block)
                self.refs[block] += 1
            self.pins.append((now_ns + 10 * S_NS, block))


class PoolMachine(RuleBasedStateMachine):
    """Sequences of three families come, compute their chains block by block, grow, fail and go."""

    @initialize(blocks=st.integers(4, 14), pinned=st.integers(0, 4), enabled=st.sampled_from([True] * 5 + [False]))
    def start(self, blocks: int, pinned: int, enabled: bool) -> None:
        self.pool, self.naive = pool_of(blocks, pinned, enabled), NaivePool(blocks, pinned, enabled)
        self.pool.listen()
        self.router = Router(RouterConfig(), 2, SIZE)
        self.heard: set[bytes] = set()  # findable, going by events alone
        self.tables: list[list[int]] = []
        self.chains: list[list[bytes]] = []
        self.written: list[int] = []  # blocks of each table that have been published, or could not be
        self.now_ns = 0
        self.serial = 0

    def one(self, pick: int) -> int:
        return pick % len(self.tables)

    @rule(family=st.sampled_from("abc"), common=st.integers(0, 4), own=st.integers(0, 2), rest=st.integers(0, SIZE - 1))
    def admit(self, family: str, common: int, own: int, rest: int) -> None:
        self.serial += 1
        digests = chain(family, common) + chain(f"{family}{common}/{self.serial % 3}/", own)
        tokens = max(1, len(digests) * SIZE + rest)
        hits = self.pool.match(digests, tokens)
        assert hits == self.naive.match(digests, tokens)
        assert len(hits) * SIZE < tokens, "at least one token is left to compute"
        fresh = -(-tokens // SIZE) - len(hits)
        cost = self.pool.cost_of(hits, fresh)
        assert cost == fresh + sum(block in self.naive.unused for block in hits)
        if cost > self.pool.available:
            return  # a refused admission has changed nothing: the invariants look
        before = self.pool.available
        table = self.pool.take(hits, fresh)
        assert table == self.naive.take(hits, fresh)
        assert before - self.pool.available == cost
        self.tables.append(table)
        self.chains.append(digests)
        self.written.append(len(hits))

    @precondition(lambda self: self.tables)
    @rule(pick=st.integers(0, 9), count=st.integers(1, 3))
    def publish(self, pick: int, count: int) -> None:
        i = self.one(pick)
        for _ in range(count):
            at = self.written[i]
            if at == min(len(self.chains[i]), len(self.tables[i])):
                return
            block, digest = self.tables[i][at], self.chains[i][at]
            assert self.pool.publish(block, digest) == self.naive.publish(block, digest)
            self.written[i] += 1

    @precondition(lambda self: self.tables and self.pool.available)
    @rule(pick=st.integers(0, 9))
    def grow(self, pick: int) -> None:
        i = self.one(pick)
        self.tables[i] += (blocks := self.pool.take((), 1))
        assert blocks == self.naive.take([], 1)

    @precondition(lambda self: self.tables)
    @rule(pick=st.integers(0, 9))
    def leave(self, pick: int) -> None:
        i = self.one(pick)
        table = self.tables.pop(i)
        del self.chains[i], self.written[i]
        self.pool.release(table)
        for block in reversed(table):
            self.naive.drop(block)

    @precondition(lambda self: self.tables)
    @rule(pick=st.integers(0, 9), at=st.integers(0, 5))
    def unpublish(self, pick: int, at: int) -> None:
        """As after a failed step; whoever else holds the block fails with it, or will compute it again."""
        table = self.tables[self.one(pick)]
        block = table[at % len(table)]
        self.pool.unpublish(block)
        self.naive.unpublish(block)

    @precondition(lambda self: self.tables)
    @rule(pick=st.integers(0, 9), count=st.integers(0, 4))
    def pin(self, pick: int, count: int) -> None:
        blocks = self.tables[self.one(pick)][:count]
        self.pool.pin(self.now_ns, blocks)
        self.naive.pin(self.now_ns, blocks)

    @rule()
    def drain(self) -> None:
        """What a router has heard is what the pool holds, and no word was idle."""
        stored, removed = self.pool.drain()
        assert len(stored) == len(set(stored)) and len(removed) == len(set(removed))
        assert self.heard.isdisjoint(stored), "stored: it was not there"
        assert self.heard.issuperset(removed), "removed: it was there"
        assert len(stored) + len(removed) <= 2 * self.pool.total, "memory: bounded"
        self.heard = self.heard - set(removed) | set(stored)
        assert self.heard == set(self.naive.names.values()) == {d for d in self.heard if self.pool.holds(d)}
        self.router.hear_kv(1, stored, removed)
        for block, digest in self.naive.names.items():
            ask = Arrive(0, "r", "t", "c", 0, SIZE + 1, 1, blocks=(digest,))
            assert self.router.choose(0, (0, 1), ask) == 1, f"block {block} is known to be there"
        assert self.pool.drain() == ((), ())

    @rule(seconds=st.sampled_from([0, 1, 4, 10]))
    def time_passes(self, seconds: int) -> None:
        self.now_ns += seconds * S_NS
        self.pool.expire_pins(self.now_ns)
        self.naive.expire([pin for pin in self.naive.pins if pin[0] <= self.now_ns])

    @invariant()
    def same(self) -> None:
        if not hasattr(self, "pool"):
            return
        self.pool.check()
        pool, naive = self.pool, self.naive
        assert pool.available == len(naive.unused)
        assert [pool.references(b) for b in range(pool.total)] == naive.refs
        assert [b for b in range(pool.total) if pool.is_pinned(b)] == sorted(block for _, block in naive.pins)
        assert len(naive.pins) <= naive.cap
        held = [sum(b in table for table in self.tables) + pool.is_pinned(b) for b in range(pool.total)]
        assert naive.refs == held, "references: the tables and pins that hold the block"
        stats = pool.stats()
        named = sum(b in naive.names for b in naive.unused)
        assert (stats.free, stats.evictable) == (len(naive.unused) - named, named)
        assert (stats.used, stats.pinned) == (pool.total - len(naive.unused), len(naive.pins))
        assert (stats.evictions, stats.pins_refused) == (naive.evictions, naive.refused)
        for digest in [d for digests in self.chains for d in digests]:
            assert pool.match([digest], SIZE + 1) == naive.match([digest], SIZE + 1)

    def teardown(self) -> None:
        if hasattr(self, "pool"):
            assert order_of(self.pool) == self.naive.unused, "eviction: in this very order"


PoolMachine.TestCase.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
TestPool = PoolMachine.TestCase


def test_a_hit_always_leaves_a_token_to_compute() -> None:
    pool = pool_of(8)
    table = filled(pool, chain("a", 3))
    assert pool.match(chain("a", 3), 3 * SIZE + 1) == table
    assert pool.match(chain("a", 3), 3 * SIZE) == table[:2]  # an exact multiple: not its last block
    assert pool.match(chain("a", 3), 1) == []
    pool.release(table)
    assert pool.match(chain("a", 3), 3 * SIZE) == table[:2]  # nor when it is only cached


def test_the_tail_of_a_chain_goes_before_its_head_and_the_least_recently_used_chain_first() -> None:
    pool = pool_of(6)
    a, b = filled(pool, chain("a", 3)), filled(pool, chain("b", 3))
    pool.release(b)
    pool.release(a)
    assert order_of(pool) == [*reversed(b), *reversed(a)]


def test_unnamed_blocks_go_first() -> None:
    pool = pool_of(7)
    a, b = filled(pool, chain("a", 2), extra=1), filled(pool, chain("b", 2), extra=2)
    pool.release(a)
    pool.release(b)
    assert order_of(pool) == [b[2], b[3], a[2], *reversed(a[:2]), *reversed(b[:2])]


def test_a_hit_revives_from_the_middle_of_the_list() -> None:
    pool = pool_of(6)
    tables = [filled(pool, chain(name, 2)) for name in "abc"]
    for table in tables:
        pool.release(table)
    a, b, c = tables
    assert pool.take(pool.match(chain("b", 2), 2 * SIZE + 1), 0) == b
    pool.check()
    pool.release(b)
    assert order_of(pool) == [*reversed(a), *reversed(c), *reversed(b)]


def test_a_refused_admission_changes_nothing() -> None:
    pool = pool_of(6)
    held = filled(pool, chain("a", 2))
    pool.release(filled(pool, chain("b", 2)))
    hits = pool.match([*chain("b", 2)], 99)
    before = pool.stats(), [pool.references(b) for b in range(6)]
    assert pool.cost_of(hits, 3) == 5 > pool.available == 4  # the hits themselves are among the available
    assert pool.cost_of(pool.match(chain("a", 2), 99), 3) == 3  # in use already: they cost nothing
    assert (pool.stats(), [pool.references(b) for b in range(6)]) == before
    pool.release(held)


def test_content_computed_twice_stays_findable_while_its_first_copy_lives() -> None:
    pool = pool_of(6)
    first, second = pool.take((), 2), pool.take((), 2)  # both admitted before either was published
    for table, fresh in ((first, True), (second, False)):
        assert [pool.publish(block, digest) for block, digest in zip(table, chain("a", 2), strict=True)] == [fresh] * 2
    pool.release(second)
    assert pool.match(chain("a", 2), 99) == first
    assert pool.take((), 2) == second  # never named, so given out first
    pool.release(first)
    assert pool.match(chain("a", 2), 99) == first
    assert pool.take((), 4)[2:] == first[::-1]
    assert pool.match(chain("a", 2), 99) == []


def test_unpublished_blocks_are_not_found_and_go_first() -> None:
    pool = pool_of(4, pinned=2)
    table = filled(pool, chain("a", 3))
    pool.pin(0, table[:2])
    pool.unpublish(table[1])
    assert pool.match(chain("a", 3), 99) == table[:1]
    assert [pool.is_pinned(b) for b in table] == [True, False, False]
    pool.release(table)
    assert order_of(pool) == [table[1], 3, table[2]]
    pool.expire_pins(10 * S_NS)
    assert order_of(pool) == [table[0]]


def test_pins_outlive_their_sequence_up_to_the_cap_and_until_nobody_asks() -> None:
    pool = pool_of(8, pinned=3)
    a, b = filled(pool, chain("a", 2)), filled(pool, chain("b", 2))
    pool.pin(0, a)
    pool.pin(1, b)
    assert (pool.stats().pinned, pool.stats().pins_refused) == (3, 1)
    pool.release(a)
    pool.release(b)
    everything = pool.take((), pool.available)  # a flood of other work
    assert not set(everything) & {*a, b[0]}, "pinned blocks are never evicted"
    assert pool.match(chain("a", 2), 99) == a
    pool.release(everything)
    pool.pin(5 * S_NS, a)  # renewed, though the cap is reached
    pool.expire_pins(10 * S_NS)
    assert [pool.is_pinned(block) for block in (*a, b[0])] == [True, True, True]
    pool.expire_pins(10 * S_NS + 1)  # b was asked for at 1 only
    assert [pool.is_pinned(block) for block in (*a, b[0])] == [True, True, False]
    pool.expire_pins(15 * S_NS)
    assert pool.stats().pinned == 0 and pool.available == 8
    assert pool.match(chain("a", 2), 99) == a, "let go is not thrown away"


def test_a_pin_on_nothing_is_no_pin() -> None:
    pool = pool_of(4, pinned=2)
    pool.pin(0, pool.take((), 2))
    assert (pool.stats().pinned, pool.stats().pins_refused) == (0, 0)


def test_a_pool_that_is_off_finds_nothing() -> None:
    pool = pool_of(4, enabled=False)
    table = filled(pool, chain("a", 2))
    assert pool.match(chain("a", 2), 99) == []
    pool.pin(0, table)
    pool.release(table)
    assert pool.stats().evictable == 0 and sorted(order_of(pool)) == [0, 1, 2, 3]


@pytest.mark.parametrize(("tenant", "found"), [("alice", 3), ("bob", 0), ("alice\x00m", 0), ("", 0)])
def test_the_same_prompt_is_found_by_its_own_tenant_only(tenant: str, found: int) -> None:
    hasher = Hasher(b"k" * 16, SIZE)
    tokens = list(range(3 * SIZE + 2))
    pool = pool_of(8)
    pool.release(filled(pool, list(hasher.chain(hasher.root("alice", "m"), tokens))))
    assert len(pool.match(hasher.chain(hasher.root(tenant, "m"), tokens), len(tokens))) == found


def test_a_tenant_cannot_pass_for_another_by_its_name() -> None:
    hasher = Hasher(b"k" * 16, SIZE)
    roots = [hasher.root(*names) for names in (("ab", "c"), ("a", "bc"), ("abc", ""), ("", "abc"), ("c", "ab"))]
    assert len(set(roots)) == len(roots)
    assert hasher.digest("text", "ab", "c") not in roots, "a text key is no root"
    assert Hasher(b"j" * 16, SIZE).root("ab", "c") != roots[0], "another key, other digests"


def test_a_chain_digest_depends_on_all_tokens_before_it() -> None:
    hasher = Hasher(b"k" * 16, SIZE)
    root = hasher.root("t", "m")
    one, other = list(range(12)), [99, *range(1, 12)]
    assert not set(hasher.chain(root, one)) & set(hasher.chain(root, other))
    assert hasher.chain(root, one)[:2] == hasher.chain(root, one[:11])  # a rest has no digest


def test_what_nobody_listens_to_is_not_kept() -> None:
    pool = pool_of(4)
    filled(pool, chain("a", 3))
    assert pool.drain() == ((), ())


def test_what_came_and_went_between_two_drains_is_no_news() -> None:
    pool = pool_of(3)
    pool.listen()
    pool.release(filled(pool, chain("a", 2)))
    assert pool.drain() == (tuple(chain("a", 2)), ())
    pool.release(filled(pool, chain("b", 3)))  # evicts both
    pool.release(filled(pool, chain("a", 2)))  # computed again, over two of these
    assert pool.drain() == ((b"b0",), ()), "a was there and is there; b1 and b2 came and went"


def test_a_scripted_trace_gives_blocks_back_in_this_very_order() -> None:
    """vLLM's ``test_prefill``: fresh from the front; back go rests first of all, and chains tail first at the end."""
    pool = pool_of(10)
    system = chain("s", 3)
    first = filled(pool, [*system, b"x"], extra=1)
    assert first == [0, 1, 2, 3, 4]
    second = filled(pool, [*system, b"y"], extra=1)
    assert second == [0, 1, 2, 5, 6]
    assert [pool.references(b) for b in range(7)] == [2, 2, 2, 1, 1, 1, 1]
    pool.release(first)
    assert [pool.references(b) for b in range(7)] == [1, 1, 1, 0, 0, 1, 1]
    pool.release(second)
    assert order_of(pool) == [6, 4, 7, 8, 9, 3, 5, 2, 1, 0], "rests, never used, own tails, the system's tail to head"
    assert pool.stats().evictions == 5


def test_a_block_filled_while_decoding_gets_its_name_and_the_next_turn_finds_it() -> None:
    """vLLM's ``test_decode``."""
    pool = pool_of(6)
    table = filled(pool, chain("a", 2), extra=1)
    answer = chain("a", 3)
    assert pool.match(answer, 99) == table[:2]
    assert pool.publish(table[2], answer[2])
    assert pool.match(answer, 3 * SIZE + 1) == table
    pool.release(table)
    assert order_of(pool) == [3, 4, 5, *reversed(table)]


def test_of_two_blocks_with_one_content_the_unnamed_copy_may_go_and_the_content_is_found() -> None:
    """vLLM's ``test_maybe_evict_cached_block`` keeps both findable. Here the second copy never gets a name.

    So there is no copy to fall back on when the first is evicted, which comes later than the second's end: what has no
    name goes to the front of the list. In exchange the index is one block a digest, and nothing is held twice for long.
    """
    pool = pool_of(4)
    pool.listen()
    first, second = pool.take((), 1), pool.take((), 1)
    assert [pool.publish(block[0], b"same") for block in (first, second)] == [True, False]
    pool.release(first)
    assert pool.match([b"same"], 99) == first, "evictable, and found"
    pool.release(second)
    assert pool.take((), 3)[0] == second[0]
    assert pool.match([b"same"], 99) == first
    assert pool.take((), 1) == first
    assert pool.match([b"same"], 99) == []
    assert pool.drain() == ((), ()), "it came and went"


def test_a_failed_admission_leaves_counts_order_and_names_as_they_were() -> None:
    """vLLM's ``test_prefill_not_enough_free_blocks_with_computed_blocks``, through the batcher: see also the worlds."""
    one, other = pool_of(6), pool_of(6)
    for pool in (one, other):
        held = filled(pool, chain("a", 3))
        pool.release(filled(pool, chain("b", 2)))
        assert pool.references(held[0]) == 1
    hits = one.match([*chain("a", 2), b"new"], 99)
    assert one.cost_of(hits, 4) > one.available  # asked, and refused: nothing was taken
    assert one.stats() == other.stats()
    assert order_of(one) == order_of(other)

"""A class's system prompt through the whole replica machine, while ten times the pool's blocks of other work pass by.
"""

from __future__ import annotations

import pytest

from engine.config import BatcherConfig, PrefixConfig, ReplicaConfig
from engine.events import Ended, Plan, RunStep, Submit
from engine.model.blockhash import Hasher
from engine.model.counting import CountingRunner
from engine.policy.replica import Replica
from engine.units import S_NS

SIZE, BLOCKS, TTL_S = 4, 64, 10
SYSTEM = [1] * (5 * SIZE)
HASHER = Hasher(b"k" * 16, SIZE)


class Shop:
    """A replica under work; a step takes a millisecond."""

    def __init__(self, cap: int = 8) -> None:
        batcher = BatcherConfig(step_tokens=64, slots=6, reserved_slots=0, reserved_blocks=0)
        prefix = PrefixConfig(block_tokens=SIZE, blocks=BLOCKS, pinned_blocks=cap, pin_ttl_s=TTL_S)
        self.machine = Replica(ReplicaConfig(batcher=batcher, prefix=prefix, kv_events=True))
        self.runner = CountingRunner(HASHER)
        self.now_ns = self.sid = 0

    def ask(self, tokens: list[int], pinned_blocks: int = 0) -> Ended:
        """Submit, and run until it has ended."""
        self.sid += 1
        self.runner.add(self.sid, len(tokens), 3, 3)
        blocks = HASHER.chain(b"root", tokens)
        self.machine.handle(self.now_ns, Submit(
            self.sid, self.sid, "t", "c", 1, self.now_ns, 1 << 60, len(tokens), 3, blocks, pinned_blocks,
        ))
        for _ in range(100):
            step = next((a for a in self.machine.handle(self.now_ns, Plan()) if isinstance(a, RunStep)), None)
            assert step is not None
            self.now_ns += S_NS // 1000
            for action in self.machine.handle(self.now_ns, self.runner.advance(step, 1)):
                if isinstance(action, Ended):
                    self.machine.handle(self.now_ns, Plan())  # the next thing that happens to a replica
                    self.machine.check()
                    return action
        raise AssertionError("it never ends")

    def flood(self) -> None:
        """Ten times the pool, in prompts that nobody has seen before."""
        blocks = 0
        while blocks < 10 * BLOCKS:
            tokens = [1000 + self.sid * 100 + n for n in range(9 * SIZE)]
            assert self.ask(tokens).cached_tokens == 0
            blocks += 10

    @property
    def evictions(self) -> int:
        return self.machine.stats().prefix.evictions


@pytest.mark.parametrize(("pinned", "cached"), [(5, len(SYSTEM)), (2, 2 * SIZE), (0, 0)])
def test_what_is_pinned_survives_a_flood_of_ten_pools_and_what_is_not_does_not(pinned: int, cached: int) -> None:
    shop = Shop()
    assert shop.ask([*SYSTEM, 2, 3], pinned).cached_tokens == 0
    assert shop.ask([*SYSTEM, 4, 5], pinned).cached_tokens == len(SYSTEM), "before the flood it is there in any case"
    shop.flood()
    assert shop.evictions > 8 * BLOCKS, "a flood"
    assert shop.ask([*SYSTEM, 6, 7], pinned).cached_tokens == cached


def test_a_pin_lapses_when_nobody_asked_for_so_long_and_is_renewed_by_whoever_asks() -> None:
    shop = Shop()
    shop.ask([*SYSTEM, 2], 5)
    shop.now_ns = 8 * S_NS
    assert shop.ask([*SYSTEM, 3], 5).cached_tokens == len(SYSTEM)
    shop.now_ns = 17 * S_NS  # 17 s after the first, 9 after the last
    shop.flood()
    assert shop.machine.stats().prefix.pinned == 5
    shop.now_ns = 19 * S_NS
    shop.ask([7] * 5)
    assert shop.machine.stats().prefix.pinned == 0
    assert shop.ask([*SYSTEM, 4]).cached_tokens == len(SYSTEM), "let go, not thrown away"
    shop.flood()
    assert shop.ask([*SYSTEM, 5]).cached_tokens == 0


def test_beyond_the_cap_a_pin_is_refused_and_counted_and_its_block_goes_with_the_flood() -> None:
    shop = Shop(cap=3)
    shop.ask([*SYSTEM, 2], 5)
    stats = shop.machine.stats().prefix
    assert (stats.pinned, stats.pins_refused) == (3, 2)
    shop.flood()
    assert shop.ask([*SYSTEM, 3], 5).cached_tokens == 3 * SIZE
    assert shop.machine.stats().prefix.pins_refused == 4

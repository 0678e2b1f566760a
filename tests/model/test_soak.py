"""Two thousand requests through the worker's own driver and the tiny model: memory does not grow, nobody is remembered.

Run: python -m pytest tests/model/test_soak.py -q -s      (the real process with real weights: make drill)
Mutations it caught: the runner never forgets; ages of those that were seen at once stay in their heap.
"""

from __future__ import annotations

import gc
from collections import Counter
from pathlib import Path

import torch

from engine.config import BatcherConfig, PrefixConfig, ReplicaConfig
from engine.events import Abort
from engine.ledger.journal import JournalWriter
from engine.model.blockhash import Hasher
from engine.model.loader import LoadedModel
from engine.model.packing import PackedLinear
from engine.model.runner import TorchRunner
from engine.model.wire import ToReplica
from engine.model.worker import ReplicaDriver
from engine.policy.replica import Replica
from engine.units import S_NS
from tests.model.held import held, rss_mb
from tests.model.visitors import Visitors

WARM, REQUESTS = 500, 2_000
GROWTH_MB = 20.0
ALWAYS = 150  # objects more or less that the books of a pool and of three tenants may hold at one time or another


class Worker:
    """The loop of the replica process, its clock counted and its socket left out."""

    def __init__(self, model: LoadedModel, config: ReplicaConfig, journal: JournalWriter) -> None:
        hasher = Hasher(b"k" * 16, config.prefix.block_tokens)
        self.runner = TorchRunner(model, config.prefix.blocks, config.prefix.block_tokens, hasher)
        self.driver = ReplicaDriver(Replica(config), self.runner, journal)
        self.visitors, self.now_ns = Visitors(hasher, most_tokens=8, longest_tail=40), 0

    def serve(self, requests: int, in_flight: int) -> Counter[str]:
        """So many more, never more than ``in_flight`` at a time; some are given up. What is held in the end, by type.

        Machine and runner alone: weights and pages do not count.
        """
        visitors = self.visitors
        last = visitors.sid + requests
        while visitors.live or visitors.sid < last:
            mailbox: list[ToReplica] = []
            while visitors.sid < last and len(visitors.live) < in_flight:
                mailbox.append(visitors.ask(self.now_ns))
            if visitors.rng.random() < 0.1:
                mailbox.append(Abort(visitors.anyone()))
            self.now_ns += S_NS // 20
            step, output = self.driver.begin(self.now_ns, mailbox)
            visitors.hear(output)
            if step is not None:
                result = self.runner.run(step, lambda: False, lambda tokens: None)
                visitors.hear(self.driver.finish(self.now_ns, result))
        self.now_ns += 100 * S_NS  # what is only kept for a time has its time behind it
        self.driver.begin(self.now_ns, [])
        gc.collect()
        return held([self.driver.machine, self.runner], but=[self.runner.model, self.runner.pool])


def meet_all_sizes(model: LoadedModel, rows: int) -> None:
    """oneDNN keeps a compiled kernel for each number of rows and shape of weights, half a MB each: all of them now."""
    with torch.inference_mode():
        for linear in [module for module in model.model.modules() if isinstance(module, PackedLinear)] * 2:
            for n in range(1, rows + 1):
                linear(torch.zeros(1, n, linear.in_features))


def test_memory_is_flat_over_two_thousand_requests(tiny: LoadedModel, tmp_path: Path) -> None:
    config = ReplicaConfig(
        batcher=BatcherConfig(step_tokens=64, slots=16, reserved_slots=2, reserved_blocks=8),
        prefix=PrefixConfig(blocks=96, pinned_blocks=8, pin_ttl_s=30.0),
    )
    journal = JournalWriter(tmp_path / "replica.ndjson", "replica", config, b"k" * 16)
    worker = Worker(tiny, config, journal)
    meet_all_sizes(tiny, config.batcher.step_tokens)
    worker.serve(WARM - 100, in_flight=32)
    warm, warm_mb = worker.serve(100, in_flight=1), rss_mb()
    crowded, crowded_mb = worker.serve(REQUESTS - 400, in_flight=32), rss_mb()  # a queue, always
    lonely, lonely_mb = worker.serve(400, in_flight=1), rss_mb()  # and never one: nothing is tidied up in passing
    journal.close()
    ends, stats = worker.visitors.ends, worker.driver.machine.stats()
    print(f"\nRSS MB: warm {warm_mb:.1f}, after 1,600 in a queue {crowded_mb:.1f}, after 400 alone {lonely_mb:.1f}")
    print(f"objects held: {warm.total()}, {crowded.total()}, {lonely.total()}; {dict(ends)}; {stats.prefix}")
    assert ends.total() == WARM + REQUESTS and ends["aborted"] > 50
    assert stats.prefix.evictions > 20 * stats.prefix.total and stats.preemptions > 0, "the pool was turned over"
    assert (stats.running, stats.waiting, stats.queued_tokens) == (0, 0, 0)
    assert stats.prefix.free + stats.prefix.evictable == stats.prefix.total - stats.prefix.pinned
    assert max(crowded_mb, lonely_mb) - warm_mb < GROWTH_MB
    for name, before, after in (("with a queue", warm, crowded), ("one at a time", crowded, lonely)):
        assert not {"_Sequence", "Sequence", "Submit", "SamplingParams"} & after.keys(), "nobody is remembered"
        assert after.total() - before.total() < ALWAYS, f"{name}: {dict(after - before)} are kept"

"""What the prefix cache gains and costs: SmolLM2 behind the real replica machine, cache on and off in turn.

Gain: 512 shared + 32 own + 16 new tokens, one request at a time and eight at once; time to the first token and whole
latency, off over on. One alone is decoded at the memory's speed, which bounds what a cache can do for the whole; in a
sale they come together. The step's budget holds a whole prompt, so that the arm without a cache is not cut into chunks.
Then the same over the share of the prompt that was seen before, 0 to 100 %, as ``runs/bench/prefix_share.png``.

Cost: prompts that share nothing, with a pool so small that each new block evicts an old one. Arms take turns batch by
batch; the chain's digests count, as the ingress has to make them. Wall clock and CPU time with their intervals: the
cost lies far below what a machine in use lets one see. So the policy and the hashing are timed apart too, without a
model, and set in relation to the whole request's CPU time.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import random
import sys
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple

from engine.config import BatcherConfig, PrefixConfig, ReplicaConfig
from engine.events import Plan, RunStep, SeqEnd, StepDone, Submit
from engine.model.blockhash import Hasher
from engine.model.loader import LoadedModel, load, prepare
from engine.policy.replica import Replica
from tests.bench.blocks import block_tokens
from tests.bench.figure import Figure
from tests.bench.intervals import Ratio, paired_ratio
from tests.bench.live_replica import Answered, Ask, LiveReplica
from tests.bench.share_plot import ShareRow, draw_shares

THREADS, POOL_TOKENS, STEP_TOKENS = 2, 5120, 640
SHARED, OWN, NEW = 512, 32, 16
CROWD, CROWD_REPEATS = 8, 3
REPEATS, SHARE_REPEATS, COST_PAIRS, COST_BATCH = 9, 5, 16, 4
SHARES = (0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
POLICY_REQUESTS, POLICY_ROUNDS = 400, 5
PLOT = Path(__file__).parents[2] / "runs" / "bench" / "prefix_share.png"


class Arms(NamedTuple):
    """The same replica twice."""

    on: LiveReplica
    off: LiveReplica


def bench(device: str = "cpu") -> list[Figure]:
    """Gains off / on, the cost at no reuse on / off."""
    model = load(prepare("smollm2", lambda line: None), device=device, threads=THREADS)
    hasher = Hasher(b"bench", block_tokens(device))
    words = Words(model, hasher)
    arms = Arms(*(LiveReplica(model, _config(on, hasher.block_tokens), hasher) for on in (True, False)))
    for arm in arms:
        arm.answer(words.ask(0), words.ask(0))  # warm-up
    alone, crowd = gain(arms, words, 1, REPEATS), gain(arms, words, CROWD, CROWD_REPEATS)
    rows = curve(arms, words)
    draw_shares(rows, SHARED + OWN, NEW, PLOT)
    wall, cpu = cost(arms, words)
    on_us, off_us, request_us = policy_cost(arms.off, words)
    _say(f"no reuse, time on / off by the wall clock     {wall}")
    _say(f"no reuse, CPU time on / off                  {cpu}")
    _say(f"no reuse, policy and hashing alone: {on_us:.0f} us a request on, {off_us:.0f} us off; difference "
         f"{(on_us - off_us) / request_us:.4%} of a request's {request_us / 1e3:.0f} ms of CPU time")
    return [
        *alone, *crowd,
        Figure(wall.middle, "no reuse: time a batch on / off, wall clock", "off", 1.0),
        Figure(cpu.middle, "no reuse: CPU time a batch on / off", "off", 1.0),
        Figure(request_us + on_us - off_us, "us of CPU a request, no reuse, policy and hashing on", "off", request_us),
    ]


class Words:
    """Prompts of random tokens; what is new has never been there before."""

    def __init__(self, model: LoadedModel, hasher: Hasher) -> None:
        self._rng, self._vocab, self._hasher = random.Random(1), model.vocab_size, hasher
        self.block_tokens = hasher.block_tokens
        self._root = hasher.root("local", model.name)
        self.shared = self.new(SHARED)

    def new(self, tokens: int) -> list[int]:
        """Tokens that nobody has seen."""
        return [self._rng.randrange(3, self._vocab) for _ in range(tokens)]

    def ask(self, shared_tokens: int) -> Ask:
        """A prompt that starts with so many of the shared tokens."""
        return self.chained(self.shared[:shared_tokens] + self.new(SHARED + OWN - shared_tokens))

    def chained(self, prompt: list[int]) -> Ask:
        """With the digests that the ingress would bring."""
        return Ask(prompt, NEW, blocks=self._hasher.chain(self._root, prompt))


def _config(enabled: bool, size: int) -> ReplicaConfig:
    return ReplicaConfig(
        batcher=BatcherConfig(step_tokens=STEP_TOKENS, slots=16, reserved_slots=0, reserved_blocks=0),
        prefix=PrefixConfig(enabled=enabled, block_tokens=size, blocks=POOL_TOKENS // size, pinned_blocks=0),
    )


def gain(arms: Arms, words: Words, together: int, repeats: int) -> list[Figure]:
    """So many requests at a time, arms in turn; medians."""
    seen: tuple[list[Answered], list[Answered]] = ([], [])
    arms.on.answer(words.ask(SHARED))
    for _ in range(repeats):
        asks = [words.ask(SHARED) for _ in range(together)]
        for arm, found in zip(arms, seen, strict=True):
            found += arm.answer(*asks)
    on, off = seen
    assert [a.tokens for a in on] == [a.tokens for a in off], "the cache changes no token"
    assert {a.cached_tokens for a in on} == {SHARED}, "the shared part was found, and no more"
    return [
        Figure(median(getattr(a, name) for a in off), f"ms {words_}, {together} at once, no cache", "with the cache",
               median(getattr(a, name) for a in on))
        for name, words_ in (("ttft_ms", "to the first token"), ("e2e_ms", "to the last token"))
    ]


def curve(arms: Arms, words: Words) -> list[ShareRow]:
    """The same over how much of the prompt was seen before; the off arm as its reference throughout."""
    rows: list[ShareRow] = []
    _say(f"{'share seen':>10}{'cached':>8}{'TTFT on ms':>12}{'off ms':>9}{'off / on':>9}{'whole on':>10}{'off ms':>9}"
         f"{'off / on':>9}")
    for share in SHARES:
        cached = round(share * SHARED)
        arms.on.answer(words.ask(cached))
        on: list[Answered] = []
        off: list[Answered] = []
        for _ in range(SHARE_REPEATS):
            ask = words.ask(cached)
            on += arms.on.answer(ask)
            off += arms.off.answer(ask)
        row = ShareRow(
            share, on[0].cached_tokens, median(a.ttft_ms for a in on), median(a.ttft_ms for a in off),
            median(a.e2e_ms for a in on), median(a.e2e_ms for a in off),
        )
        rows.append(row)
        _say(f"{row.share:>10.1%}{row.cached_tokens:>8}{row.ttft_on_ms:>12.1f}{row.ttft_off_ms:>9.1f}"
             f"{row.ttft_off_ms / row.ttft_on_ms:>9.2f}{row.whole_on_ms:>10.1f}{row.whole_off_ms:>9.1f}"
             f"{row.whole_off_ms / row.whole_on_ms:>9.2f}")
    return rows


def cost(arms: Arms, words: Words) -> tuple[Ratio, Ratio]:
    """(wall clock, CPU time) of a batch that shares nothing, on / off; who begins changes from pair to pair."""
    seconds: tuple[list[tuple[float, float]], list[tuple[float, float]]] = ([], [])
    for pair in range(COST_PAIRS):
        prompts = [words.new(SHARED + OWN) for _ in range(COST_BATCH)]
        for number in (0, 1) if pair % 2 else (1, 0):
            wall, cpu = time.perf_counter(), time.process_time()
            asks = [words.chained(prompt) if number == 0 else Ask(prompt, NEW) for prompt in prompts]
            arms[number].answer(*asks)
            seconds[number].append((time.perf_counter() - wall, time.process_time() - cpu))
    on, off = seconds
    wall_ratio, cpu_ratio = (paired_ratio([s[i] for s in on], [s[i] for s in off]) for i in (0, 1))
    return wall_ratio, cpu_ratio


def policy_cost(replica: LiveReplica, words: Words) -> tuple[float, float, float]:
    """CPU us a request: machine and hashing with the cache, without it, and a whole request on the model without it."""
    prompts = [words.new(SHARED + OWN) for _ in range(POLICY_REQUESTS)]
    best = {True: float("inf"), False: float("inf")}
    for _ in range(POLICY_ROUNDS):
        for enabled in best:
            best[enabled] = min(best[enabled], _machine_us(enabled, prompts, words))
    began = time.process_time()
    replica.answer(*(Ask(prompt, NEW) for prompt in prompts[: 2 * COST_BATCH]))
    return best[True], best[False], (time.process_time() - began) / (2 * COST_BATCH) * 1e6


def _machine_us(enabled: bool, prompts: list[list[int]], words: Words) -> float:
    """The machine alone: each request arrives, is planned, prefilled and decoded by a model that takes no time."""
    machine = Replica(_config(enabled, words.block_tokens))
    began = time.process_time()
    for sid, prompt in enumerate(prompts):
        blocks = words.chained(prompt).blocks if enabled else ()
        machine.handle(sid, Submit(sid, sid, "local", "help", 1, sid, 1 << 60, len(prompt), NEW, blocks))
        outputs = 0
        while outputs < NEW:
            step = next(action for action in machine.handle(sid, Plan()) if isinstance(action, RunStep))
            outputs += step.at_most
            first, ended = (sid,) if outputs == 1 else (), (SeqEnd(sid, "length"),) if outputs >= NEW else ()
            machine.handle(sid, StepDone(step.at_most, first=first, ended=ended))
    return (time.process_time() - began) / len(prompts) * 1e6


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)

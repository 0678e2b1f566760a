"""A stopwatch does not tell a tenant what another has asked: over HTTP, with the power of the test said and shown.

Run: python -m pytest tests/service/test_isolation_timing.py -q -rP    (-rP prints the figures)

One tenant asks; then another asks the same and, as often, what nobody has asked: pairs in random order, one request at
a time. If answers took equally long whoever asked before, each pair's difference would be as likely below zero as above
it by the same amount, so Wilcoxon's signed-rank test is exact. It raises a false alarm once in a million runs. The
effect that it would have found with a probability of 95 % is computed from the spread that this very run had: half of
what a hit is worth, at most. What a hit is worth the control shows, where the first tenant asks its own again.
Mutations it caught: keys, the roots of block hashes, without the tenant.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from engine.config import ClassConfig, PrefixConfig
from engine.stepcost import StepCost
from tests.service.conftest import Starter
from tests.service.harness import CHAT, SCENARIO, STEP_20_MS, Engine, body

PAIRS = 48
FALSE_ALARM = 1e-6
POWER = 0.95
TRIALS = 400  # resampled runs for each effect that is tried
STEP_40_MS = msgspec.structs.replace(STEP_20_MS, fixed_ns=40e6)
SLOW_PROMPTS = StepCost(
    fixed_ns=2e6, prefill_token_ns=0.3e6, prefill_row_ns=0, decode_row_ns=0, decode_kv_ns=0, area_ns=0
)
WORDS = (
    "kettle", "parcel", "voucher", "return", "refund", "colour", "size", "stock", "price", "card", "gift", "order",
    "islands", "cup", "lid", "filter",
)


def tail_of(pairs: int) -> np.ndarray:
    """P(rank sum >= w), w = 0, 1, ..., where each of the ranks 1 to ``pairs`` is in it or not, by a coin."""
    chances = np.ones(1)
    for rank in range(1, pairs + 1):
        longer = np.zeros(len(chances) + rank)
        longer[: len(chances)] += chances / 2
        longer[rank:] += chances / 2
        chances = longer
    return np.cumsum(chances[::-1])[::-1]


TAIL = tail_of(PAIRS)


def p_values(differences: np.ndarray) -> np.ndarray:
    """Two-sided, exact; ``differences`` (runs, PAIRS), none zero, no two of one size."""
    ranks = np.argsort(np.argsort(np.abs(differences), axis=1), axis=1) + 1
    below = np.sum(ranks * (differences < 0), axis=1)
    return np.minimum(1.0, 2 * TAIL[np.maximum(below, PAIRS * (PAIRS + 1) // 2 - below)])


@dataclass(frozen=True)
class Compared:
    """What is known to somebody against what is new to all; milliseconds."""

    p: float
    effect_ms: float  # median of the differences; below zero: the known is quicker
    found_ms: float  # an effect of this size is found with a probability of ``POWER``

    @classmethod
    def of(cls, differences_ms: Sequence[float], rng: np.random.Generator) -> Compared:
        """Effects are laid over runs that are drawn from this run's own differences, their median taken out."""
        seen = np.array(differences_ms)
        middle = float(np.median(seen))
        noise = rng.choice(seen - middle, (TRIALS, PAIRS)) * rng.choice((-1, 1), (TRIALS, PAIRS))
        noise += rng.normal(0, 1e-6, noise.shape)  # no ties
        low, high = 0.0, 1.0
        while np.mean(p_values(noise - high) <= FALSE_ALARM) < POWER:
            low, high = high, 2 * high
        while high - low > 0.02 * high:
            tried = (low + high) / 2
            if np.mean(p_values(noise - tried) <= FALSE_ALARM) < POWER:
                low = tried
            else:
                high = tried
        return cls(float(p_values(seen[None])[0]), middle, high)


Ask = Callable[[str], float]


def asker(engine: Engine, tenant: str) -> tuple[Ask, Callable[[], None]]:
    """``ask(text)`` takes so many ms until the first and only token is there; one connection, kept."""
    client = engine.http(tenant, **{"x-doorbuster-class": "chat"})

    def ask(text: str) -> float:
        began_ns = time.perf_counter_ns()
        assert client.post(CHAT, json=body(text, max_tokens=1)).status_code == 200
        return (time.perf_counter_ns() - began_ns) / 1e6

    return ask, client.close


def compare(engine: Engine, tenant: str, known: list[str], new: list[str], rng: np.random.Generator) -> Compared:
    """Pairs of one known and one new question; which of them goes first is a coin's word."""
    ask, close = asker(engine, tenant)
    ask(text_of(rng, 3))  # the connection is there
    differences = []
    for one, other in zip(known, new, strict=True):
        if rng.random() < 0.5:
            mine = ask(one)
            differences.append(mine - ask(other))
        else:
            theirs = ask(other)
            differences.append(ask(one) - theirs)
    close()
    return Compared.of(differences, rng)


def text_of(rng: np.random.Generator, words: int) -> str:
    """Not asked before, and told apart by its first words."""
    return f"{rng.integers(10**8):08d} " + " ".join(rng.choice(WORDS, words))


def scene(engine: Engine, words: int) -> tuple[Compared, Compared]:
    """(Another tenant, the one who had asked.)"""
    rng = np.random.default_rng(5)
    known, *new = [[text_of(rng, words) for _ in range(PAIRS)] for _ in range(3)]
    ask, close = asker(engine, "shop")
    for text in known:
        ask(text)
    close()
    stranger = compare(engine, "bank", rng.permutation(known).tolist(), new[0], rng)
    owner = compare(engine, "shop", rng.permutation(known).tolist(), new[1], rng)
    for name, found in (("stranger", stranger), ("owner", owner)):
        print(f"{name}: p {found.p:.2g}, effect {found.effect_ms:+.2f} ms, found from {found.found_ms:.2f} ms on")
    return stranger, owner


def judge(stranger: Compared, owner: Compared) -> None:
    assert owner.p <= FALSE_ALARM / 1000 and owner.effect_ms < 0, f"whoever asked before is answered sooner: {owner}"
    assert stranger.p > FALSE_ALARM, f"what another has asked shows in the time that an answer takes: {stranger}"
    assert stranger.found_ms <= -owner.effect_ms / 2, f"half a hit would have been seen: {stranger}, {owner}"


def test_an_answer_of_another_tenant_does_not_show_in_the_time(started: Starter) -> None:
    judge(*scene(started(STEP_40_MS), words=4))


def test_blocks_of_another_tenant_do_not_show_in_the_time(started: Starter) -> None:
    """The prefix cache: no answer is kept, but a prompt whose blocks are there needs no prefill."""
    chat = ClassConfig(criticality="standard", slo_ttft_ms=60_000, max_tokens=200, caches="none")
    engine = started(SLOW_PROMPTS, classes=SCENARIO.classes | {"chat": chat}, prefix=PrefixConfig(blocks=8192))
    judge(*scene(engine, words=100))

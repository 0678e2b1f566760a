"""Equivalence 2: live drivers and twin, same workload, steps that take exactly ``cost(step)``: identical journals.

Run: python -m pytest tests/equivalence/test_virtual_time.py -q
Mutations it caught: plan before the mailbox is read; Ended told before the tokens' machine event; wake at a window's
end rounded up; followers resumed in another order; a several-step run that is not cut when a message comes.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from engine.config import (
    BatcherConfig,
    BreakerConfig,
    ClassConfig,
    ExactConfig,
    LimiterConfig,
    OverloadConfig,
    PrefixConfig,
    RetryConfig,
    Scenario,
    SemanticConfig,
    TenantConfig,
    gateway_config,
    replica_config,
)
from engine.events import Arrive, Charged, Ended, StoreAnswer, Submit
from engine.ledger.journal import GatewayEntry, JournalWriter, ReplicaEntry, open_journal
from engine.model.blockhash import Hasher
from engine.model.fake import FakeRunner
from engine.model.smalllm import small_tokenizer
from engine.model.stepping import SamplingParams
from engine.model.tokenizer import Detokenizer
from engine.model.worker import ReplicaDriver
from engine.policy.gateway import Gateway
from engine.policy.replica import Replica
from engine.service.charges import charge_of
from engine.service.driver import GatewayDriver
from engine.stepcost import StepCost
from engine.units import MS_NS, S_NS
from sim.twin.driver import Lags
from sim.twin.encoder import EncoderCost
from sim.twin.replay import replay
from sim.twin.system import TwinArrival, TwinSystem
from tests.equivalence.virtual import InProcessReplica, Links, VirtualEncoder, VirtualLoop

ENCODER = EncoderCost(fixed_ns=31_000_003, text_ns=9_000_011, max_batch=4)
DIMS = 8
STEP_MS = 110
SHORT_TOKENS = 16  # tips in a brown-out
COST = StepCost(
    fixed_ns=21_000_017, prefill_token_ns=1_900_003, prefill_row_ns=500_009, decode_row_ns=2_500_001,
    decode_kv_ns=4_001, area_ns=301,
)
TENANTS = {"shop": TenantConfig(weight=3.0), "greedy": TenantConfig(rate_rps=1.0, burst=3.0, tokens_per_s=400.0)}


def scenario(replicas: int = 1, door: bool = False) -> Scenario:
    """Small enough for shortage everywhere: slots, blocks, answers, patience. ``door``: and shorter answers then."""
    return Scenario(
        name="tight",
        replicas=replicas,
        classes={
            "fraud": ClassConfig(
                "critical", slo_ttft_ms=1000, max_tokens=4, caches="none", pinned=True, cap_rps=4.0
            ),
            "help": ClassConfig("standard", slo_ttft_ms=3000, max_tokens=24, timeout_ms=9000, caches="semantic"),
            "tips": ClassConfig(
                "sheddable", slo_ttft_ms=1500, max_tokens=24, fallback="popular.txt", caches="semantic",
                brownout_max_tokens=SHORT_TOKENS * door,
            ),
        },
        batcher=BatcherConfig(
            step_tokens=64, slots=6, reserved_slots=1, reserved_blocks=6, max_step_ms=STEP_MS, step_margin=0.0,
            age_ms=1500, watermark=0.05,
        ),
        prefix=PrefixConfig(block_tokens=16, blocks=64, pinned_blocks=8),
        exact=ExactConfig(ttl_s=4.0, stale_s=10.0, max_mib=0.002, revalidate_s=2.0 * (replicas > 1)),
        limiter=LimiterConfig(rate_rps=500, burst=500, user_rps=1.0, user_burst_s=4.0),
        overload=OverloadConfig(hold_ms=750, degraded_share=0.35),
        retry=RetryConfig(budget_most=1),
        semantic=SemanticConfig(
            deadline_ms=45, cosine=0.97, approximate_cosine=0.9, ttl_s=4.0, stale_s=10.0, max_entries=30,
            audit_share=0.5, coalesce=replicas > 1,
        ),
        encoder_breaker=BreakerConfig(
            window="count", window_size=8, minimum_calls=4, slow_share=0.25, open_ms=700, half_open_permits=2
        ),
        breaker=BreakerConfig(window="count", window_size=12, minimum_calls=6, open_ms=400, half_open_permits=2),
    )


def fails_at(replica: int, began_ns: int) -> bool:
    """The first replica's steps of a second and a half, in the middle of the rush."""
    return replica == 0 and 9 * S_NS < began_ns < 10.5 * S_NS


def workload(hasher: Hasher, seed: int) -> list[tuple[Arrive, list[int], list[int], TwinArrival]]:
    """Request, prompt, answer, and the twin's view of it. Twenty seconds: calm, three times too much, calm again."""
    rng = np.random.default_rng(seed)
    encode, decode = small_tokenizer().encode, small_tokenizer().decode
    rules = "Keep to the shop's rules. " * 6
    system = {name: encode(f"You are the desk for {name}. {rules}") for name in scenario().classes}
    out = []
    at_s = 0.0
    for rid in range(320):
        at_s += rng.exponential(1 / (7 if at_s < 8 or at_s > 17 else 22))
        name = str(rng.choice(list(system), p=[0.1, 0.5, 0.4]))
        topic = int(rng.zipf(1.4)) % 40 if name != "fraud" else 1000 + rid
        words = f"question {topic} about the {'very ' * (topic % 13)}thing number {topic * topic}"
        words += " please" * int(rng.integers(0, 3)) if name != "fraud" else ""
        said = encode(words)[:23]
        prompt = system[name] + said
        tenant = "greedy" if name == "tips" and rid % 3 == 0 else "shop"
        cls = scenario().classes[name]
        ask = Arrive(
            rid, f"r{rid}", tenant, name, round(at_s * S_NS), len(prompt), cls.max_tokens,
            exact_key=hasher.digest("exact", tenant, name, decode(prompt)), text_key=hasher.digest("text", words),
            hard_key=hasher.digest("hard", tenant, name),
            blocks=hasher.chain(hasher.root(tenant, "fake"), prompt),
            pinned_blocks=len(system[name]) // 16 if cls.pinned else 0,
            draw=int.from_bytes(hasher.digest("draw", str(rid))[:7], "little"), attempt=int(rid % 5 == 0),
            asker=hasher.digest("asker", str(rid % 7)) if rid % 3 == 0 else b"",
        )
        answer = said[: cls.max_tokens]
        text = decode(answer).encode()
        gives_up_ns = ask.arrived_ns + round(rng.exponential(2.0) * S_NS) if rid % 9 == 0 else None
        cut = decode(answer[:SHORT_TOKENS]).encode()
        short = (hasher.digest("answer", cut).hex(), len(cut)) if name == "tips" else None
        arrival = TwinArrival(ask, len(answer), hasher.digest("answer", text).hex(), len(text), gives_up_ns, short)
        out.append((ask, prompt, answer, arrival))
    return out


def charges() -> list[tuple[int, str, str, str, int]]:
    """Embeddings, at odd moments of the same twenty seconds, by those who ask for text too: when, name, who, tokens."""
    who = (("shop", "0"), ("greedy", ""), ("shop", "1"), ("greedy", ""), ("shop", "2"), ("greedy", ""))
    return [(n * 331_313_117 + 7, f"e{n}", *who[n % 6], 12 + n) for n in range(60)]


def vectors(asks: list[Arrive]) -> dict[bytes, np.ndarray]:
    """Made up: near one another where text keys are of one question, as far as a test needs it."""
    out: dict[bytes, np.ndarray] = {}
    for ask in asks:
        rng = np.random.default_rng(int.from_bytes(ask.text_key[:4], "big"))
        topic = np.random.default_rng(len(out) % 17).normal(size=DIMS)
        vector = topic / np.linalg.norm(topic) + 0.12 * rng.normal(size=DIMS)
        out.setdefault(ask.text_key, (vector / np.linalg.norm(vector)).astype(np.float32))
    return out


def run_live(folder: Path, seed: int, replicas: int, door: bool) -> None:
    hasher = Hasher(b"key", 16)
    loop = VirtualLoop()
    asyncio.set_event_loop(loop)
    tight = scenario(replicas, door)
    config = gateway_config(tight, TENANTS)
    requests = workload(hasher, seed)
    answers = {tuple(prompt): answer for _, prompt, answer, _ in requests}
    links, journals = Links(), []
    for n in range(config.replicas):
        replica = replica_config(tight, TENANTS, n, COST)
        runner = FakeRunner(lambda prompt: answers[tuple(prompt)], hasher, None)
        journals.append(JournalWriter(folder / f"journal/replica-{n}.ndjson", "replica", replica, hasher.key))
        driver = ReplicaDriver(Replica(replica), runner, journals[-1])
        links.replicas.append(
            InProcessReplica(loop, driver, runner, COST, lambda output: gateway.hear(output), fails_at)
        )
    gateway = GatewayDriver(
        Gateway(config), loop.now_ns, links, hasher, lambda: Detokenizer(small_tokenizer()),
        {"fallback:tips": "these five"},
        JournalWriter(folder / "journal/gateway-0.ndjson", "gateway", config, hasher.key),
        encoder=VirtualEncoder(loop, ENCODER, vectors([ask for ask, *_ in requests])), dims=DIMS,
    )

    async def sale() -> None:
        tasks = [asyncio.create_task(replica.run()) for replica in links.replicas]
        for ask, prompt, _, arrival in requests:
            loop.call_at(ask.arrived_ns / S_NS, gateway.arrive, ask, prompt, SamplingParams())
            if arrival.gives_up_ns is not None:
                loop.call_at(arrival.gives_up_ns / S_NS, gateway.cancel, ask.rid)
        for charged_ns, *asked in charges() if door else ():
            loop.call_at(charged_ns / S_NS, gateway.charge, *asked)
        done = loop.create_future()
        loop.call_at(120.0, done.set_result, None)
        await done
        for task in tasks:
            task.cancel()

    loop.run_until_complete(sale())
    assert gateway.in_flight == 0
    gateway.close()
    for journal in journals:
        journal.close()
    loop.close()


def run_twin(folder: Path, seed: int, replicas: int, door: bool) -> None:
    hasher = Hasher(b"key", 16)
    arrivals = [arrival for *_, arrival in workload(hasher, seed)]
    known = vectors([arrival.ask for arrival in arrivals])
    asked = [(ns, charge_of(hasher, n, *what)) for n, (ns, *what) in enumerate(charges())]
    TwinSystem(
        scenario(replicas, door), TENANTS, COST, Lags(), arrivals, hasher, folder, check=True, encoder=ENCODER,
        vectors=known, fails=fails_at, charges=asked if door else (),
    ).run()


def lines(folder: Path, name: str) -> list[GatewayEntry | ReplicaEntry]:
    return list(open_journal(folder / "journal" / name).entries())


def compare(folder: Path, seed: int, replicas: int, door: bool = False) -> str:
    """Both ways into ``folder``, compared line by line; the gateway's journal."""
    run_live(folder / "live", seed, replicas, door)
    run_twin(folder / "twin", seed, replicas, door)
    for name in ("gateway-0.ndjson", *(f"replica-{n}.ndjson" for n in range(replicas))):
        live, twin = lines(folder / "live", name), lines(folder / "twin", name)
        for ours, theirs in zip(live, twin, strict=False):
            assert ours == theirs, f"{name}: first difference at {ours.at_ns / S_NS:.6f} s"
        assert len(live) == len(twin)
        assert replay(folder / "live" / "journal" / name).identical
    return (folder / "live/journal/gateway-0.ndjson").read_text()


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_live_drivers_and_twin_write_the_same_journal(tmp_path: Path, seed: int) -> None:
    text = compare(tmp_path, seed, 1)
    for what in ('"tier":"exact"', '"tier":"coalesced"', '"tier":"approximate"', '"tier":"fallback"', "rate_limited",
                 "overloaded", '"LevelRecord"', '"tier":"semantic"', '"StoreVector"', '"DropVector"', '"status":"late"',
                 '"DropAnswer"', '"level":2', '"Cancel"', '"Abort"', '"deadline"', '"BreakerRecord"', "breaker_open",
                 '"boundary":"replica-0"', '"boundary":"encoder"', "model_failed", '"kind":"audit"', '"Hold"',
                 '"Release"'):
        assert what in text, f"the workload no longer exercises {what}"
    assert any(e.at_most > 1 for entry in lines(tmp_path / "live", "replica-0.ndjson") for e in entry.actions
               if hasattr(e, "at_most")), "the workload no longer runs several steps at once"
    steps = [a for entry in lines(tmp_path / "live", "replica-0.ndjson") for a in entry.actions if hasattr(a, "shape")]
    longest_ns = max(COST.ns(step.shape) for step in steps if step.shape.prefill_tokens > 16)
    assert STEP_MS * MS_NS - COST.prefill_token_ns * 2 < longest_ns <= STEP_MS * MS_NS, "steps are cut to their time"
    assert '"preemptions":' in text, "the workload no longer preempts"


@pytest.mark.parametrize("seed", [6, 7])
def test_so_they_do_where_embeddings_are_paid_for_and_a_brown_out_cuts_answers_short(tmp_path: Path, seed: int) -> None:
    compare(tmp_path, seed, 1, door=True)
    entries = lines(tmp_path / "live", "gateway-0.ndjson")
    charged = {a.code for entry in entries for a in entry.actions if isinstance(a, Charged)}
    assert charged == {"", "rate_limited"}, "embeddings come out of the same account"
    short = {a.sid for entry in entries for a in entry.actions
             if isinstance(a, Submit) and a.max_tokens == SHORT_TOKENS}
    ended = [e for e in entries if isinstance(e.event, Ended) and e.event.sid in short]
    assert {e.event.reason for e in ended} >= {"stop", "length"}, "some had no more to say"  # type: ignore[union-attr]
    for entry in ended:
        stored = any(isinstance(action, StoreAnswer) for action in entry.actions)
        assert not stored or entry.event.reason == "stop", "what was cut short is kept for nobody"  # type: ignore[union-attr]


@pytest.mark.parametrize("seed", [4, 5])
def test_so_they_do_with_several_replicas(tmp_path: Path, seed: int) -> None:
    text = compare(tmp_path, seed, 3)
    for replica in range(3):
        assert f'"replica":{replica}' in text, "the router no longer uses all replicas"
    assert '"kind":"audit"' in text and '"kind":"refresh"' in text
    assert '"boundary":"replica-0"' in text
    assert '"boundary":"replica-1"' not in text

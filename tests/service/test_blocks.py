"""KV blocks over the real wire: a client that leaves gives them back at once, a stampede computes its prefix once.

Run: python -m pytest tests/service/test_blocks.py -q
Mutations it caught: prompt blocks never published; pins not taken; Abort ignored.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx

from engine.config import replica_config
from engine.events import Abort, Ended, Plan, RunStep, Submit
from engine.ledger.journal import ReplicaEntry, open_journal
from engine.policy.replica import Replica
from tests.service.harness import CHAT, DEADLINE_S, SCENARIO, STEP_20_MS, start

SLOW = {"model": "default", "messages": [{"role": "user", "content": "word " * 80}], "stream": True}


def replica_entries(folder: Path) -> list[ReplicaEntry]:
    return list(open_journal(folder / "journal" / "replica-0.ndjson").entries())  # type: ignore[arg-type]


def test_within_two_steps_of_a_disconnect_all_blocks_but_the_pinned_are_back(tmp_path: Path) -> None:
    with start(tmp_path, STEP_20_MS) as engine:
        with engine.http("bank", **{"x-doorbuster-class": "fraud"}) as bank:
            fraud = {"model": "default", "messages": [{"role": "user", "content": "Payment 1: 12.50 EUR, from DE."}]}
            assert bank.post(CHAT, json=fraud).status_code == 200
        with engine.http() as shop, shop.stream("POST", CHAT, json=SLOW) as response:
            next(response.iter_lines())  # the stream has begun
        engine.quiet()
        with engine.http() as shop:  # one more plan, so that the replica says how things stand
            body = {"model": "default", "messages": [{"role": "user", "content": "still there?"}], "max_tokens": 1}
            assert shop.post(CHAT, json=body).status_code == 200
        engine.quiet()
    entries = replica_entries(tmp_path)
    machine = Replica(replica_config(SCENARIO))
    steps_after: int | None = None
    for entry in entries:
        if isinstance(entry.event, Abort):
            steps_after = 0
        assert machine.handle(entry.at_ns, entry.event) == entry.actions
        steps_after = None if steps_after is None else steps_after + any(isinstance(a, RunStep) for a in entry.actions)
        stats = machine.stats().prefix
        if steps_after is not None and isinstance(entry.event, Abort | Plan) and not machine.stats().running:
            assert stats.free + stats.evictable == stats.total - stats.pinned
            assert stats.pinned > 0, "the fraud prompt stays resident"
            assert steps_after <= 2
            return
    raise AssertionError("the disconnect never reached the replica")


def test_fifty_requests_with_one_new_system_prompt_compute_its_full_blocks_once(tmp_path: Path) -> None:
    rules = " ".join(f"Rule {i}: be brief about item {i * 7}." for i in range(14))
    system = f"You answer for the flash sale desk. {rules}"

    async def stampede(url: str, key: str) -> list[int]:
        async with httpx.AsyncClient(base_url=url, timeout=DEADLINE_S, trust_env=False) as client:
            bodies = [
                {"model": "default", "max_tokens": 1,
                 "messages": [{"role": "system", "content": system}, {"role": "user", "content": f"item {i}?"}]}
                for i in range(50)
            ]
            headers = {"authorization": f"Bearer {key}"}
            answers = await asyncio.gather(*(client.post(CHAT, json=b, headers=headers) for b in bodies))
            return [a.status_code for a in answers]

    with start(tmp_path, STEP_20_MS) as engine:
        assert asyncio.run(stampede(engine.url, engine.keys["shop"])) == [200] * 50
        engine.quiet()
    entries = replica_entries(tmp_path)
    submits = [e.event for e in entries if isinstance(e.event, Submit)]
    ends = {a.sid: a for e in entries for a in e.actions if isinstance(a, Ended)}
    size = SCENARIO.prefix.block_tokens
    shared = 0
    while len({s.blocks[: shared + 1] for s in submits if len(s.blocks) > shared}) == 1:
        shared += 1
    assert shared >= 8, "the prompts share their system prompt's full blocks"
    computed = sum(end.computed_tokens for end in ends.values())
    own = sum(submit.prompt_tokens - shared * size for submit in submits)
    assert computed == own + shared * size, "the shared blocks were computed once, everything else for each"

"""A thousand clients that go away at any moment, by FIN and by RST: nothing of theirs stays behind.

Before their body is whole, queued, in prefill, before and after the first token; some stay to the end. Then
blocks, slots, refunds and tasks are exactly what they were, and the journals replay.

Run: python -m pytest tests/service/test_vanishing.py -q
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
import struct
from pathlib import Path

from engine.config import LimiterConfig, replica_config
from engine.events import Record, RequestRecord
from engine.ledger.journal import ReplicaEntry, open_journal
from engine.policy.gcra import UNIT
from engine.policy.replica import Replica
from engine.stepcost import StepCost
from tests.service.harness import SCENARIO, body, journal, start

CLIENTS, TOGETHER = 1000, 60
STEP_2_MS = StepCost(fixed_ns=2e6, prefill_token_ns=0, prefill_row_ns=0, decode_row_ns=0, decode_kv_ns=0, area_ns=0)
SPARSE = LimiterConfig(rate_rps=1e6, burst=1e6, tokens_per_s=1e-6, token_burst_s=1e12)  # spent stays spent: a million
RESET = struct.pack("ii", 1, 0)


async def visit(host: str, port: int, key: str, n: int, rng: random.Random) -> str:
    """One client; where it went away."""
    said = json.dumps(body(f"client {n} asks: " + "word " * rng.randint(1, 80), stream=True, max_tokens=40)).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\n"
        f"connection: close\r\ncontent-type: application/json\r\ncontent-length: {len(said)}\r\n\r\n"
    ).encode()
    reader, writer = await asyncio.open_connection(host, port)
    moment = rng.choice(("body", "at once", "soon", "soon", "first", "later", "end"))
    try:
        writer.write(head + (said[: len(said) // 2] if moment == "body" else said))
        await writer.drain()
        if moment == "soon":
            await asyncio.sleep(rng.random() * 0.4)
        if moment in ("first", "later", "end"):
            await reader.readuntil(b"data: ")
        if moment == "later":
            for _ in range(rng.randint(1, 20)):
                await reader.readuntil(b"data: ")
        if moment == "end":
            await reader.readuntil(b"data: [DONE]")
    except asyncio.IncompleteReadError:
        moment += ", over"  # it was done before its client
    if rng.random() < 0.5:
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    writer.transport.abort() if rng.random() < 0.5 else writer.close()
    return moment


async def crowd(url: str, key: str) -> list[str]:
    host, port = url.removeprefix("http://").split(":")
    room, rng = asyncio.Semaphore(TOGETHER), random.Random(7)

    async def one(n: int) -> str:
        async with room:
            return await visit(host, int(port), key, n, random.Random(rng.random()))

    return await asyncio.gather(*(one(n) for n in range(CLIENTS)))


def test_nothing_of_a_thousand_who_left_stays_behind(tmp_path: Path) -> None:
    with start(tmp_path, STEP_2_MS, limiter=SPARSE) as engine:
        moments = asyncio.run(crowd(engine.url, engine.keys["shop"]))
        engine.quiet()  # nothing is on its way, and no task is left but the server's own
        stats = engine.stats()
        limiter = engine.inside.driver.machine.limiter
        owed = engine.call(lambda: limiter._tenants.tokens._paid.get("shop", 0) / UNIT)
        engine.call(engine.inside.driver.machine.check)
        with engine.http() as client:  # one more plan, so that the replica says how things stand
            assert client.post("/v1/chat/completions", json=body("still there?", max_tokens=1)).status_code == 200
        engine.quiet()
    assert {moment.split(",")[0] for moment in moments} == {"body", "at once", "soon", "first", "later", "end"}
    assert stats.in_flight == 0 and stats.arrived == stats.ended > CLIENTS / 2
    assert stats.fleet.breakers[0].open_permits == 0, "every seat was given back"
    assert stats.fleet.breakers[0].state == "closed", "who leaves is no failure"
    records = [
        action.record for entry in journal(tmp_path) for action in entry.actions
        if isinstance(action, Record) and isinstance(action.record, RequestRecord)
    ][:-1]
    assert len(records) == stats.arrived
    ends = {record.outcome for record in records}
    assert {"served", "cancelled"} <= ends
    used = sum(r.prompt_tokens + r.output_tokens for r in records if r.computed_tokens)
    assert round(owed) == used, "what was reserved and not used came back, to the token"
    assert 0 < used < sum(r.prompt_tokens + 40 for r in records)
    machine = Replica(replica_config(SCENARIO))
    entries: list[ReplicaEntry] = list(open_journal(tmp_path / "journal" / "replica-0.ndjson").entries())  # type: ignore[arg-type]
    for entry in entries:
        assert machine.handle(entry.at_ns, entry.event) == entry.actions
    machine.check()
    last = machine.stats()
    assert last.running == last.waiting == 0
    assert last.prefix.free + last.prefix.evictable == last.prefix.total - last.prefix.pinned

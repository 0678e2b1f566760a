"""Histories of sessions over two gateways' stores, with faults: linearizable, as long as Redis keeps what it took.

The weaker guarantee, where it does not (killed without a disk, flushed), is tested in ``test_redis_sessions.py``: no
turn is lost while a gateway lives that has seen it, none stands there twice, each gateway's own keep their order; the
turns of several gateways may come in another order than they were said.

invariant: mutation that it caught
- linearizable: compare-and-set without the comparison; a write's own id not looked at
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from pathlib import Path

import pytest

from engine.policy.sessions import NEW, Session, Turn
from engine.service.redis_connection import RedisAway
from engine.service.session_redis import RedisSessions
from engine.units import S_NS
from tests.service.histories import Done, linearizable
from tests.service.redis_server import Proxy, actor, redis_server


def test_the_checker_knows_good_from_bad() -> None:
    first = Done("append", 0, 1, "a", (), True)
    assert linearizable([first, Done("read", 0.5, 2), Done("read", 2.5, 3, seen=("a",))])
    assert not linearizable([first, Done("read", 1.5, 2)]), "read after the append, and did not see it"
    assert not linearizable([first, Done("append", 2, 3, "b", (), True)]), "two won the same comparison"
    maybe = Done("append", 0, math.inf, "a", ())
    assert linearizable([maybe, Done("read", 1, 2), Done("read", 3, 4, seen=("a",))])
    assert not linearizable([maybe, Done("read", 1, 2, seen=("a",)), Done("read", 3, 4)]), "seen, then unseen"


def values(session: Session) -> tuple[str, ...]:
    return tuple(turn.turn_id for turn in session.turns)


async def worker(store: RedisSessions, name: str, key: str, until: asyncio.Event, history: list[Done]) -> None:
    """Reads, and appends to what it read; a write without a reply is sent once more under its own id."""
    number, now = 0, time.monotonic
    while not until.is_set():
        called = now()
        try:
            session = (await store.load(key)).session
        except RedisAway:
            await asyncio.sleep(0.01)
            continue
        history.append(Done("read", called, now(), seen=values(session)))
        number += 1
        turn = f"{name}{number}"
        new = Session(session.version + 1, "o", (*session.turns, Turn(turn, b"", b"")))
        called, took = now(), None
        for _ in range(2):
            try:
                took = (await store.save(key, session.version, new, turn)).saved
                break
            except RedisAway:
                await asyncio.sleep(0.01)
        returned = math.inf if took is None else now()
        history.append(Done("append", called, returned, turn, values(session), took))
        if len(history) > 400:
            return


@pytest.mark.parametrize("seed", range(3))
def test_linearizable_through_kills_pauses_and_delays(tmp_path: Path, seed: int) -> None:
    """Four clients at two gateways, two sessions, a durable Redis: killed, stopped, slow, cut, in random order."""

    async def main() -> None:
        die = random.Random(seed)
        histories: dict[str, list[Done]] = {"s": [], "t": []}
        until = asyncio.Event()
        with redis_server(tmp_path, durable=True) as server:
            async with Proxy(server.port) as one, Proxy(server.port) as two, \
                    actor(one.port) as left, actor(two.port) as right:
                stores = [RedisSessions(each, "p", 3600 * S_NS) for each in (left, right)]
                tasks = [
                    asyncio.create_task(worker(stores[n % 2], f"{key}{n}.", key, until, history))
                    for n in range(4) for key, history in histories.items()
                ]
                for _ in range(10):
                    grown = sum(map(len, histories.values())) + 12
                    deadline_s = time.monotonic() + 3
                    while sum(map(len, histories.values())) < grown and time.monotonic() < deadline_s:
                        await asyncio.sleep(0.005)  # something must have been done between two faults
                    fault = die.choice(["kill", "pause", "slow", "cut"])
                    proxy = die.choice([one, two])
                    if fault == "kill":
                        server.kill()
                        server.start()
                    elif fault == "pause":
                        server.pause()
                        await asyncio.sleep(0.06)
                        server.resume()
                    elif fault == "slow":
                        proxy.delay_s = die.choice([0.02, 0.1])
                        await asyncio.sleep(0.1)
                        proxy.delay_s = 0.0
                    else:
                        proxy.cut()
                until.set()
                await asyncio.gather(*tasks)
            async with actor(server.port, budget_ms=5000) as last:
                for key, history in histories.items():
                    seen = values((await RedisSessions(last, "p", S_NS).load(key)).session)
                    history.append(Done("read", time.monotonic(), time.monotonic(), seen=seen))
        for history in histories.values():
            tried = [op for op in history if op.kind == "append"]
            assert any(op.took for op in tried) and len(set(history[-1].seen)) == len(history[-1].seen)
            assert linearizable(history), "no order explains what was seen"

    assert values(NEW) == ()
    asyncio.run(main())

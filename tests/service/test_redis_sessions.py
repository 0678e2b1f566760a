"""Sessions of two gateways over one Redis: conflicts, repeats, and what goes on while Redis is away.

invariant: mutation that it caught
- merge on return: what is local not sent; the store's turns replaced by the local ones
- emptied store: what it lost not restored
- one turn in flight: written without looking at the version
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.policy.sessions import Conflict, Repeat, Session, Turn
from engine.redis_config import SessionsConfig
from engine.service.session_memory import Copy, SessionMemory
from engine.service.sessions import Held, Sessions, session_key
from tests.service.redis_server import RedisServer, actor, reached, redis_server

CONFIG = SessionsConfig()
KEY = session_key("shop", "s1")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    with redis_server(tmp_path) as started:
        yield started


async def say(sessions: Sessions, text: str, key: str = KEY, again: str = "") -> Held:
    held = await sessions.begin(key, again)
    assert isinstance(held, Held), held
    assert (await sessions.finish(held, text.encode(), b"answer")).kept
    return held


async def history(sessions: Sessions, key: str = KEY) -> list[str]:
    held = await sessions.begin(key)
    assert isinstance(held, Held)
    await sessions.abandon(held)
    return [turn.asked.decode() for turn in held.session.turns]


def test_in_memory_alone() -> None:
    async def main() -> None:
        now = [0]
        sessions = Sessions(SessionsConfig(ttl_s=60.0), clock_ns=lambda: now[0])
        await say(sessions, "one", again="k")
        held = await sessions.begin(KEY)
        assert isinstance(held, Held) and not held.degraded
        assert isinstance(await sessions.begin(KEY), Conflict)
        repeated = await sessions.begin(KEY, "k")
        assert isinstance(repeated, Repeat) and repeated.turn.asked == b"one"
        assert isinstance(await sessions.begin(session_key("other", "s1")), Held), "another tenant's is another"
        now[0] += 36 * 10**9  # longer than a turn may be held
        late = held
        await say(sessions, "two")
        assert not (await sessions.finish(late, b"late", b"")).kept
        assert await history(sessions) == ["one", "two"]
        now[0] += 61 * 10**9
        assert await history(sessions) == []

    asyncio.run(main())


def test_memory_is_bounded() -> None:
    memory = SessionMemory(SessionsConfig(max_sessions=3, max_bytes=5000))
    for n in range(10):
        memory.put(n, str(n), Copy(unacknowledged={"t"} if n == 0 else set()))
        memory.get(n, "1")
        memory.check()
    assert memory.get(9, "1") and not memory.get(9, "0") and memory.stats().lost_turns == 1
    big = Copy(Session(1, "o", (Turn("t", b"q" * 4400, b""),)))
    memory.put(10, "big", big)
    memory.check()
    assert memory.stats().sessions == 1


def test_two_gateways_share_a_session(server: RedisServer) -> None:
    async def main() -> None:
        async with actor(server.port, budget_ms=5000) as left, actor(server.port, budget_ms=5000) as right:
            one, two = Sessions(CONFIG, left), Sessions(CONFIG, right)
            await say(one, "a", again="k")
            held = await two.begin(KEY)
            assert isinstance(held, Held) and [turn.asked for turn in held.session.turns] == [b"a"]
            assert isinstance(await one.begin(KEY), Conflict), "one turn in flight, whoever asks"
            assert (await two.finish(held, b"b", b"answer")).kept
            assert isinstance(await two.begin(KEY, "k"), Repeat)
            began = await asyncio.gather(*(each.begin(KEY) for each in [one, two] * 10))
            assert sum(isinstance(each, Held) for each in began) == 1
            [held] = [each for each in began if isinstance(each, Held)]
            await one.abandon(held)
            assert await history(two) == await history(one) == ["a", "b"]
            with server.client() as client:
                [name] = [name for name in client.scan_iter() if b"session" in name]
                assert 1_790_000 < client.pttl(name) <= 1_800_000, "the time to live is renewed with each write"

    asyncio.run(main())


@pytest.mark.parametrize("fault", ["killed", "stopped"])
def test_away_it_goes_on_and_is_merged_on_return(server: RedisServer, fault: str) -> None:
    """Killed: the server comes back empty. Stopped: it comes back with what it had."""

    async def main() -> None:
        async with actor(server.port) as left, actor(server.port) as right:
            one, two = Sessions(CONFIG, left), Sessions(CONFIG, right)
            await say(one, "a")
            await say(two, "b")
            assert await history(one) == ["a", "b"]
            server.kill() if fault == "killed" else server.pause()
            began_s = time.monotonic()
            held = await say(one, "left alone")
            assert time.monotonic() - began_s < 0.25, "four budgets at the very most"
            await say(two, "right alone")
            assert held.degraded and one.degraded == two.degraded == 1 and await one.merge_all() == 0
            server.start() if fault == "killed" else server.resume()
            await asyncio.gather(reached(left), reached(right))
            assert await one.merge_all() == 1 and await two.merge_all() == 1
            assert one.degraded == two.degraded == 0
            assert await history(one) == await history(two) == ["a", "b", "left alone", "right alone"]
            await say(two, "c")
            assert (await history(one))[-1] == "c" and not one.degraded

    asyncio.run(main())


def test_an_emptied_store_gets_back_what_gateways_know(server: RedisServer) -> None:
    async def main() -> None:
        async with actor(server.port, budget_ms=5000) as left, actor(server.port, budget_ms=5000) as right:
            one, two = Sessions(CONFIG, left), Sessions(CONFIG, right)
            await say(two, "a")
            await say(one, "b")
            server.flush()
            await say(two, "c")  # knows of "a" only
            assert await history(one) == ["a", "c", "b"], "nothing is lost; what others had comes later"
            held = await one.begin(KEY)
            assert isinstance(held, Held)
            server.flush()  # with the turn in flight
            assert (await one.finish(held, b"d", b"")).kept
            assert await history(two) == ["a", "c", "b", "d"]

    asyncio.run(main())

"""The client actor against a real Redis that is killed, stopped, slow and flushed.

invariant: mutation that it caught
- own value: a cancelled call leaves the line
- budget: no timer
- breaker: no acquire
- NOSCRIPT: not sent whole
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import uvloop

from engine.errors import UserError
from engine.service.redis_actor import RedisActor, script
from engine.service.redis_connection import Address, RedisAway, RedisRefused, address
from tests.service.redis_server import Proxy, RedisServer, actor, reached, redis_server


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    with redis_server(tmp_path) as started:
        yield started


def balanced(made: RedisActor) -> bool:
    stats = made.stats()
    return stats.calls == stats.replies + stats.errors + stats.away + stats.refused and not stats.waiting


async def outcome(made: RedisActor, *words: str) -> tuple[object, float]:
    began_s = time.monotonic()
    try:
        reply: object = await made.call(*words)
    except RedisAway as away:
        reply = away
    return reply, time.monotonic() - began_s


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_a_cancelled_call_never_gives_its_reply_to_another(
    server: RedisServer, loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    """1,000 of 3,000 calls are cancelled at random moments; each GET that ends returns its own key's value."""

    async def main() -> None:
        die = random.Random(7)
        async with actor(server.port, budget_ms=5000) as made:
            await asyncio.gather(*(made.call("SET", f"k{n}", f"v{n}") for n in range(300)))
            live: dict[asyncio.Task[bytes], int] = {}
            cancelled = 0

            async def get(n: int) -> bytes:
                return await made.call("GET", f"k{n}")

            async def settle(task: asyncio.Task[bytes], n: int) -> None:
                try:
                    assert await task == f"v{n}".encode(), f"k{n}"
                except asyncio.CancelledError:
                    assert task.cancelled()

            while cancelled < 1000:
                for n in die.choices(range(300), k=30):
                    live[asyncio.create_task(get(n))] = n
                for _ in range(die.randrange(4)):  # some were not sent yet, some are on their way
                    await asyncio.sleep(die.choice((0, 0, 0.0006)))
                for task in die.sample(list(live), 10):
                    cancelled += task.cancel()
                done = [task for task in live if task.done()]
                await asyncio.gather(*(settle(task, live.pop(task)) for task in done))
            await asyncio.gather(*(settle(task, n) for task, n in live.items()))
            stats = made.stats()
            assert cancelled >= 1000 and stats.connections == 1 and balanced(made), "no cancellation costs a connection"

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(main())


def test_calls_of_one_tick_travel_together(server: RedisServer) -> None:
    async def main() -> None:
        async with actor(server.port) as made:
            await made.call("PING")
            before = made.stats().batches
            await asyncio.gather(*(made.call("SET", f"k{n}", n) for n in range(500)))
            assert made.stats().batches == before + 1

    asyncio.run(main())


def test_a_script_goes_whole_once_and_by_its_digest_after(server: RedisServer) -> None:
    async def main() -> None:
        lua = script("session_save.lua")
        async with actor(server.port) as made:
            for _ in range(3):
                await made.run(lua, ["{a}"], ["0", "1", "x", "1000", "w"])
            assert made.stats().evals == 1
            with server.client() as other:
                other.script_flush()
            await made.run(lua, ["{a}"], ["0", "1", "x", "1000", "w"])
            assert made.stats().evals == 2
            with pytest.raises(RedisRefused):
                await made.call("NONSENSE")
            assert await made.call("PING") == b"PONG", "a mistake of ours ends no connection"
            assert balanced(made) and made.stats().connections == 1

    asyncio.run(main())


def test_killed_calls_end_and_the_next_life_is_found(server: RedisServer) -> None:
    async def main() -> None:
        async with actor(server.port) as made:
            await made.call("SET", "k", "v")
            calls = [asyncio.create_task(outcome(made, "GET", "k")) for _ in range(50)]
            await asyncio.sleep(0)
            server.kill()
            ended = await asyncio.gather(*calls, *(outcome(made, "GET", "k") for _ in range(50)))
            assert all(reply == b"v" or isinstance(reply, RedisAway) for reply, _ in ended)
            assert any(isinstance(reply, RedisAway) for reply, _ in ended)
            assert (await outcome(made, "GET", "k"))[1] < 0.01 and made.stats().breaker.state == "open"
            server.start()
            await reached(made)
            assert await made.call("GET", "k") is None and balanced(made)

    asyncio.run(main())


@pytest.mark.parametrize("fault", ["stopped", "slow"])
def test_silent_or_slow_every_call_ends_within_the_budget(server: RedisServer, fault: str) -> None:
    """And nothing that comes late is taken for another's."""

    async def main() -> None:
        async with Proxy(server.port) as proxy, actor(proxy.port) as made:
            await asyncio.gather(*(made.call("SET", f"k{n}", f"v{n}") for n in range(50)))
            if fault == "stopped":
                server.pause()
            else:
                proxy.delay_s = 0.2
            took_s: list[float] = []
            for _ in range(20):
                ended = await asyncio.gather(*(outcome(made, "GET", f"k{n}") for n in range(50)))
                took_s += [each_s for _, each_s in ended]
                assert all(isinstance(reply, RedisAway) for reply, _ in ended)
            took_s.sort()
            assert took_s[0] >= 0 and took_s[-1] < 0.1, f"50 ms and the loop's delay: {took_s[-1]:.3f} s"
            assert made.stats().breaker.opened and took_s[len(took_s) * 9 // 10] < 0.005, "the breaker spares the rest"
            server.resume()
            proxy.delay_s = 0.0
            await reached(made)
            values = await asyncio.gather(*(made.call("GET", f"k{n}") for n in range(50)))
            assert values == [f"v{n}".encode() for n in range(50)] and balanced(made)

    asyncio.run(main())


def test_a_cut_line_is_made_anew(server: RedisServer) -> None:
    async def main() -> None:
        async with Proxy(server.port) as proxy, actor(proxy.port) as made:
            await made.call("SET", "k", "v")
            proxy.cut()
            await reached(made)
            server.flush()
            assert await made.call("GET", "k") is None and made.stats().connections == 2

    asyncio.run(main())


def test_too_many_waiting_calls_are_refused_at_once(server: RedisServer) -> None:
    async def main() -> None:
        async with actor(server.port, max_waiting=10) as made:
            ended = await asyncio.gather(*(outcome(made, "PING") for _ in range(25)))
            assert [reply for reply, _ in ended].count(b"PONG") == 10 and made.stats().refused == 15

    asyncio.run(main())


def test_close_ends_whoever_waits(server: RedisServer) -> None:
    async def main() -> None:
        async with actor(server.port, budget_ms=60_000) as made:
            await made.call("PING")
            server.pause()
            waiting = asyncio.create_task(outcome(made, "PING"))
            await asyncio.sleep(0)
            await made.close()
            assert isinstance((await waiting)[0], RedisAway) and balanced(made)

    asyncio.run(main())


def test_addresses() -> None:
    assert address("redis://ann:p%40ss@shop:7000/3") == Address("shop", 7000, "", 3, "ann", "p@ss")
    assert address("unix:///run/redis.sock").path == "/run/redis.sock"
    assert address("rediss://shop").tls
    for wrong in ("http://shop", "redis://shop:port", "redis://shop/x", "unix://"):
        with pytest.raises(UserError, match=r"shared\.url"):
            address(wrong)

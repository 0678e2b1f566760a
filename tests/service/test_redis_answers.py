"""Exact answers that two gateways share: leases, fencing, what was called off, against the policy's own rule.

invariant: mutation that it caught
- one computation: the lease not looked at
- fencing: the token not compared
- called off: not looked at in the store; the tenant's own words only
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.events import Invalidate
from engine.policy.invalidation import Invalidations
from engine.redis_config import SharedConfig
from engine.service.redis_connection import RedisAway
from engine.service.shared_answers import Alone, Lease, SharedAnswers, SharedHit, Wait
from tests.service.redis_server import RedisServer, actor, redis_server

SLOW = SharedConfig(budget_ms=5000)
WORDS = st.builds(
    Invalidate, tenant=st.sampled_from(["", "a", "b"]), tag=st.sampled_from(["", "x", "y"]),
    answer_id=st.sampled_from(["", "", "one", "two"]), version=st.sampled_from([0, 0, 1, 2]),
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with redis_server(tmp_path_factory.mktemp("redis")) as started:
        yield started


def test_one_of_a_hundred_computes(server: RedisServer) -> None:
    """Two gateways, fifty requests each at once: one lease; all others get its answer."""

    async def main() -> None:
        server.flush()
        computed = 0
        async with actor(server.port, budget_ms=5000) as left, actor(server.port, budget_ms=5000) as right:
            async def ask(answers: SharedAnswers) -> bytes:
                nonlocal computed
                found = await answers.answer_or_lease(b"key", 20_000)
                if isinstance(found, SharedHit):
                    return found.value
                assert isinstance(found, Lease)
                computed += 1
                assert await answers.store(found, "one", b"answer " * 1000) == "stored"
                return b"answer " * 1000

            gateways = SharedAnswers(left, SLOW), SharedAnswers(right, SLOW)
            values = await asyncio.gather(*(ask(gateways[n % 2]) for n in range(100)))
        assert computed == 1 and set(values) == {b"answer " * 1000}
        with server.client() as client:
            assert client.hstrlen("doorbuster:{answers}:entry:key", "v") < 200, "compressed"

    asyncio.run(main())


def test_a_lease_ends_and_its_late_holder_is_refused(server: RedisServer) -> None:
    async def main() -> None:
        server.flush()
        config = SharedConfig(budget_ms=5000, lease_ms=60)
        async with actor(server.port, budget_ms=5000) as left, actor(server.port, budget_ms=5000) as right:
            first, second = SharedAnswers(left, config), SharedAnswers(right, SLOW)
            old = await first.lookup(b"key")
            assert isinstance(old, Lease) and isinstance(await second.lookup(b"key"), Wait)
            new = await second.answer_or_lease(b"key", 20_000)
            assert isinstance(new, Lease) and int(new.token) > int(old.token)
            assert await first.store(old, "old", b"old") == "stale"
            await first.release(old)  # nor may it end the other's lease
            assert isinstance(await first.lookup(b"key"), Wait)
        config = SharedConfig(budget_ms=5000)
        async with actor(server.port, budget_ms=5000) as left:
            answers = SharedAnswers(left, config)
            lease = await answers.lookup(b"other")
            assert isinstance(lease, Lease)
            await answers.release(lease)
            again = await answers.lookup(b"other")
            assert isinstance(again, Lease) and await answers.store(lease, "x", b"late") == "stale"
            assert await answers.store(again, "x", b"right") == "stored"
            assert await answers.lookup(b"other") == SharedHit("x", b"right")

    asyncio.run(main())


@settings(max_examples=80, deadline=None)
@given(before=st.lists(WORDS, max_size=3), during=st.lists(WORDS, max_size=2), after=st.lists(WORDS, max_size=2),
       tenant=st.sampled_from(["", "a"]), tags=st.sampled_from([(), ("x",), ("x", "y")]))
def test_what_was_called_off_is_what_the_policy_calls_off(
    server: RedisServer, before: list[Invalidate], during: list[Invalidate], after: list[Invalidate], tenant: str,
    tags: tuple[str, ...],
) -> None:
    """Words before, during and after a computation; each taken as news or not, and meaning what the policy says."""

    async def main() -> None:
        server.flush()
        policy = Invalidations()
        meant_during = meant_after = False
        async with actor(server.port, budget_ms=5000) as made:
            answers = SharedAnswers(made, SLOW)

            async def say(words: list[Invalidate]) -> bool:
                named = False
                for word in words:
                    news = policy.take(word)
                    assert await answers.invalidate(word) == news
                    at_once = word.tenant in ("", tenant) and (not word.tag or word.tag in tags)
                    named |= news and at_once and word.answer_id in ("", "one")
                return named

            await say(before)
            since = policy.number
            lease = await answers.lookup(b"key")
            assert isinstance(lease, Lease), "nothing was stored yet"
            meant_during = await say(during)
            spoiled = policy.spoiled(since, tenant, tags)
            assert spoiled <= meant_during, "one answer's end, before it is there, is more than the policy looks at"
            stored = await answers.store(lease, "one", b"answer", tenant, tags)
            assert stored == ("called_off" if meant_during else "stored")
            if stored == "stored":
                meant_after = await say(after)
                found = await answers.lookup(b"key")
                assert isinstance(found, Lease) if meant_after else found == SharedHit("one", b"answer")

    asyncio.run(main())


def test_away_everybody_is_alone(tmp_path: Path) -> None:
    async def main() -> None:
        with redis_server(tmp_path) as own:
            async with actor(own.port) as made:
                answers = SharedAnswers(made, SLOW)
                lease = await answers.lookup(b"key")
                assert isinstance(lease, Lease)
                own.kill()
                assert await answers.store(lease, "one", b"answer") == "away"
                assert await answers.answer_or_lease(b"key", 1000) == Alone()
                await answers.release(lease)
                with pytest.raises(RedisAway):
                    await answers.invalidate(Invalidate(tag="x"))

    asyncio.run(main())

"""The end of a drain that takes too long: who still waits is told why, and what the replica says later hurts nobody.

Run: python -m pytest tests/service/test_drain.py -q
Mutations it caught: nobody cut short; words of what was cut short heard.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from engine.service.server import RunningEngine
from tests.service.conftest import Starter
from tests.service.harness import CHAT, STEP_20_MS, body, check_error


@pytest.mark.parametrize("frozen", [False, True])
def test_what_has_not_ended_by_the_deadline_ends_with_an_error(
    started: Starter, frozen: bool, caplog: pytest.LogCaptureFixture
) -> None:
    engine = started(STEP_20_MS)
    inside: RunningEngine = engine.inside
    inside.drain_s = 0.1
    long = body("word " * 90, stream=True, max_tokens=150)
    with ThreadPoolExecutor(2) as pool, ExitStack() as stack:
        client, other = stack.enter_context(engine.http()), stack.enter_context(engine.http())
        got = stack.enter_context(client.stream("POST", CHAT, json=long))
        pieces = got.iter_text()
        text = next(pieces)
        waiting = pool.submit(other.post, CHAT, json=body("also " * 90, max_tokens=150))
        engine.until(lambda: sum(f.started for f in inside.driver.machine.flights.seated()) == 2)
        if frozen:
            engine.worker.suspend()
        asyncio.run_coroutine_threadsafe(inside.drain(), engine.loop).result(10)
        text += "".join(pieces)
        assert '"code":"draining"' in text
        check_error(waiting.result(), 503, "draining")
        engine.worker.resume()
    engine.quiet()
    engine.until(lambda: inside.app.metrics is not None and inside.app.metrics.pressure(0).running == 0)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]

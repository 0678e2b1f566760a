"""Replicas that die under load: nobody is left without an answer, and a new one takes the dead one's place.

Run: python -m pytest tests/service/test_pool.py -q
Mutations it caught: no restart; a restart in spite of the limit; the journal of the first life overwritten; Abort sent
to another replica; a loss that is told after the ends; nothing computed elsewhere; nobody waits for the next life; no
watch; idle counts as silent; a look too few; silence counted from an answer long ago.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import httpx
import pytest

from engine.events import Ended, ReplicaBack, ReplicaLost
from engine.service.pool import LOOKS
from engine.service.replicas import ReplicaProcess, share_cores
from sim.twin.replay import replay
from tests.service.conftest import Starter
from tests.service.harness import CHAT, STEP_20_MS, Engine, body, check_error, journal

CALLERS = 12


def ask(client: httpx.Client, n: int, tokens: int) -> httpx.Response:
    return client.post(CHAT, json=body(f"number {n}: " + "word " * 40, max_tokens=tokens))


def stream(client: httpx.Client, n: int) -> str:
    """All that came, the end of the connection included."""
    with client.stream("POST", CHAT, json=body(f"stream {n}: " + "word " * 60, stream=True, max_tokens=150)) as got:
        return "".join(got.iter_text())


def test_a_replica_killed_in_mid_batch_leaves_nobody_without_an_answer(started: Starter) -> None:
    engine = started(STEP_20_MS)
    with ThreadPoolExecutor(2 * CALLERS) as pool, ExitStack() as stack:
        clients = [stack.enter_context(engine.http()) for _ in range(CALLERS)]
        begun = [pool.submit(stream, client, n) for n, client in enumerate(clients[:4])]
        engine.until(lambda: sum(f.started for f in engine.inside.driver.machine.flights.seated()) == 4)
        with engine.frozen():
            asked = [pool.submit(ask, client, n, 4) for n, client in enumerate(clients[4:])]
            engine.waiting(CALLERS)
            engine.worker.kill()
        for told in begun:
            assert '"code":"replica_lost"' in told.result(), "half an answer ends with an error, not in silence"
        assert [told.result().status_code for told in asked] == [200] * 8, "they wait for the next life"
        again = ask(clients[0], 99, 4)
        assert again.status_code == 200
        assert clients[0].get("/readyz").status_code == 200
        assert engine.inside.pool.restart_s[0] < 3
    engine.quiet()
    engine.call(engine.inside.flush)
    told = [entry.event for entry in journal(engine.folder)]
    lost = told.index(ReplicaLost(0))
    assert [e.reason for e in told[lost + 1 :] if isinstance(e, Ended)][:CALLERS] == ["lost"] * CALLERS
    assert ReplicaBack(0) in told[lost:]
    journals = sorted(path.name for path in (engine.folder / "journal").iterdir())
    assert journals == ["gateway-0.ndjson", "replica-0-life-2.ndjson", "replica-0.ndjson"]
    for name in journals:
        assert replay(engine.folder / "journal" / name).identical


def test_what_a_dead_replica_had_not_begun_is_computed_by_another(started: Starter) -> None:
    engine = started(STEP_20_MS, replicas=2, replica_restarts=0)
    with ThreadPoolExecutor(CALLERS) as pool, ExitStack() as stack:
        clients = [stack.enter_context(engine.http()) for _ in range(CALLERS)]
        with engine.frozen():
            asked = [pool.submit(ask, client, n, 4) for n, client in enumerate(clients)]
            machine = engine.inside.driver.machine
            engine.until(lambda: machine.flights.seated())
            engine.until(lambda: machine.stats().in_flight + sum(told.done() for told in asked) == CALLERS)
            engine.worker.kill()
        assert [told.result().status_code for told in asked] == [200] * CALLERS
        assert clients[0].get("/readyz").status_code == 200
    stats = engine.stats()
    assert stats.fleet.up == (1,)
    assert stats.fleet.router.sent[0] > 0, "the dead one had work"
    assert not engine.inside.lost.is_set()


def test_one_that_dies_too_often_is_given_up(started: Starter) -> None:
    engine = started(replica_restarts=1)
    engine.worker.kill()
    engine.until(lambda: engine.inside.pool.restart_s)
    line = engine.call(lambda: engine.inside.pool._there[0]._process)
    line.kill()
    engine.until(engine.inside.lost.is_set)
    with engine.http() as client:
        check_error(client.post(CHAT, json=body("anybody?")), 503, "replica_lost")


def line_of(engine: Engine) -> ReplicaProcess:
    return engine.call(lambda: engine.inside.pool._there[0])


def impatient(engine: Engine, hang_s: float) -> None:
    """The watch looks that often from its next look on."""
    engine.call(lambda: setattr(engine.inside.pool, "hang_s", hang_s))


def test_one_that_hangs_is_killed_and_only_what_it_had_begun_is_lost(started: Starter) -> None:
    engine = started(STEP_20_MS)
    impatient(engine, 0.8)
    with ThreadPoolExecutor(CALLERS) as pool, ExitStack() as stack:
        clients = [stack.enter_context(engine.http()) for _ in range(6)]
        begun = [pool.submit(stream, client, n) for n, client in enumerate(clients[:2])]
        engine.until(lambda: sum(f.started for f in engine.inside.driver.machine.flights.seated()) == 2)
        engine.worker.suspend()  # for ever: nobody wakes it
        asked = [pool.submit(ask, client, n, 4) for n, client in enumerate(clients[2:])]
        for told in begun:
            assert '"code":"replica_lost"' in told.result()
        assert [told.result().status_code for told in asked] == [200] * 4
    engine.quiet()
    assert len(engine.inside.pool.restart_s) == 1
    assert not engine.worker.is_running()


def test_a_pause_shorter_than_the_limit_is_survived(started: Starter) -> None:
    engine = started(STEP_20_MS)
    impatient(engine, 2.0)
    line = line_of(engine)
    with ThreadPoolExecutor(2) as pool, engine.http() as client:
        with engine.frozen():
            told = pool.submit(ask, client, 1, 4)
            engine.until(lambda: line._silent_looks == LOOKS - 1)
        assert told.result().status_code == 200
    assert not engine.inside.pool.restart_s
    assert engine.worker.is_running()


def test_an_idle_one_is_silent_with_good_reason(started: Starter) -> None:
    engine = started()
    impatient(engine, 0.1)
    line = line_of(engine)
    looks: list[int] = []
    was = line.look
    engine.call(lambda: setattr(line, "look", lambda: looks.append(was()) or looks[-1]))
    engine.until(lambda: len(looks) > 3 * LOOKS)
    assert set(looks) == {0}
    with engine.http() as client:
        assert ask(client, 1, 4).status_code == 200
    assert not engine.inside.pool.restart_s


def test_a_broken_connection_is_a_death_and_the_old_process_goes(started: Starter) -> None:
    engine = started(STEP_20_MS)
    with ThreadPoolExecutor(CALLERS) as pool, ExitStack() as stack:
        clients = [stack.enter_context(engine.http()) for _ in range(5)]
        begun = pool.submit(stream, clients[0], 0)
        engine.until(lambda: sum(f.started for f in engine.inside.driver.machine.flights.seated()) == 1)
        with engine.frozen():
            asked = [pool.submit(ask, client, n, 4) for n, client in enumerate(clients[1:])]
            engine.waiting(5)
            engine.call(line_of(engine)._transport.abort)  # type: ignore[union-attr]
        assert '"code":"replica_lost"' in begun.result()
        assert [told.result().status_code for told in asked] == [200] * 4
    engine.quiet()
    assert not engine.worker.is_running()


@pytest.mark.parametrize(
    ("cores", "threads", "replicas", "want"),
    [
        ((0, 1), 0, 1, ((0,), (1,), 1)),
        ((0, 1), 0, 2, ((), (), 1)),  # not enough: nobody is pinned
        ((0, 1, 2, 3, 4), 0, 2, ((0,), (1, 2, 3, 4), 2)),
        ((4, 5, 6, 7), 1, 2, ((4, 5), (6, 7), 1)),
        ((0,), 0, 1, ((), (), 1)),
    ],
)
def test_cores_are_shared_out(
    monkeypatch: pytest.MonkeyPatch, cores: tuple[int, ...], threads: int, replicas: int, want: tuple[object, ...]
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(cores))
    assert share_cores(threads, replicas) == want

"""Several ingress processes over one replica: shared port, shared queue, and what a death leaves behind.

Run: python -m pytest tests/service/test_workers.py -q
Mutations it caught: no restart, or one in spite of the limit; an index that comes again; a snapshot of the dead that is
kept; a flush that only one hears of; a hang that nobody hears of; no welcome; no greeting after a new life; one given
up and nobody told; an encoder each; a port that two services share.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import httpx
import msgspec
import psutil
import pytest

from engine.cache_config import SnapshotConfig
from engine.config import ClassConfig
from engine.errors import UserError
from engine.events import SID_BITS, Ended, Pressure, ReplicaBack, ReplicaLost, Submit
from engine.ledger.journal import open_journal
from engine.service.listening import join, listen, reserve
from engine.upstream_config import UpstreamConfig
from sim.twin.replay import replay
from tests.service.conftest import Starter
from tests.service.harness import CHAT, SCENARIO, STEP_20_MS, body, check_error
from tests.service.workers import Workers, start_workers
from tests.waiting import until

CONNECTIONS = 40  # all at one of two ingress processes: once in 5e11 runs


def ask(client: httpx.Client, n: int, tokens: int = 4) -> httpx.Response:
    return client.post(CHAT, json=body(f"number {n}: " + "word " * 40, max_tokens=tokens))


def stream(client: httpx.Client, n: int, begun: threading.Barrier) -> str:
    """All that came, the end of the connection included; whoever waits is told when it has begun."""
    text = ""
    with client.stream("POST", CHAT, json=body(f"stream {n}: " + "word " * 90, stream=True, max_tokens=150)) as got:
        try:
            for piece in got.iter_text():
                if not text:
                    begun.wait(20)
                text += piece
        except httpx.RemoteProtocolError:
            text += "CUT"
    return text


def begin_streams(
    workers: Workers, pool: ThreadPoolExecutor, stack: ExitStack, each: int = 2
) -> list[list[Future[str]]]:
    """So many at each of two ingress processes, all in mid-stream on return."""
    begun = threading.Barrier(2 * each + 1)
    told = [
        [pool.submit(stream, stack.enter_context(workers.http(w)), 10 * w + n, begun) for n in range(each)]
        for w in range(2)
    ]
    begun.wait(20)
    return told


def journals(folder: Path) -> list[str]:
    return sorted(path.stem for path in (folder / "journal").iterdir())


def check_replay(folder: Path) -> None:
    for name in journals(folder):
        assert replay(folder / "journal" / f"{name}.ndjson").identical, name


def test_both_accept_one_replica_serves_both_and_everybody_is_answered_once(tmp_path: Path) -> None:
    with start_workers(tmp_path) as workers:
        with ExitStack() as stack, ThreadPoolExecutor(CONNECTIONS) as pool:
            clients = [stack.enter_context(workers.http()) for _ in range(CONNECTIONS)]
            answers = list(pool.map(ask, clients, range(CONNECTIONS)))
        assert [answer.status_code for answer in answers] == [200] * CONNECTIONS
        assert len({answer.headers["x-request-id"] for answer in answers}) == CONNECTIONS
        served = [workers.metric(n, "request_success_total") for n in range(2)]
        assert sum(served) == CONNECTIONS
        assert min(served) > 0, "both have their share"
        for n in range(2):
            workers.wait_for(n, "num_requests_running", 0)
    assert journals(tmp_path) == ["gateway-0", "gateway-1", "replica-0"]
    check_replay(tmp_path)
    told = [entry.event for entry in open_journal(tmp_path / "journal" / "replica-0.ndjson").entries()]
    sids = [event.sid for event in told if isinstance(event, Submit)]
    assert len(set(sids)) == len(sids) == CONNECTIONS
    assert {sid >> SID_BITS for sid in sids} == {0, 1}
    ledgers = [(tmp_path / "ledger" / f"records-{n}.ndjson").read_bytes().count(b'"RequestRecord"') for n in range(2)]
    assert ledgers == served


def test_one_that_is_killed_takes_nobody_with_it_and_is_back(tmp_path: Path) -> None:
    with start_workers(tmp_path, cost=STEP_20_MS) as workers:
        victim, survivor = workers.pids()
        with ThreadPoolExecutor(4) as pool, ExitStack() as stack:
            told = begin_streams(workers, pool, stack)
            assert workers.metric(1, "num_requests_running") == 4, "the survivor sees the whole replica"
            os.kill(victim, signal.SIGKILL)
            assert all("[DONE]" not in one.result() for one in told[0])
            workers.wait_for(1, "num_requests_running", 2)
            assert all("[DONE]" in one.result() for one in told[1])
        workers.wait_for(1, "num_requests_running", 0)
        workers.wait_for(1, "kv_cache_usage_perc", 0)
        until(lambda: workers.pids()[0] != victim, "a new process")
        until(lambda: _is_ready(workers, 0), "it answers")
        with workers.http(0) as client:
            assert ask(client, 99).status_code == 200
        assert workers.metric(0, "request_success_total") == 1, "it counts from nothing"
        assert workers.pids()[1] == survivor
    assert journals(tmp_path) == ["gateway-0", "gateway-0-life-2", "gateway-1", "replica-0"]
    check_replay(tmp_path)
    actions = [a for e in open_journal(tmp_path / "journal" / "replica-0.ndjson").entries() for a in e.actions]
    ends = {a.sid: a.reason for a in actions if isinstance(a, Ended)}
    assert {sid for sid, reason in ends.items() if reason == "aborted"} == {0, 1}, "the victim's, and no others"
    assert len(ends) == 5
    assert 2 << SID_BITS in ends, "the next life's ids are its own"


def _is_ready(workers: Workers, worker: int) -> bool:
    try:
        with workers.http(worker) as client:
            return client.get("/readyz").status_code == 200
    except httpx.TransportError:
        return False


def test_one_that_always_dies_is_given_up_and_without_any_it_is_over(tmp_path: Path) -> None:
    with start_workers(tmp_path, replica_restarts=0) as workers:
        first, second = workers.pids()
        os.kill(first, signal.SIGKILL)
        until(lambda: workers.inside._hopeless == 1, "the first is given up")
        with workers.http() as client:
            assert ask(client, 1).status_code == 200, "the kernel asks nobody who is not there"
        assert not workers.inside.lost.is_set()
        os.kill(second, signal.SIGKILL)
        until(workers.inside.lost.is_set, "none is left")
        assert workers.inside.left == "no ingress process"


def test_a_dead_replica_is_lost_and_welcomed_at_every_gateway(tmp_path: Path) -> None:
    with start_workers(tmp_path, cost=STEP_20_MS) as workers, ThreadPoolExecutor(8) as pool, ExitStack() as stack:
        told = begin_streams(workers, pool, stack, each=1)
        replica = workers.replica()
        replica.suspend()
        asked = [pool.submit(ask, stack.enter_context(workers.http(n % 2)), n) for n in range(4)]
        for n in range(2):
            workers.wait_for(n, "num_requests_in_gateway", 3)
        replica.kill()
        assert all('"code":"replica_lost"' in one.result() for each in told for one in each)
        assert [one.result().status_code for one in asked] == [200] * 4, "they wait for the next life"
    assert journals(tmp_path) == ["gateway-0", "gateway-1", "replica-0", "replica-0-life-2"]
    check_replay(tmp_path)
    for n in range(2):
        events = [entry.event for entry in open_journal(tmp_path / "journal" / f"gateway-{n}.ndjson").entries()]
        assert [e for e in events if isinstance(e, ReplicaLost | ReplicaBack)] == [ReplicaLost(0), ReplicaBack(0)]
        heard = [e for e in events[events.index(ReplicaBack(0)) :] if isinstance(e, Pressure)]
        assert heard and {e.acked_sids for e in heard} == {()}, "the new life knows who it speaks to"
        assert {e.acked_sid >> SID_BITS for e in heard if e.acked_sid >= 0} == {n}


def test_a_replica_that_hangs_is_killed_on_a_gateways_word(tmp_path: Path) -> None:
    with start_workers(tmp_path, cost=STEP_20_MS, replica_hang_s=0.6) as workers:
        replica = workers.replica()
        replica.suspend()  # for ever: nobody wakes it
        with workers.http(1) as client:
            assert ask(client, 1).status_code == 200
        assert not replica.is_running()


def test_a_replica_given_up_ends_the_service(tmp_path: Path) -> None:
    with start_workers(tmp_path, replica_restarts=0) as workers:
        workers.replica().kill()
        until(workers.inside.lost.is_set, "the end")
        assert workers.inside.left == "no replica"
        for n in range(2):
            with workers.http(n) as client:
                check_error(ask(client, n), 503, "replica_lost")
    for n in range(2):
        events = [entry.event for entry in open_journal(tmp_path / "journal" / f"gateway-{n}.ndjson").entries()]
        assert ReplicaLost(0, for_good=True) in events, "nobody waits for it"


def test_what_one_is_told_to_forget_all_forget(tmp_path: Path) -> None:
    with start_workers(tmp_path) as workers, ExitStack() as stack:
        clients = [stack.enter_context(workers.http(n)) for n in range(2)]
        for client in clients:
            assert ask(client, 1).headers["x-doorbuster-tier"] == "model"
            assert ask(client, 1).headers["x-doorbuster-tier"] == "exact"
        with workers.http(0, "office") as admin:
            assert admin.post("/admin/cache", json={"all": True}).status_code == 200
        until(lambda: ask(clients[1], 1).headers["x-doorbuster-tier"] == "model", "the other's cache is empty")
        assert ask(clients[0], 1).headers["x-doorbuster-tier"] == "model"
    check_replay(tmp_path)


def test_all_ask_one_encoder_and_a_dead_one_is_replaced_for_all(tmp_path: Path) -> None:
    classes = {**SCENARIO.classes, "like": ClassConfig("standard", caches="semantic", max_tokens=8)}
    with start_workers(tmp_path, classes=classes) as workers, ExitStack() as stack:
        clients = [stack.enter_context(workers.http(n)) for n in range(2)]
        assert [_embed(client, "a kettle") for client in clients] == [200, 200]
        [first] = _encoders()
        first.kill()
        until(lambda: all(_embed(client, "a third") == 200 for client in clients), "it is back for both")
        [second] = _encoders()
        assert second != first
    assert not _encoders()


def _embed(client: httpx.Client, text: str) -> int:
    return client.post("/v1/embeddings", json={"model": "minilm", "input": f"{text} {time.monotonic_ns()}"}).status_code


def _encoders() -> list[psutil.Process]:
    children = psutil.Process().children(recursive=True)
    return [child for child in children if "engine.model.encoder_process" in child.cmdline()]


def test_a_drain_lets_all_finish_and_takes_no_more(tmp_path: Path) -> None:
    with start_workers(tmp_path, cost=STEP_20_MS) as workers, ThreadPoolExecutor(6) as pool, ExitStack() as stack:
        late = [stack.enter_context(workers.http(n)) for n in range(2)]
        for client in late:
            assert client.get("/readyz").status_code == 200  # so that a connection is there
        told = begin_streams(workers, pool, stack)
        processes = [psutil.Process(pid) for pid in workers.pids()]
        draining = pool.submit(workers.drain)
        for n, client in enumerate(late):
            until(lambda client=client: client.get("/readyz").status_code == 503, "not ready")
            check_error(ask(client, n), 503, "draining")
        assert all("[DONE]" in one.result() for each in told for one in each)
        draining.result()
        assert workers.call(lambda: [worker.process.returncode for worker in workers.inside.workers]) == [0, 0]
        assert not any(process.is_running() for process in processes)
    check_replay(tmp_path)


def test_each_has_its_part_of_an_upstreams_places(
    tmp_path: Path, started: Starter, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = started()
    monkeypatch.setenv("OTHER_KEY", other.keys["shop"])
    upstreams = {"other": UpstreamConfig(url=other.url, api_key_env="OTHER_KEY", window=5)}
    with start_workers(tmp_path, upstreams=upstreams) as workers, ExitStack() as stack:
        for n in range(2):
            assert ask(stack.enter_context(workers.http(n)), n).status_code == 200
        workers.drain()
    assert journals(tmp_path) == ["gateway-0", "gateway-1", "lane-of-0-0", "lane-of-1-0"]
    check_replay(tmp_path)
    lane = open_journal(tmp_path / "journal" / "lane-of-1-0.ndjson").header.config
    assert msgspec.json.decode(lane)["window"] == 2


def test_what_does_not_end_in_time_ends_with_an_error(tmp_path: Path) -> None:
    with (
        start_workers(tmp_path, cost=STEP_20_MS, drain_s=0.2) as workers, ThreadPoolExecutor(8) as pool,
        ExitStack() as stack,
    ):
        told = begin_streams(workers, pool, stack)
        workers.replica().suspend()  # nothing ends
        asked = [pool.submit(ask, stack.enter_context(workers.http(n)), n) for n in range(2)]
        for n in range(2):
            workers.wait_for(n, "num_requests_in_gateway", 3)
        workers.drain()
        assert all('"code":"draining"' in one.result() for each in told for one in each)
        for one in asked:
            check_error(one.result(), 503, "draining")
        assert workers.call(lambda: [worker.process.returncode for worker in workers.inside.workers]) == [0, 0]
        workers.replica().resume()
    check_replay(tmp_path)


def test_each_keeps_its_answers_and_a_dead_one_brings_nothing_back(tmp_path: Path) -> None:
    files = [tmp_path / f"kept-{n}" for n in range(2)]
    kept = SnapshotConfig(path=str(tmp_path / "kept"))
    for life in range(2):
        (tmp_path / str(life)).mkdir()
        with start_workers(tmp_path / str(life), snapshot=kept) as workers:
            assert workers.inside.warm_answers == 2 * life
            for n in range(2):
                with workers.http(n) as client:
                    assert ask(client, n).headers["x-doorbuster-tier"] == ("exact" if life else "model")
            if life:
                for file in files:
                    assert file.exists()
                os.kill(workers.pids()[1], signal.SIGKILL)
                until(lambda: not files[1].exists(), "what it has not heard of is not brought back")
                assert files[0].exists()
                until(lambda: _is_ready(workers, 1), "it is back")
            workers.drain()
        assert files[0].exists()


def test_an_ingress_process_that_cannot_start_says_why(tmp_path: Path) -> None:
    (tmp_path / "ledger").mkdir()
    (tmp_path / "ledger" / "records-1.ndjson").touch()
    before = {child.pid for child in psutil.Process().children()}  # of other tests: a pool that stays, say
    with pytest.raises(UserError, match="no ledger can be written"), start_workers(tmp_path):
        pass
    assert not [child for child in psutil.Process().children() if child.pid not in before]


def test_a_reserved_port_gets_no_connections_and_belongs_to_who_joins() -> None:
    with reserve("127.0.0.1", 0) as held, listen("127.0.0.1", 0) as other:
        port = held.getsockname()[1]
        with pytest.raises(UserError, match="cannot listen"):
            reserve("127.0.0.1", other.getsockname()[1])
        with join("127.0.0.1", port) as one, join("127.0.0.1", port) as two:
            one.listen()
            two.listen()
            with pytest.raises(UserError, match="cannot listen"):
                reserve("127.0.0.1", port)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), timeout=5)

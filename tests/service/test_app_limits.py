"""What an engine says when it is full, late, draining or without its worker, and how health shows it."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

from msgspec.structs import replace

from engine.config import LimiterConfig
from engine.ingress_config import IngressConfig
from tests.service.conftest import Starter
from tests.service.harness import CHAT, SCENARIO, Engine, body, check_error, dial


def test_a_tenant_over_its_rate_is_told_when_to_come_back(engine: Engine) -> None:
    with engine.http("trickle") as client:
        assert client.post(CHAT, json=body("one is allowed")).status_code == 200
        for stream in (False, True):
            got = client.post(CHAT, json=body("two are not", stream=stream))
            check_error(got, 429, "rate_limited")
            assert 95 <= int(got.headers["retry-after"]) <= 120  # one request in 100 s, and up to a fifth by lot
            assert got.headers["x-doorbuster-level"] == "0"
    with engine.http() as client:
        assert client.post(CHAT, json=body("others are not meant")).status_code == 200


def test_a_request_that_could_never_pass_is_told_so(started: Starter) -> None:
    engine = started(None, limiter=LimiterConfig(tokens_per_s=1.0, token_burst_s=1.0))
    with engine.http() as client:
        got = client.post(CHAT, json=body("more than one token"))
        assert "never" in check_error(got, 429, "rate_limited")


def test_no_more_are_let_in_than_fit(started: Starter) -> None:
    engine = started(None, ingress=IngressConfig(max_in_flight=2))
    with ThreadPoolExecutor(2) as pool, engine.http() as client:
        with engine.frozen():
            asked = [pool.submit(client.post, CHAT, json=body(f"first {i}")) for i in range(2)]
            engine.waiting(2)
            got = client.post(CHAT, json=body("third"))
            check_error(got, 503, "overloaded")
            assert got.headers["retry-after"] == "1"
            assert client.get("/healthz").status_code == 200
            with engine.http(None) as stranger:
                check_error(stranger.post(CHAT, json=body("x")), 401, "unauthorized")
            assert engine.stats().arrived == 2
        assert [each.result().status_code for each in asked] == [200, 200]
        engine.quiet()
        assert client.post(CHAT, json=body("now there is room")).status_code == 200


def test_an_answer_that_does_not_begin_in_time_is_504(started: Starter) -> None:
    engine = started()
    with engine.http(**{"x-doorbuster-class": "hasty"}) as client, engine.frozen():
        for stream in (False, True):
            check_error(client.post(CHAT, json=body(f"quick {stream}", stream=stream)), 504, "deadline_exceeded")
    engine.quiet()


# ---------------------------------------------------------------- health


def test_liveness_and_readiness_need_no_key(engine: Engine) -> None:
    with engine.http(None) as client:
        assert client.get("/healthz").json() == {"status": "alive"}
        assert client.get("/readyz").json() == {"status": "ready"}
        assert client.head("/readyz").status_code == 200 and not client.head("/readyz").content


def test_a_draining_server_finishes_what_it_has_and_takes_no_more(started: Starter) -> None:
    engine = started()
    with ThreadPoolExecutor(2) as pool, engine.http() as client:
        with engine.frozen():
            asked = pool.submit(client.post, CHAT, json=body("one more, please"))
            engine.waiting(1)
            drained = asyncio.run_coroutine_threadsafe(engine.inside.drain(), engine.loop)
            engine.until(lambda: engine.inside.app.draining)
            for stream in (False, True):
                check_error(client.post(CHAT, json=body("too late", stream=stream)), 503, "draining")
            check_error(client.get("/readyz"), 503, "draining")
            assert client.get("/healthz").status_code == 200
            assert not drained.done()
        assert asked.result().json()["choices"][0]["message"]["content"] == "one more, please"
        drained.result(20)


def test_a_lost_worker_shows_in_readiness(started: Starter) -> None:
    engine = started(replica_restarts=0)
    with ThreadPoolExecutor(1) as pool, engine.http() as client:
        with engine.frozen():
            asked = pool.submit(client.post, CHAT, json=body("are you there?"))
            engine.waiting(1)
            engine.worker.kill()
        check_error(asked.result(), 503, "replica_lost")
        check_error(client.get("/readyz"), 503, "replica_lost")
        assert client.get("/healthz").status_code == 200


def test_a_body_that_never_comes_whole_is_408_and_holds_no_place(started: Starter) -> None:
    engine = started(ingress=replace(SCENARIO.ingress, receipt_ms=300))
    head = f"POST {CHAT} HTTP/1.1\nhost: x\nauthorization: Bearer {engine.keys['shop']}\ncontent-length: 100"
    line = dial(engine, head, b'{"model":')
    got = line.recv(10_000)
    assert got.startswith(b"HTTP/1.1 408")
    assert b'"code":"body_too_slow"' in got
    assert b"connection: close" in got
    line.close()
    engine.quiet()

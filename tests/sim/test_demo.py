"""The demo's judgements without the demo: is the capacity confirmed, and by enough requests?

Run: python -m pytest tests/sim/test_demo.py -q
Mutations it caught: 20 s whatever the rate; a fourth try; the last rate stepped down without being asked; a broken
stream within its SLO counted as kept.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from engine.scenario import load
from engine.units import S_NS
from sim.demo import CONFIRM_REQUESTS, confirm, confirming, within_slo
from sim.desk.capacity import wilson
from sim.loadgen import Seen
from sim.twin.replay import journals_of, replay
from sim.twin.workload import Request
from tests.waiting import until


def asked(twin_rps: float, kept: list[float]) -> tuple[object, list[tuple[float, float, int]], list[str]]:
    """``confirm`` against an engine that keeps these shares of its SLOs, one a try."""
    calls: list[tuple[float, float, int]] = []
    lines: list[str] = []

    def ask(rate: float, seconds: float, attempt: int) -> tuple[int, int]:
        calls.append((rate, seconds, attempt))
        count = round(rate * seconds)
        return round(kept[attempt] * count), count

    return confirm(twin_rps, ask, lines.append), calls, lines


def test_the_first_rate_is_kept_if_it_holds() -> None:
    found, calls, lines = asked(3.0, [1.0])
    assert (found.live_rps, found.confirmed, found.requests) == (3.0, True, 100)
    assert calls == [(3.0, pytest.approx(100 / 3), 0)]
    assert lines[0].endswith(": confirmed")
    assert (found.low, found.high) == wilson(100, 100)


def test_it_steps_down_and_stops_where_it_holds() -> None:
    found, calls, _ = asked(10.0, [0.8, 0.97, 0.995])
    assert [rate for rate, *_ in calls] == pytest.approx([10, 8.8, 8.8 * 0.88])
    assert all(seconds >= 20 for _, seconds, _ in calls)
    assert found.confirmed and found.live_rps == pytest.approx(8.8 * 0.88)


def test_after_three_tries_it_says_not_confirmed_at_the_rate_that_was_asked() -> None:
    found, calls, lines = asked(10.0, [0.8, 0.8, 0.8, 1.0])
    assert len(calls) == 3
    assert not found.confirmed and found.live_rps == calls[-1][0]
    assert "NOT confirmed" in lines[-1] and "95 % interval" in lines[-1]
    assert "NOT confirmed" in str(found) and "95 % interval" in str(found)


def test_a_slow_machine_is_not_asked_for_longer_than_there_is_time() -> None:
    found, calls, _ = asked(1.0, [0.5, 1.0])
    assert [seconds for _, seconds, _ in calls] == [100.0]
    assert not found.confirmed


def test_never_fewer_than_a_hundred_requests() -> None:
    each_second = [Request(f"r{i}", i * S_NS, "t", "c", "", "x") for i in range(150)]
    assert len(confirming(each_second, 90)) == CONFIRM_REQUESTS
    assert len(confirming(each_second, 120)) == 120


def test_a_broken_stream_does_not_confirm_anything() -> None:
    resolved = load("flash-sale")
    good = Seen("r0", "product_qa", "", 0, 0, 200, ttft_ns=1, e2e_ns=2)
    broken = msgspec.structs.replace(good, request_id="r1", scheduled_ns=5, error_code="cut_off")
    refused = msgspec.structs.replace(good, request_id="r2", scheduled_ns=9, status=503, error_code="overloaded")
    late = msgspec.structs.replace(good, request_id="r3", scheduled_ns=11, e2e_ns=7 * S_NS)
    assert within_slo([late, refused, broken, good], resolved) == 1
    assert within_slo([], resolved) == 0


def test_a_demo_that_is_stopped_says_what_it_keeps(tmp_path: Path) -> None:
    """The real command, told to stop in mid-sale like at a terminal."""
    began = ["demo", "--profile", "ci", "--set", "model.name=fake", "--set", "semantic.enabled=false"]
    rate = ["--set", "workload.base_rate_rps=4", "--set", "workload.profiles.ci.base_s=60"]
    with (tmp_path / "said").open("wb") as err:
        demo = subprocess.Popen(
            [sys.executable, "-m", "sim.cli", *began, *rate], cwd=tmp_path, stderr=err, stdout=subprocess.DEVNULL
        )
    try:
        ledgers = "runs/*/ledger/records.ndjson"
        until(lambda: any(b'"RequestRecord"' in path.read_bytes() for path in tmp_path.glob(ledgers)), "a record", 60)
        demo.send_signal(signal.SIGINT)
        assert demo.wait(60) == 130
    finally:
        demo.kill()
        demo.wait()
    (folder,) = tmp_path.glob("runs/*")
    said = (tmp_path / "said").read_text()
    assert f"not finished: runs/{folder.name} keeps the live journals, the live ledger" in said
    assert "the live summary" not in said and "doorbuster report" not in said
    assert f"doorbuster replay runs/{folder.name}" in said
    assert "Traceback" not in said
    assert all(replay(path).identical for path in journals_of(folder))

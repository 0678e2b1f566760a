"""A replica with real weights dies, stands still, hangs or is cut off in mid-batch: nobody is left without an answer.

    make drill    (or: python -m pytest -m drill tests/drill/test_replica_drill.py)

``tests/service/test_pool.py`` shows the rules with the fake model; here the process has torch and 135 M weights to load
again, and twelve requests are in five states when it happens. The process is stopped first, in the middle of a step, so
that the states are certain.

Mutations it caught: the pool does not start it anew; the driver does not end what a lost replica was computing; a new
life keeps no journal; no watch; the limit of the watch below the pause; nobody waits for the next life.
"""

from __future__ import annotations

import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from engine.config import BatcherConfig, ModelConfig, PrefixConfig
from engine.events import Ended, ReplicaBack, ReplicaLost
from sim.twin.replay import replay
from tests.drill.conftest import Publish
from tests.drill.rest import at_rest
from tests.service.harness import CHAT, Engine, body, journal, start
from tests.service.test_lifecycle import gone

pytestmark = pytest.mark.drill

PATIENCE_S = 60  # a hang is what lasts longer
CHANGES = {
    "model": ModelConfig(name="smollm2", context_tokens=512),
    "batcher": BatcherConfig(step_tokens=32, slots=4, reserved_slots=0, reserved_blocks=0),
    "prefix": PrefixConfig(blocks=256, pinned_blocks=16),
}
CHECK = body("Two cards, one address, three orders in a minute: is that fraud?", max_tokens=8)


def post(client: httpx.Client, text: str) -> httpx.Response:
    return client.post(CHAT, json=body(text, max_tokens=8))


def stream(client: httpx.Client, n: int) -> str:
    """All that came, the end of the connection included."""
    asked = body(f"Tell me a very long story about shop number {n} and all its people.", stream=True, max_tokens=200)
    with client.stream("POST", CHAT, json=asked) as got:
        return "".join(got.iter_text())


class Twelve:
    """Requests by the state that they are in when the process dies."""

    def __init__(self, engine: Engine, pool: ThreadPoolExecutor, stack: ExitStack) -> None:
        self.engine, self.pool = engine, pool
        self.client = stack.enter_context(engine.http())
        self.told: dict[str, list[Future[str] | Future[httpx.Response]]] = {}

    def bring_about(self) -> None:
        """All but those that are sent while it stands still. The replica has four slots."""
        machine = self.engine.inside.driver.machine
        self.told["decoding"] = [self.pool.submit(stream, self.client, n) for n in range(3)]
        self.engine.until(lambda: sum(flight.started for flight in machine.flights.seated()) == 3)
        self.told["riding along"] = [self.pool.submit(stream, self.client, 0) for _ in range(2)]
        self.engine.until(lambda: machine.flights.stats().riders == 5)
        self.told["in prefill"] = [self.pool.submit(post, self.client, "a long list: " + "shoes, " * 180)]
        self.engine.until(lambda: len(machine.flights.seated()) == 4)
        self.told["waiting"] = [self.pool.submit(post, self.client, f"waiting {n}: " + "hat, " * 20) for n in range(3)]
        said = machine.fleet.pressures._last  # the replica's own word
        self.engine.until(lambda: said[0].running == 4 and sum(waiting.count for waiting in said[0].waiting) == 3)

    def send_unseen(self) -> None:
        self.told["not yet seen"] = [self.pool.submit(post, self.client, f"unseen {n}") for n in range(3)]
        self.engine.waiting(12)

    def heard(self) -> dict[str, Counter[str]]:
        """What became of each; TimeoutError for one that hangs."""
        out: dict[str, Counter[str]] = {}
        for state, futures in self.told.items():
            out[state] = Counter()
            for future in futures:
                got = future.result(PATIENCE_S)
                if isinstance(got, httpx.Response):
                    out[state][f"{got.status_code}"] += 1
                elif '"code":"replica_lost"' in got:
                    assert '"content":' in got and "[DONE]" not in got, "half an answer does not look whole"
                    out[state]["broken off: replica_lost"] += 1
                else:
                    assert got.endswith("data: [DONE]\n\n"), "it ends with an error or with its end, not in silence"
                    out[state]["whole"] += 1
        return out


START_S = 300.0  # weights that are converted first take half a minute


KILLED, CUT_OFF, HUNG, PAUSED = "killed", "cut-off", "hung", "paused-5-s"
PAUSE_S = 5.0
HANG_S = 2.0  # for the drill of a hang; a pause is measured against what a calibration gives


def strike(engine: Engine, how: str) -> None:
    """The process stands still already."""
    if how == KILLED:
        engine.worker.kill()
    elif how == CUT_OFF:
        engine.call(lambda: engine.inside.pool._there[0]._transport.abort())  # type: ignore[union-attr]
    elif how == HUNG:
        engine.until(lambda: gone(engine.worker.pid))
    else:
        time.sleep(PAUSE_S)  # the pause itself


@pytest.mark.parametrize("how", [KILLED, CUT_OFF, HUNG, PAUSED])
def test_a_real_replica_in_trouble_in_mid_batch(tmp_path: Path, publish: Publish, how: str) -> None:
    with ExitStack() as stack:
        hang_s = HANG_S if how == HUNG else 10.0
        changes = CHANGES | {"replica_hang_s": hang_s}
        engine = stack.enter_context(start(tmp_path, pin_cores=True, start_s=START_S, **changes))
        pool = stack.enter_context(ThreadPoolExecutor(12))
        bank = stack.enter_context(engine.http("bank", **{"x-doorbuster-class": "fraud"}))
        before = bank.post(CHAT, json=CHECK).json()["choices"][0]["message"]["content"]
        twelve = Twelve(engine, pool, stack)
        twelve.bring_about()
        with engine.frozen():
            twelve.send_unseen()
            started = [flight.started for flight in engine.inside.driver.machine.flights.seated()]
            strike(engine, how)
        heard = twelve.heard()
        again = bank.post(CHAT, json=CHECK)
        ready = bank.get("/readyz").status_code
        engine.quiet()
        restart_s = engine.call(lambda: list(engine.inside.pool.restart_s))
    told = [entry.event for entry in journal(tmp_path)]
    journals = sorted(path.name for path in (tmp_path / "journal").iterdir())
    replayed = {name: replay(tmp_path / "journal" / name) for name in journals}
    publish(
        f"replica-{how}",
        [{"state": state, "requests": sum(what.values()), "heard": ", ".join(what)} for state, what in heard.items()],
    )
    publish(f"replica-{how}-restart", [{"back after s": round(s, 2), "weights": "smollm2"} for s in restart_s or [0]])
    publish(
        f"replica-{how}-journals",
        [{"journal": name, "events": r.events, "identical": r.identical} for name, r in replayed.items()],
    )

    assert started.count(True) == 3 and started.count(False) == 7, "ten flights, three of them in mid-answer"
    assert sum(sum(what.values()) for what in heard.values()) == 12
    lost = how != PAUSED
    for state, what in heard.items():
        streams = state in ("decoding", "riding along")
        assert set(what) == {("broken off: replica_lost" if lost else "whole") if streams else "200"}
    assert again.status_code == 200 and ready == 200
    assert again.json()["choices"][0]["message"]["content"] == before, "the same weights say the same"
    assert len(restart_s) == lost
    assert all(s < 3 for s in restart_s), "a standby has all but the weights"
    assert [e.reason for e in told if isinstance(e, Ended)].count("lost") == 10 * lost
    assert told.count(ReplicaLost(0)) == told.count(ReplicaBack(0)) == lost
    assert journals == ["gateway-0.ndjson", *["replica-0-life-2.ndjson"] * lost, "replica-0.ndjson"]
    assert all(r.identical for r in replayed.values())
    assert at_rest(tmp_path / "journal" / journals[1]), "blocks whole"

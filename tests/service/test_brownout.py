"""What a client sees of an answer that a brown-out has cut short: why it ended, and the level it met; and it is kept
for nobody.

Run: python -m pytest tests/service/test_brownout.py -q
Mutations it caught: the cap not told to the replica; what was cut short kept.
"""

from __future__ import annotations

from msgspec.structs import replace

from engine.config import OverloadConfig
from engine.events import Pressure, Waiting
from engine.units import S_NS
from sim.twin.replay import replay
from tests.service.conftest import Starter
from tests.service.harness import CHAT, SCENARIO, Engine, body

CAP = 6
LONG, SHORT = "one two three four five six seven eight nine ten", "one two"  # the fake model says what it is told


def brown_out(engine: Engine) -> None:
    """A chat has waited for 0.3 of its SLO: the replica's word, as it would come."""

    def waits() -> None:
        driver = engine.inside.driver
        driver.deliver(Pressure(0, -1, 1, waiting=(Waiting("chat", 1, driver.now_ns() - 18 * S_NS),)))

    engine.call(waits)
    assert engine.stats().level == 1


def ask(engine: Engine, text: str, **more: object) -> tuple[str, str, str, str, int]:
    """Tier, level, text, why it ended, and how long it is."""
    with engine.http() as client:
        got = client.post(CHAT, json=body(text, **more))
    assert got.status_code == 200, got.text
    [choice], headers = got.json()["choices"], got.headers
    return (
        headers["x-doorbuster-tier"], headers["x-doorbuster-level"], choice["message"]["content"],
        choice["finish_reason"], got.json()["usage"]["completion_tokens"],
    )


def test_a_cut_answer_says_so_and_is_kept_for_nobody(started: Starter) -> None:
    chat = replace(SCENARIO.classes["chat"], brownout_max_tokens=CAP)
    engine = started(
        classes={**SCENARIO.classes, "chat": chat},
        overload=OverloadConfig(brownout_share=0.25, degraded_share=0.9, shed_share=0.95),
    )
    brown_out(engine)
    tier, level, text, why, tokens = ask(engine, LONG)
    assert (tier, level, why, tokens) == ("model", "1", "length", CAP) and LONG.startswith(text) and text != LONG
    assert ask(engine, LONG)[0] == "model", "computed anew, cut again"
    assert ask(engine, SHORT)[2:4] == (SHORT, "stop") and ask(engine, SHORT)[0] == "exact", "whole: kept"
    engine.until(lambda: not engine.inside.driver.machine.stats().in_flight)
    path = engine.folder / "journal" / "gateway-0.ndjson"
    engine.until(lambda: path.read_bytes().count(b'"max_tokens":%d' % CAP) == 3)
    assert replay(path).identical


def test_at_level_0_nothing_is_cut(started: Starter) -> None:
    chat = replace(SCENARIO.classes["chat"], brownout_max_tokens=CAP)
    engine = started(classes={**SCENARIO.classes, "chat": chat}, overload=OverloadConfig())
    assert ask(engine, LONG)[1:4] == ("0", LONG, "stop")

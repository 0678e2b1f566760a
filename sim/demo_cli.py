"""The demo's face on the command line: what is said at each stage, the table at the end, the times."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import msgspec
from rich.console import Console

from engine.config import Scenario
from engine.errors import CalibrationError
from engine.model.folder import cache_dir, prepare
from engine.scenario import load
from engine.units import S_NS, format_ns
from sim import demo
from sim.desk.summary import Summary
from sim.desk.tables import demo_table, frame_table
from sim.twin import cost
from sim.twin.calibrate import busy_words, calibrate, describe
from sim.twin.cost import Calibration


class DemoJson(msgspec.Struct, frozen=True):
    """What ``demo --json`` prints."""

    ok: bool
    verdict: list[str]
    live: Summary
    twin: Summary
    capacity: demo.Capacity | None
    replays_identical: bool
    seconds: dict[str, float]
    folder: str
    report: str


def demo_cli(
    scenario: str, sets: tuple[str, ...], profile: str, seed: int | None, recalibrate: bool, floor: bool, json: bool,
    say: Callable[[str], None], emit: Callable[[Any], None], out: Console,
) -> bool:
    """Run it and show it. False when the verdict is "no"."""
    began = time.monotonic()
    resolved = load(scenario, sets)
    cache = cache_dir()
    empty = not cache.is_dir() or not any(cache.iterdir())
    say(f"cache      {cache} ({'empty' if empty else 'not empty'})")
    if resolved.scenario.model.name != cost.FAKE:
        prepare(resolved.scenario.model.name, say)
    model_s = time.monotonic() - began
    calibration = _calibration(resolved.scenario, recalibrate, say)
    calibration_s = time.monotonic() - began - model_s
    result = demo.run(scenario, sets, profile, seed, calibration, floor, say)
    seconds = {"model": model_s, "calibration": calibration_s, **result.seconds, "all": time.monotonic() - began}
    identical = all(r.identical for r in result.replays)
    ok = result.verdict.ok and identical
    if json:
        emit(DemoJson(
            ok, result.verdict.lines, result.live.summary, result.twin.summary, result.capacity, identical, seconds,
            str(result.folder), str(result.report),
        ))
    else:
        out.print(demo_table(result.live.summary, result.twin.summary))
        out.print("not served by the model or a cache, by class and reason")
        out.print(frame_table(result.lost))
        for line in result.verdict.lines:
            out.print(line, markup=False, soft_wrap=True)
        for replayed in result.replays:
            word = "identical" if replayed.identical else "DIFFERS"
            out.print(f"replay {word}: {replayed.events} events of {replayed.journal}", markup=False, soft_wrap=True)
    for remark in result.remarks:
        say(remark)
    say("times: " + ", ".join(f"{stage} {format_ns(s * S_NS)}" for stage, s in seconds.items()))
    say(f"report {result.report}")
    return ok


def _calibration(scenario: Scenario, recalibrate: bool, say: Callable[[str], None]) -> Calibration:
    path = cost.default_path(scenario.model.name)
    if scenario.model.name == cost.FAKE:
        found = cost.for_model(scenario, say=say)
        cost.require_encoder(scenario, found)  # the fake model cannot be measured; the model of its pace can
        say(f"calibration of {found.model}, measured {found.measured_at}; --recalibrate has nothing to measure")
        return found
    if not recalibrate:
        try:
            found = cost.for_model(scenario, say=say)
            cost.require_encoder(scenario, found)
            say(f"calibration {path}, measured {found.measured_at}; --recalibrate measures again")
            return found
        except CalibrationError as error:
            say(f"calibration {error.what}; measuring now, about a minute")
    found = calibrate(scenario, say)
    cost.save(found, path)
    for line in (*describe(found), *busy_words(found)):
        say(line)
    return found

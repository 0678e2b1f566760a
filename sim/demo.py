"""``doorbuster demo``: one flash sale on a real model, live and in the twin, with a report that shows both.

Calibrate, find the capacity, size the sale to twice of it, run it live, run the twin on the same arrivals, replay both
journals, judge. What is there is kept when a stage fails or is interrupted.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pandas as pd

from engine.scenario import Resolved, load
from sim import runs, sale
from sim.desk.capacity import WANTED, Bench, caches_off
from sim.desk.frames import requests_frame
from sim.desk.progress import Progress
from sim.desk.report import RunView, write_report
from sim.desk.series import turned_away
from sim.desk.summary import Verdict, good, verdict
from sim.live import drive, live_engine
from sim.loadgen import Seen
from sim.twin.calibrate import describe
from sim.twin.cost import Calibration
from sim.twin.replay import Replayed, replay
from sim.twin.workload import Request, flash_sale, profile_of, steady

CONFIRM_S = 20.0
CONFIRM_TRIES = 2
STEP_DOWN = 0.85  # of the rate, when the live engine does not confirm it


class Capacity(msgspec.Struct, frozen=True):
    """The highest steady rate within the SLO, and how it was found."""

    twin_rps: float
    live_rps: float
    attainment: float  # live, at live_rps
    requests: int
    confirmed: bool


class DemoResult(msgspec.Struct, frozen=True):
    """All that the command prints."""

    folder: Path
    capacity: Capacity | None
    base_rps: float
    expected_deflection: float
    live: RunView
    twin: RunView
    lost: pd.DataFrame  # by class and reason, live and twin
    verdict: Verdict
    replays: list[Replayed]
    lateness: str
    report: Path
    seconds: dict[str, float]


def run(
    name: str, sets: tuple[str, ...], profile: str, seed: int | None, calibration: Calibration,
    say: Callable[[str], None],
) -> DemoResult:
    """The whole demo; ``say`` gets a line for people at each stage."""
    resolved = load(name, sets)
    scenario = resolved.scenario
    seed = scenario.seed if seed is None else seed
    shape = profile_of(scenario, profile)
    folder = runs.create(resolved, "demo")
    seconds: dict[str, float] = {}
    clock = time.monotonic()

    def lap(stage: str) -> None:
        nonlocal clock
        now = time.monotonic()
        seconds[stage], clock = now - clock, now

    bench = sale.make_bench(resolved, calibration)
    capacity: Capacity | None = None
    base_rps, deflection = scenario.workload.base_rate_rps, 0.0
    if not base_rps:
        capacity = find_capacity(bench, resolved, sets, seed, folder / "capacity", say)
        base_rps, deflection = bench.base_rate_rps(capacity.live_rps, profile, seed)
        say(f"sale       base {base_rps:.1f}/s, plateau {base_rps * scenario.workload.spike_factor:.1f}/s; "
            f"the twin expects caches to answer {deflection:.0%} of the plateau")
    lap("capacity")

    requests = flash_sale(scenario, profile, base_rps, seed)
    say(f"live       {len(requests)} requests over {shape.duration_s:.0f} s")
    with Progress("live sale", len(requests), "requests") as progress:
        live, seen = sale.live_sale(resolved, sets, requests, shape.duration_s, seed, folder, progress.update)
    lap("live")
    bench.learn_lengths(*answer_lengths(requests, live.frame))
    twin = sale.twin_sale(bench, resolved, requests, shape.duration_s, seed, folder / "twin")
    lap("twin")

    journals = sorted((folder / "journal").glob("*.ndjson")) + sorted((folder / "twin" / "journal").glob("*.ndjson"))
    replays = [replay(path) for path in journals]
    lap("replay")
    result = verdict(live.frame, live.levels, scenario)
    lost = turned_away(live.frame, twin.frame, list(scenario.classes))
    report = write_report(
        folder, live, twin, result, card(resolved, profile, seed, calibration, capacity, base_rps, seen),
        {"Not served by the model or a cache, by class and reason": lost,
         "Replay of the journals": replay_table(replays, folder)},
    )
    lap("report")
    return DemoResult(
        folder, capacity, base_rps, deflection, live, twin, lost, result, replays, sale.lateness(seen), report, seconds
    )


def find_capacity(
    bench: Bench, resolved: Resolved, sets: tuple[str, ...], seed: int, folder: Path, say: Callable[[str], None]
) -> Capacity:
    """The twin's answer, confirmed (or lowered) by a short steady load on the live engine."""
    twin_rps = bench.capacity_rps(seed)
    say(f"capacity   the twin finds {twin_rps:.2f}/s within the SLO, response caches off; asking the live engine")
    bare = caches_off(resolved.scenario)
    off = tuple(f'classes.{name}.caches="none"' for name in bare.classes)
    rate = twin_rps
    attained, count = 0.0, 0
    with live_engine(resolved, (*sets, *off), folder) as engine:
        for attempt in range(CONFIRM_TRIES):
            requests = steady(bare, rate, CONFIRM_S, seed + attempt)
            with Progress("capacity", len(requests), "requests") as progress:
                seen = drive(engine, requests, bare.model.threads, progress.update)
            attained, count = attainment(seen, resolved), len(seen)
            say(f"capacity   live at {rate:.2f}/s: {attained:.1%} of {count} within their SLO")
            if attained >= WANTED:
                break
            if attempt + 1 < CONFIRM_TRIES:
                rate *= STEP_DOWN
    return Capacity(twin_rps, rate, attained, count, attained >= WANTED)


def attainment(seen: list[Seen], resolved: Resolved) -> float:
    """Share of the requests that clients saw answered within their class's SLO."""
    rows = pd.DataFrame([msgspec.to_builtins(s) for s in seen])
    frame = requests_frame([], rows.assign(tenant="", scheduled_ns=rows["scheduled_ns"] - rows["scheduled_ns"].min()))
    frame["outcome"] = (rows["status"] == 200).map({True: "served", False: "rejected"}).astype("string").to_numpy()
    return float(good(frame, resolved.scenario.classes).mean())


def answer_lengths(
    requests: list[Request], frame: pd.DataFrame
) -> tuple[dict[tuple[str, str], int], dict[str, int]]:
    """How long the model's answers were, by (class, text) and by request: all that the twin is told of the live run."""
    asked = {r.request_id: r for r in requests}
    by_text: dict[tuple[str, str], int] = {}
    by_request: dict[str, int] = {}
    mine = frame[(frame["tier"] == "model") & (frame["outcome"] == "served")]
    for request_id, tokens in zip(mine["request_id"], mine["output_tokens"], strict=True):
        request = asked[request_id]
        by_request[request_id] = int(tokens)
        by_text[(request.traffic_class, request.text)] = int(tokens)
    return by_text, by_request


def replay_table(replays: list[Replayed], folder: Path) -> pd.DataFrame:
    """One row a journal."""
    return pd.DataFrame(
        {
            "journal": [str(Path(r.journal).relative_to(folder)) for r in replays],
            "events": [r.events for r in replays],
            "identical": ["yes" if r.identical else f"no, first at record {r.events}" for r in replays],
        }
    )


def card(
    resolved: Resolved, profile: str, seed: int, calibration: Calibration, capacity: Capacity | None, base_rps: float,
    seen: list[Seen],
) -> dict[str, str]:
    """The environment card."""
    machine, scenario = calibration.machine, resolved.scenario
    factor = scenario.workload.spike_factor
    rows = {
        "scenario": f"{scenario.name}, profile {profile}, seed {seed}",
        "model": f"{calibration.model} ({calibration.model_digest}), {machine.dtype} on {machine.device}",
        "machine": f"{machine.cpu}, {machine.cores} cores, {machine.threads} torch thread(s), torch {machine.torch}",
        "calibration": f"measured {calibration.measured_at}; " + describe(calibration)[2],
        "sale": f"base {base_rps:.2f}/s, plateau {base_rps * factor:.2f}/s (+{factor - 1:.0%})",
        "load generator": "lateness " + sale.lateness(seen),
    }
    if capacity is not None:
        how = "confirmed" if capacity.confirmed else "NOT confirmed"
        rows["capacity"] = (
            f"{capacity.live_rps:.2f}/s, {how} live: {capacity.attainment:.1%} of {capacity.requests} within their SLO "
            f"(the twin said {capacity.twin_rps:.2f}/s)"
        )
    return rows

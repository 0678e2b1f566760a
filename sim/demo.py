"""``doorbuster demo``: one flash sale on a real model, live and in the twin, with a report that shows both.

Calibrate, find the capacity, size the sale to twice of it, run it live, run the twin on the same arrivals, replay both
journals, judge. What is there is kept when a stage fails or is interrupted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec
import pandas as pd

from engine.errors import JournalError
from engine.scenario import Resolved, load
from engine.units import s_to_ns
from sim import runs, sale
from sim.desk.capacity import WANTED, Bench, caches_off, wilson
from sim.desk.frames import requests_frame
from sim.desk.progress import Progress
from sim.desk.report import RunView, write_report
from sim.desk.series import turned_away
from sim.desk.summary import Verdict, good, verdict
from sim.live import drive, live_engine
from sim.loadgen import Seen, late_warning
from sim.twin.calibrate import describe
from sim.twin.cost import FAKE, Calibration
from sim.twin.replay import Replayed, journals_of, replay
from sim.twin.steps import cost_error, outside_words, replica_journals
from sim.twin.workload import Request, flash_sale, profile_of, steady

FLOOR = "floor"  # of the run folder: the same sale live once more; how far live is from live
CARD = "card.json"  # of the run folder: the report's environment card, for `doorbuster report`
LOST = "Not served by the model or a cache, by class and reason"
CONFIRM_S = 20.0
CONFIRM_REQUESTS = 100  # fewer, and a single late answer decides
CONFIRM_TRIES = 3
CONFIRM_BUDGET_S = 130.0  # no further try that would not fit: the whole demo is to take six minutes at most
STEP_DOWN = 0.88  # of the rate, when the live engine does not confirm it


class Capacity(msgspec.Struct, frozen=True):
    """The highest steady rate within the SLO, and how it was found."""

    twin_rps: float
    live_rps: float
    attainment: float  # live, at live_rps
    requests: int
    confirmed: bool
    low: float  # 95 % interval of the attainment
    high: float

    def __str__(self) -> str:
        word = "confirmed" if self.confirmed else "NOT confirmed"
        return (f"{self.live_rps:.2f}/s, {word} live: {self.attainment:.1%} of {self.requests} within their SLO "
                f"(95 % interval {self.low:.1%} to {self.high:.1%}); the twin said {self.twin_rps:.2f}/s")


class DemoResult(msgspec.Struct, frozen=True):
    """All that the command prints."""

    folder: Path
    capacity: Capacity | None
    base_rps: float
    live: RunView
    twin: RunView
    lost: pd.DataFrame  # by class and reason, live and twin
    verdict: Verdict
    replays: list[Replayed]
    remarks: list[str]  # lines for people, when all is done
    report: Path
    seconds: dict[str, float]


def run(
    name: str, sets: tuple[str, ...], profile: str, seed: int | None, calibration: Calibration, floor: bool,
    say: Callable[[str], None],
) -> DemoResult:
    """The whole demo; ``say`` gets a line for people at each stage. ``floor``: the live sale twice, for `compare`."""
    resolved = load(name, sets)
    bench = sale.make_bench(resolved, calibration)
    folder = runs.create(resolved, "demo")
    with runs.kept(folder, say):
        return _run(resolved, bench, folder, sets, profile, seed, floor, say)


def _run(
    resolved: Resolved, bench: Bench, folder: Path, sets: tuple[str, ...], profile: str, seed: int | None, floor: bool,
    say: Callable[[str], None],
) -> DemoResult:
    scenario, calibration = resolved.scenario, bench.calibration
    seed = scenario.seed if seed is None else seed
    shape = profile_of(scenario, profile)
    seconds: dict[str, float] = {}
    clock = time.monotonic()

    def lap(stage: str) -> None:
        nonlocal clock
        now = time.monotonic()
        seconds[stage], clock = now - clock, now

    capacity: Capacity | None = None
    base_rps = scenario.workload.base_rate_rps
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
    if floor:
        with Progress("once more", len(requests), "requests") as progress:
            sale.live_sale(resolved, sets, requests, shape.duration_s, seed, folder / FLOOR, progress.update)
        lap("floor")
    bench.learn_lengths(*answer_lengths(requests, live.frame))
    twin = sale.twin_sale(bench, resolved, requests, shape.duration_s, seed, folder / "twin")
    lap("twin")

    replays = [replay(path) for path in journals_of(folder)]
    lap("replay")
    result = verdict(live.frame, live.levels, scenario)
    lost = turned_away(live.frame, twin.frame, list(scenario.classes))
    outside = outside_words(calibration, *replica_journals(folder / "twin"))
    errors = str(cost_error(calibration, *replica_journals(folder)))
    rows = card(resolved, profile, seed, calibration, capacity, base_rps, seen)
    rows |= {"outside the range": outside, "step cost error, live": errors}
    runs.write_json(folder / CARD, rows)
    report = write_report(folder, live, twin, result, rows, extra_tables(live, twin, replay_table(replays, folder)))
    lap("report")
    remarks = [
        *([] if capacity is None else [f"capacity {capacity}"]),
        f"load generator lateness: {sale.lateness(seen)}", *filter(None, [late_warning(seen)]),
        f"step cost error on the live run: {errors}", outside,
    ]
    return DemoResult(folder, capacity, base_rps, live, twin, lost, result, replays, remarks, report, seconds)


def find_capacity(
    bench: Bench, resolved: Resolved, sets: tuple[str, ...], seed: int, folder: Path, say: Callable[[str], None],
    start: float = 1.0,
) -> Capacity:
    """The twin's answer, confirmed (or lowered) by a short steady load on the live engine; from ``start`` times it."""
    twin_rps = bench.capacity_rps(seed)
    say(f"capacity   the twin finds {twin_rps:.2f}/s within the SLO, response caches off; asking the live engine")
    bare = caches_off(resolved.scenario)
    off = tuple(f'classes.{name}.caches="none"' for name in bare.classes)
    with live_engine(resolved, (*sets, *off), folder) as engine:

        def ask(rate_rps: float, duration_s: float, attempt: int) -> tuple[int, int]:
            requests = confirming(steady(bare, rate_rps, 2 * duration_s, seed + attempt), duration_s)
            with Progress("capacity", len(requests), "requests") as progress:
                seen = drive(engine, requests, bare, progress.update)
            return within_slo(seen, resolved), len(seen)

        return confirm(twin_rps, ask, say, start)


def confirming(requests: list[Request], duration_s: float) -> list[Request]:
    """Those of the first ``duration_s`` seconds, and more if they are too few to judge by."""
    within = sum(r.at_ns < s_to_ns(duration_s) for r in requests)
    return requests[: max(within, CONFIRM_REQUESTS)]


def confirm(
    twin_rps: float, ask: Callable[[float, float, int], tuple[int, int]], say: Callable[[str], None],
    start: float = 1.0,
) -> Capacity:
    """Ask the live engine at the twin's rate, then lower: ``ask(rate, seconds, attempt)`` says (within SLO, of all)."""
    rate, spent_s, attempt = twin_rps * start, 0.0, 0
    while True:
        duration_s = max(CONFIRM_S, CONFIRM_REQUESTS / rate)
        good_ones, count = ask(rate, duration_s, attempt)
        attained = good_ones / count if count else 0.0
        low, high = wilson(good_ones, count) if count else (0.0, 1.0)
        enough = attained >= WANTED
        say(f"capacity   live at {rate:.2f}/s: {attained:.1%} of {count} within their SLO (95 % interval {low:.1%} to "
            f"{high:.1%}; wanted {WANTED:.0%}): {'confirmed' if enough else 'NOT confirmed'}")
        attempt, spent_s = attempt + 1, spent_s + duration_s
        next_s = max(CONFIRM_S, CONFIRM_REQUESTS / (rate * STEP_DOWN))
        if enough or attempt == CONFIRM_TRIES or spent_s + next_s > CONFIRM_BUDGET_S:
            return Capacity(twin_rps, rate, attained, count, enough, low, high)
        rate *= STEP_DOWN


def within_slo(seen: list[Seen], resolved: Resolved) -> int:
    """How many requests their clients saw answered, whole, within their class's SLO."""
    if not seen:
        return 0
    rows = pd.DataFrame([msgspec.to_builtins(s) for s in seen])
    frame = requests_frame([], rows.assign(tenant="", scheduled_ns=rows["scheduled_ns"] - rows["scheduled_ns"].min()))
    whole = rows.set_index("request_id")["status"].eq(200) & rows.set_index("request_id")["error_code"].isna()
    frame["outcome"] = frame["request_id"].map(whole).map({True: "served", False: "rejected"}).astype("string")
    return int(good(frame, resolved.scenario.classes).sum())


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


def extra_tables(live: RunView, twin: RunView, replays: pd.DataFrame) -> Mapping[str, pd.DataFrame]:
    """What a demo's report shows below the figures."""
    lost = turned_away(live.frame, twin.frame, list(live.scenario.classes))
    return {LOST: lost, "Replay of the journals": replays}


def replay_table(replays: list[Replayed], folder: Path) -> pd.DataFrame:
    """One row a journal."""
    return pd.DataFrame(
        {
            "journal": [str(Path(r.journal).relative_to(folder)) for r in replays],
            "events": [r.events for r in replays],
            "identical": ["yes" if r.identical else f"no, first at record {r.events}" for r in replays],
        }
    )


def replay_again(folder: Path) -> pd.DataFrame:
    """The same of a folder that was left some time ago; a journal that this version cannot read is said to be one."""
    rows: list[dict[str, object]] = []
    for path in journals_of(folder):
        try:
            rows += replay_table([replay(path)], folder).to_dict("records")
        except (JournalError, msgspec.ValidationError) as error:
            words = error.what if isinstance(error, JournalError) else str(error)
            rows.append({"journal": str(path.relative_to(folder)), "events": 0, "identical": f"cannot tell: {words}"})
    return pd.DataFrame(rows)


def card(
    resolved: Resolved, profile: str, seed: int, calibration: Calibration, capacity: Capacity | None, base_rps: float,
    seen: list[Seen],
) -> dict[str, str]:
    """The environment card."""
    machine, scenario = calibration.machine, resolved.scenario
    factor = scenario.workload.spike_factor
    pace = "fake, at the pace of " if scenario.model.name == FAKE else ""
    rows = {
        "scenario": f"{scenario.name}, profile {profile}, seed {seed}",
        "model": f"{pace}{calibration.model} ({calibration.model_digest}), {machine.dtype} on {machine.device}",
        "machine": f"{machine.cpu}, {machine.cores} cores, {machine.threads} torch thread(s), torch {machine.torch}",
        "calibration": f"measured {calibration.measured_at}; " + describe(calibration)[2],
        "sale": f"base {base_rps:.2f}/s, plateau {base_rps * factor:.2f}/s (+{factor - 1:.0%})",
        "load generator": "lateness " + sale.lateness(seen),
    }
    if capacity is not None:
        rows["capacity"] = str(capacity)
    return rows

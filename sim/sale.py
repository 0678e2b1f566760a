"""One sale, live or in the twin, into a run folder: journal, ledger, requests.parquet, summary.json."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path

import msgspec
import pandas as pd

from engine.errors import UserError
from engine.events import LedgerRecord
from engine.model.blockhash import Hasher
from engine.scenario import Resolved
from engine.service.facts import FactMaker
from engine.service.server import tokenizer_for
from engine.units import S_NS, s_to_ns
from sim import runs
from sim.desk.boundaries import breaker_frame
from sim.desk.capacity import Bench
from sim.desk.frames import level_frame, read_records, read_run, requests_frame, write_run
from sim.desk.labels import labelled
from sim.desk.report import RunView
from sim.desk.summary import summarise
from sim.live import LiveEngine, drive, live_engine
from sim.loadgen import Seen
from sim.twin.cost import Calibration, require_encoder
from sim.twin.steps import logged_steps, replica_journals
from sim.twin.workload import Request

HASH_KEY = b"the twin's world"  # digests need to differ from one another, not from an attacker's


def make_bench(resolved: Resolved, calibration: Calibration) -> Bench:
    """The twin of a scenario. CalibrationError when it needs an encoder and none was measured."""
    scenario = resolved.scenario
    require_encoder(scenario, calibration)
    hasher = Hasher(HASH_KEY, scenario.prefix.block_tokens)
    facts = FactMaker(tokenizer_for(scenario.model.name), hasher, scenario, scenario.model.name)
    return Bench(scenario, calibration, facts, hasher)


def twin_sale(
    bench: Bench, resolved: Resolved, requests: list[Request], duration_s: float, seed: int, folder: Path
) -> RunView:
    """The requests through the twin."""
    scenario = resolved.scenario
    run = bench.run(requests, scenario, folder)
    records: list[LedgerRecord] = [*run.requests, *run.levels, *run.breakers]
    frame = labelled(requests_frame(run.requests), requests)
    frame["lateness_ns"] = pd.array([0] * len(frame), dtype="Int64")
    end_ns = max(s_to_ns(duration_s), run.end_ns)
    write_run(folder, frame, records, end_ns)
    levels = level_frame(records, end_ns)
    busy = run.busy_ns / max(1, end_ns)
    summary = summarise(frame, scenario, "sim", seed, end_ns / S_NS, levels, busy, scenario.replicas)
    runs.write_json(folder / "summary.json", summary)
    return RunView(summary, frame, levels, scenario, breaker_frame(records, end_ns))


def live_sale(
    resolved: Resolved,
    sets: tuple[str, ...],
    requests: list[Request],
    duration_s: float,
    seed: int,
    folder: Path,
    on_done: Callable[[int], None],
    after: Callable[[LiveEngine], None] = lambda engine: None,
) -> tuple[RunView, list[Seen]]:
    """The requests through a live engine of its own; ``after`` is called while it still runs."""
    scenario = resolved.scenario
    with live_engine(resolved, sets, folder) as engine:
        seen = drive(engine, requests, scenario, on_done)
        after(engine)
    if not seen:
        raise UserError("the workload has no request", fix="a longer profile, or a higher workload.base_rate_rps")
    start_ns = seen[0].scheduled_ns - requests[0].at_ns - engine.epoch_ns
    return record_live(resolved, requests, seen, start_ns, engine.epoch_ns, duration_s, seed, folder), seen


def record_live(
    resolved: Resolved, requests: list[Request], seen: list[Seen], start_ns: int, epoch_ns: int, duration_s: float,
    seed: int, folder: Path,
) -> RunView:
    """requests.parquet and summary.json beside the engine's own journal and ledger. ``start_ns``: on its clock."""
    scenario = resolved.scenario
    rows = pd.DataFrame([msgspec.to_builtins(s) for s in seen])
    rows["scheduled_ns"] -= epoch_ns + start_ns
    records = read_records(folder)
    frame = labelled(requests_frame(records, rows, start_ns), requests)
    end_ns = max(s_to_ns(duration_s), int((rows["scheduled_ns"] + rows["e2e_ns"].fillna(0)).max()))
    write_run(folder, frame, None, end_ns, start_ns)
    run = read_run(folder)
    steps = (step for path in replica_journals(folder) for step in logged_steps(path))
    busy = sum(step.ns for step in steps if step.at_ns >= start_ns) / scenario.replicas / max(1, end_ns)
    summary = summarise(frame, scenario, "load", seed, end_ns / S_NS, run.levels, busy, scenario.replicas)
    runs.write_json(folder / "summary.json", summary)
    breakers = breaker_frame(run.records, run.duration_ns, run.start_ns)
    return RunView(summary, run.frame, run.levels, scenario, breakers)


def lateness(seen: list[Seen]) -> str:
    """How punctual the load generator was, in words."""
    late_ms = sorted(s.lateness_ns / 1e6 for s in seen)
    p99 = late_ms[min(len(late_ms) - 1, round(0.99 * len(late_ms)))]
    return f"median {statistics.median(late_ms):.1f} ms, p99 {p99:.1f} ms, worst {late_ms[-1]:.1f} ms"

"""``doorbuster load``: an open-loop sale on an engine that somebody else runs; only the client's view is known."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import msgspec
import pandas as pd
from rich.table import Table

from engine.errors import UserError
from engine.scenario import load
from engine.units import S_NS, s_to_ns
from sim import runs
from sim.desk.frames import level_frame, requests_frame, write_run
from sim.desk.progress import Progress
from sim.desk.summary import Summary, summarise
from sim.desk.tables import run_table
from sim.loadgen import Seen, late_warning, play
from sim.twin.workload import flash_sale, profile_of


def bare_load(
    name: str, sets: tuple[str, ...], url: str, key: str, rate_rps: float | None, profile: str | None,
    seed: int | None, say: Callable[[str], None],
) -> tuple[Summary, Table, Path]:
    """Summary, table, run folder."""
    resolved = load(name, sets)
    scenario = resolved.scenario
    profile = profile or "demo"
    shape = profile_of(scenario, profile)
    seed = scenario.seed if seed is None else seed
    base_rps = rate_rps or scenario.workload.base_rate_rps
    if not key:
        raise UserError("no API key", fix="--key KEY, or DOORBUSTER_API_KEY; `doorbuster serve` prints one")
    if not base_rps:
        raise UserError("no rate: an engine's capacity cannot be seen from outside", fix="--rate REQUESTS_PER_SECOND")
    requests = flash_sale(scenario, profile, base_rps, seed)
    if not requests:
        raise UserError("the workload has no request", fix="a longer profile, or a higher --rate")
    keys = {cls.tenant: key for cls in scenario.classes.values()}
    with Progress("load", len(requests), "requests", budget_s=shape.duration_s) as progress:
        seen = asyncio.run(play(url, keys, requests, progress.update))
    if late := late_warning(seen):
        say(late)
    folder = runs.create(resolved, "load")
    frame = client_frame(seen)
    end_ns = max(s_to_ns(shape.duration_s), int((frame["arrived_ns"] + frame["e2e_ns"].fillna(0)).max()))
    write_run(folder, frame, [], end_ns)
    summary = summarise(frame, scenario, "load", seed, end_ns / S_NS, level_frame([], end_ns), None)
    runs.write_json(folder / "summary.json", summary)
    return summary, run_table(summary), folder


def client_frame(seen: list[Seen]) -> pd.DataFrame:
    """requests.parquet's columns, as far as a client can fill them."""
    rows = pd.DataFrame([msgspec.to_builtins(s) for s in seen])
    rows["scheduled_ns"] -= rows["scheduled_ns"].min()
    frame = requests_frame([], rows)
    by_id = rows.set_index("request_id")
    ok = (by_id["status"] == 200) & by_id["error_code"].isna()
    for column in ("tier", "level", "output_tokens", "cached_tokens"):
        frame[column] = frame["request_id"].map(by_id[column]).astype(frame[column].dtype)
    served = frame["request_id"].map(ok).astype(bool)
    frame.loc[served, "outcome"] = "served"
    frame.loc[~served, "outcome"] = "rejected"
    frame.loc[served, "error_code"] = None
    return frame

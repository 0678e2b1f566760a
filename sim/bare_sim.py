"""``doorbuster sim``: one sale in the twin, from a scenario's name to a run folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rich.table import Table

from engine.scenario import load
from engine.service.replicas import share_cores
from sim import runs, sale
from sim.desk.report import write_report
from sim.desk.summary import Summary
from sim.desk.tables import run_table
from sim.twin import cost
from sim.twin.calibrate import describe
from sim.twin.workload import flash_sale, profile_of


def bare_sim(
    name: str, sets: tuple[str, ...], profile: str | None, rate_rps: float | None, seed: int | None,
    calibration: Path | None, foreign: bool, say: Callable[[str], None],
) -> tuple[Summary, Table, Path]:
    """Summary, table, run folder."""
    resolved = load(name, sets)
    scenario = resolved.scenario
    profile = profile or "demo"
    shape = profile_of(scenario, profile)
    seed = scenario.seed if seed is None else seed
    _, _, threads = share_cores(scenario.model.threads)
    costs = cost.load_for(
        calibration or cost.default_path(scenario.model.name), threads, scenario.model.name, foreign
    )
    bench = sale.make_bench(resolved, costs)
    base_rps = rate_rps or scenario.workload.base_rate_rps
    if not base_rps:
        capacity_rps = bench.capacity_rps(seed)
        base_rps, deflected = bench.base_rate_rps(capacity_rps, profile, seed)
        say(
            f"capacity {capacity_rps:.2f}/s by the twin, response caches off; base {base_rps:.2f}/s, plateau "
            f"{base_rps * scenario.workload.spike_factor:.2f}/s, of which caches answer {deflected:.0%}"
        )
    folder = runs.create(resolved, "sim")
    view = sale.twin_sale(
        bench, resolved, flash_sale(scenario, profile, base_rps, seed), shape.duration_s, seed, folder
    )
    card = {"scenario": f"{scenario.name}, profile {profile}, seed {seed}", "calibration": " · ".join(describe(costs))}
    write_report(folder, view, None, None, card)
    return view.summary, run_table(view.summary), folder

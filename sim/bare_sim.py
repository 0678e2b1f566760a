"""``doorbuster sim``: one sale in the twin, from a scenario's name to a run folder.

Two runs with other settings must be the same sale, or the effect of the settings would drown in another load. So the
base rate is sized from what the scenario says of load and model, and never from the policies that ``--set`` changes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from rich.table import Table

from engine.errors import UserError
from engine.scenario import Resolved, load, overlay
from sim import runs, sale
from sim.demo import CARD
from sim.desk.report import write_report
from sim.desk.summary import Summary
from sim.desk.tables import run_table
from sim.twin import cost
from sim.twin.calibrate import describe
from sim.twin.cost import Calibration
from sim.twin.steps import outside_words, replica_journals
from sim.twin.workload import flash_sale, profile_of

LOAD_KEYS = ("workload", "model", "seed")  # what a sale is sized by; and the classes' shares and tenants
CLASS_KEYS = ("share", "tenant")


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
    costs = cost.for_model(scenario, calibration, foreign, say)
    bench = sale.make_bench(resolved, costs)
    base_rps = rate_rps or scenario.workload.base_rate_rps
    if not base_rps:
        base_rps = sized(name, sets, resolved, costs, profile, seed, say)
    folder = runs.create(resolved, "sim")
    view = sale.twin_sale(
        bench, resolved, flash_sale(scenario, profile, base_rps, seed), shape.duration_s, seed, folder
    )
    outside = outside_words(costs, *replica_journals(folder))
    say(outside)
    card = {
        "scenario": f"{scenario.name}, profile {profile}, seed {seed}", "calibration": " · ".join(describe(costs)),
        "sale": f"base {base_rps:.2f}/s, plateau {base_rps * scenario.workload.spike_factor:.2f}/s",
        "outside the range": outside,
    }
    runs.write_json(folder / CARD, card)
    write_report(folder, view, None, None, card)
    return view.summary, run_table(view.summary), folder


def sized(
    name: str, sets: tuple[str, ...], resolved: Resolved, costs: Calibration, profile: str, seed: int,
    say: Callable[[str], None],
) -> float:
    """The base rate at which the plateau is ``overload_factor`` x capacity for the scenario without its changes."""
    if math.isinf(resolved.scenario.model.fake_speed):
        raise UserError("a model that takes no time has no capacity", fix="--rate REQUESTS_PER_SECOND")
    kept = tuple(item for item in sets if _of_the_load(item))
    changed = [item for item in sets if item not in kept]
    bench = sale.make_bench(load(name, kept), costs)
    capacity_rps = bench.capacity_rps(seed)
    base_rps, deflected = bench.base_rate_rps(capacity_rps, profile, seed)
    say(
        f"capacity {capacity_rps:.2f}/s by the twin, response caches off; base {base_rps:.2f}/s, plateau "
        f"{base_rps * resolved.scenario.workload.spike_factor:.2f}/s, of which caches answer {deflected:.0%}"
    )
    if changed:
        say(f"the same sale as without --set {' --set '.join(changed)}: these change the engine, not the load; "
            "another load: --rate, or --set workload.…")
    return base_rps


def _of_the_load(item: str) -> bool:
    section, *_, key = overlay({}, item).split(".")
    return section in LOAD_KEYS or (section == "classes" and key in CLASS_KEYS)

"""What becomes of each class while the sale is at its height: ``python -m sim.desk.plateau --rate 14 [--live]``.

The very same sales under several overload controls, side by side (``held.py`` counts). The capacity is the highest
steady rate of the same mix, caches off, of which 99 % is in time: the twin's, or measured live. Live, each sale's
critical questions are asked before it too, one after another (``unloaded.py``).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec

from engine.config import Scenario
from engine.errors import DoorbusterError, UserError
from engine.scenario import Resolved, data_path, load
from sim import runs, sale
from sim.demo import find_capacity
from sim.desk import spike_plot, unloaded
from sim.desk.frames import read_records, read_run
from sim.desk.held import ALONE, Held, held, p99
from sim.desk.unloaded import Texts
from sim.twin import cost
from sim.twin.workload import flash_sale, profile_of

FIRST_COME = (
    "overload.enabled=false", "fairness.enabled=false", "batcher.reserved_slots=0", "batcher.reserved_blocks=0",
)
ALL_OR_NOTHING = (
    "overload.graded=false", "overload.degraded_share=0.4", "overload.shed_share=0.5", "overload.hold_ms=750",
)
PICTURES = (".png", ".svg", ".pdf")
ABOVE = 1.12  # live, the first rate that is tried for the capacity, of the twin's: the highest that holds is meant


def rows_of(scenario: Scenario) -> dict[str, tuple[str, ...]]:
    """Names and what they set. First come, first served knows no classes, and drops nobody before his timeout."""
    equal = tuple(
        setting for name, cls in scenario.classes.items()
        for setting in (f"classes.{name}.criticality=standard", f"classes.{name}.max_wait_ms={cls.timeout_ms}")
    )
    return {
        "first come, first served": (*FIRST_COME, *equal),
        "priorities, nothing shed": ("overload.enabled=false",),
        "all or nothing": ALL_OR_NOTHING,
        "a share, by lot": (),
    }


def table(rows: dict[str, list[Held]], capacity_rps: float, plateau_s: float) -> Iterator[str]:
    """In Markdown; counts and latencies pooled over the sales, the worst where a worst is meant."""
    yield ("| overload control | model's goodput, of capacity | of what it computed, late | in time by any tier "
           "| critical in time | critical p99: wait, TTFT, end | its wait alone | answers as alone "
           "| sheddable answered | level changes a sale, most in 10 s | level 0 after the end | prompt tokens cached |")
    yield "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|"
    for name, sales in rows.items():
        def pool(one: str, sales: Sequence[Held] = sales) -> int:
            return sum(getattr(each, one) for each in sales)

        goodput = pool("model_good") / (plateau_s * len(sales)) / capacity_rps
        computed = max(1, pool("model_good") + pool("model_late"))
        late_ms = ", ".join(f"{p99(sales, field):.0f}" for field in ("wait_ms", "ttft_ms", "e2e_ms"))
        alone_ms = f"{p99(sales, 'alone_wait_ms'):.0f} ms" if any(each.alone_wait_ms for each in sales) else "-"
        yield (
            f"| {name} | {goodput:.1%} | {pool('model_late') / computed:.2%} | {pool('good') / pool('offered'):.1%} "
            f"| {pool('critical_good')} of {pool('critical')} | {late_ms} ms | {alone_ms} "
            f"| {pool('same')} of {pool('compared')} | {pool('sheddable_answered') / max(1, pool('sheddable')):.1%} "
            f"| {sum(len(each.changes_s) for each in sales) / len(sales):.0f}, "
            f"{max(each.changes_in_10_s for each in sales)} | {max(each.calm_after_s for each in sales):.1f} s "
            f"| {pool('cached_tokens') / max(1, pool('prompt_tokens')):.1%} |"
        )


def highest_confirmed(
    bench: sale.Bench, resolved: Resolved, sets: tuple[str, ...], seed: int, say: Callable[[str], None]
) -> float:
    """Live, the highest rate that holds: from above the twin's down to one that does, or up while they do.

    Raises UserError when none of them held.
    """
    start, held_rps = ABOVE, 0.0
    while True:
        tried = find_capacity(bench, resolved, sets, seed, runs.create(resolved, "live"), say, start=start)
        held_rps = max(held_rps, tried.live_rps * tried.confirmed)
        if not tried.confirmed or tried.live_rps < tried.twin_rps * start * 0.999:  # it had to go down
            break
        start *= ABOVE
    if not held_rps:
        raise UserError("no rate was confirmed live", why=str(tried), fix="a quiet machine")
    return held_rps


class Measured(msgspec.Struct, frozen=True):
    """Every row on every seed. ``folders``: the first sale of each row."""

    rows: dict[str, list[Held]]
    folders: dict[str, Path]
    capacity_rps: float


def measure(
    scenario_name: str, sets: tuple[str, ...], profile: str, rate_rps: float, seeds: list[int], made: cost.Calibration,
    live: bool, only: list[str], say: Callable[[str], None],
) -> Measured:
    """One sale after another."""
    resolved = load(scenario_name, sets)
    bench = sale.make_bench(resolved, made)
    if live:
        capacity_rps = highest_confirmed(bench, resolved, sets, seeds[0], say)
    else:
        capacity_rps = bench.capacity_rps(seeds[0])
        say(f"capacity {capacity_rps:.2f}/s by the twin, response caches off")
    found = Measured({}, {}, capacity_rps)
    duration_s = profile_of(resolved.scenario, profile).duration_s
    for name, more in rows_of(resolved.scenario).items():
        if only and name not in only:
            continue
        own = load(scenario_name, (*sets, *more))
        found.rows[name] = []
        for seed in seeds:
            requests = flash_sale(resolved.scenario, profile, rate_rps, seed)
            folder = runs.create(own, "live" if live else "sim")
            found.folders.setdefault(name, folder)
            texts: Texts = ({}, {})
            if live:
                texts = unloaded.sale_between(own, (*sets, *more), requests, duration_s, seed, folder)
            else:
                sale.twin_sale(sale.make_bench(own, made), own, requests, duration_s, seed, folder)
            run = read_run(folder)
            found.rows[name].append(held(
                run.frame, run.records, resolved.scenario, profile, run.start_ns, texts, read_records(folder / ALONE)
            ))
            say(f"{name}, seed {seed}: {len(requests):,} requests")
    return found


def main() -> int:
    """One table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--scenario", default="flash-sale")
    parser.add_argument("--rate", type=float, required=True, help="base rate in requests per second")
    parser.add_argument("--profile", default="demo")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--calibration", type=Path, default=data_path("calibrations", "smollm2-reference.json"))
    parser.add_argument("--live", action="store_true", help="on a live engine of this machine instead of in the twin")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="the first seed of every row, side by side")
    parser.add_argument("--only", action="append", default=[], metavar="ROW")
    parser.add_argument("--set", dest="sets", action="append", default=[], metavar="SECTION.KEY=VALUE")
    given = parser.parse_args()

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    try:
        made, sets = cost.load(given.calibration), tuple(given.sets)
        names = list(rows_of(load(given.scenario, sets).scenario))
        if unknown := [name for name in given.only if name not in names]:
            raise UserError(f"no such row: {', '.join(unknown)}", where="--only", fix=f"one of: {'; '.join(names)}")
        if given.plot and (not given.plot.parent.is_dir() or given.plot.suffix not in PICTURES):
            raise UserError("no place for a picture", str(given.plot), fix=f"an existing folder, {', '.join(PICTURES)}")
        found = measure(
            given.scenario, sets, given.profile, given.rate, given.seeds, made, given.live, given.only, say
        )
        shape = profile_of(load(given.scenario, sets).scenario, given.profile)
    except DoorbusterError as error:
        print(error, file=sys.stderr)
        return 2
    where = "live" if given.live else "twin"
    print(f"{where}, base {given.rate:g}/s, profile {given.profile}, seeds {' '.join(map(str, given.seeds))}, capacity "
          f"{found.capacity_rps:.2f}/s {' '.join(given.sets)}\n")
    print("\n".join(table(found.rows, found.capacity_rps, shape.plateau_s)))
    if given.plot:
        spike_plot.side_by_side(found.folders, load(given.scenario, sets).scenario, given.profile).savefig(given.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What becomes of each class while the sale is at its height: ``python -m sim.desk.plateau --rate 14 [--live]``.

The very same sales under several overload controls, side by side. Goodput counts what the model itself computed within
both of the class's limits, against the capacity: the highest steady rate of the same mix, caches off, of which 99 % is
in time. Recommendations that are answered from approximations are in time too, but no goodput of the model's.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec

from engine.config import Scenario
from engine.errors import DoorbusterError
from engine.scenario import data_path, load
from engine.units import MS_NS, S_NS, s_to_ns
from sim import runs, sale
from sim.desk.report import RunView
from sim.twin import cost
from sim.twin.workload import flash_sale, profile_of

FIRST_COME = (
    "overload.enabled=false", "fairness.enabled=false", "batcher.reserved_slots=0", "batcher.reserved_blocks=0",
)
ALL_OR_NOTHING = (
    "overload.graded=false", "overload.degraded_share=0.4", "overload.shed_share=0.5", "overload.quiet_windows=3",
)
CALM_WITHIN_NS = 10 * S_NS


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


class Held(msgspec.Struct, frozen=True):
    """One sale. Shares are of the requests that arrived on the plateau."""

    model_good: int  # computed by the model, within both limits
    model_late: int
    critical: int
    critical_good: int
    critical_wait_p99_ms: float
    sheddable: int
    sheddable_answered: int
    offered: int
    good: int  # by whatever tier
    level_changes: int  # in the whole sale
    changes_in_10_s: int  # at most
    calm_after_s: float  # from the end of the decay to level 0 for good; below 0: before
    prompt_tokens: int = 0  # of what the model computed
    cached_tokens: int = 0  # of these, found in the prefix cache


def held(view: RunView, scenario: Scenario, profile: str) -> Held:
    """From a run's frame and levels."""
    shape = profile_of(scenario, profile)
    begin_ns = s_to_ns(shape.base_s + shape.ramp_s)
    frame = view.frame[view.frame["arrived_ns"].between(begin_ns, begin_ns + s_to_ns(shape.plateau_s), "left")]
    classes = scenario.classes
    limits = {name: (cls.slo_ttft_ms * MS_NS, cls.slo_e2e_ms * MS_NS) for name, cls in classes.items()}
    ttft = frame["traffic_class"].map(lambda name: limits[name][0]).astype("Int64")
    e2e = frame["traffic_class"].map(lambda name: limits[name][1]).astype("Int64")
    good = ((frame["outcome"] == "served") & (frame["ttft_ns"] <= ttft) & (frame["e2e_ns"] <= e2e)).fillna(False)
    criticality = frame["traffic_class"].map(lambda name: classes[name].criticality)
    if "critical" not in set(criticality):  # where all are equal, the one that would matter most
        criticality = criticality.where(frame["traffic_class"] != next(iter(classes)), "critical")
    model, critical, sheddable = frame["tier"] == "model", criticality == "critical", criticality == "sheddable"
    if not sheddable.any():
        sheddable = frame["traffic_class"] == list(classes)[-1]
    waits = frame.loc[critical & model, "queue_ns"].dropna()
    at_ns = view.levels["at_ns"].to_numpy()[1:-1]  # the first row and the last one are no changes
    most = max((int(((at_ns >= t) & (at_ns < t + 10 * S_NS)).sum()) for t in at_ns), default=0)
    loud = view.levels["at_ns"][view.levels["level"].shift(1).fillna(0) > 0]
    calm_ns = int(loud.iloc[-1]) if len(loud) else 0
    return Held(
        int((model & good).sum()), int((model & ~good).sum()), int(critical.sum()), int((critical & good).sum()),
        float(waits.quantile(0.99)) / MS_NS if len(waits) else 0.0, int(sheddable.sum()),
        int((sheddable & (frame["outcome"] == "served")).sum()), len(frame), int(good.sum()), len(at_ns), most,
        calm_ns / S_NS - shape.duration_s, int(frame.loc[model, "prompt_tokens"].sum()),
        int(frame.loc[model, "cached_tokens"].sum()),
    )


def table(rows: dict[str, list[Held]], capacity_rps: float, plateau_s: float) -> Iterator[str]:
    """In Markdown; counts pooled over the sales, the worst where a worst is meant."""
    yield ("| overload control | model's goodput, of capacity | of what it computed, late | in time by any tier "
           "| critical in time | critical wait p99 | sheddable answered | level changes a sale, most in 10 s "
           "| level 0 after the end | prompt tokens cached |")
    yield "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|"
    for name, sales in rows.items():
        def pool(one: str, sales: Sequence[Held] = sales) -> int:
            return sum(getattr(each, one) for each in sales)

        goodput = pool("model_good") / (plateau_s * len(sales)) / capacity_rps
        computed = max(1, pool("model_good") + pool("model_late"))
        yield (
            f"| {name} | {goodput:.1%} | {pool('model_late') / computed:.2%} | {pool('good') / pool('offered'):.1%} "
            f"| {pool('critical_good')} of {pool('critical')} | {max(e.critical_wait_p99_ms for e in sales):.0f} ms "
            f"| {pool('sheddable_answered') / max(1, pool('sheddable')):.1%} "
            f"| {pool('level_changes') / len(sales):.0f}, {max(each.changes_in_10_s for each in sales)} "
            f"| {max(each.calm_after_s for each in sales):.1f} s "
            f"| {pool('cached_tokens') / max(1, pool('prompt_tokens')):.1%} |"
        )


def measure(
    scenario_name: str, sets: tuple[str, ...], profile: str, rate_rps: float, seeds: list[int], made: cost.Calibration,
    live: bool, only: list[str], say: Callable[[str], None],
) -> tuple[dict[str, list[Held]], float]:
    """Every row on every seed, and the capacity by the twin."""
    resolved = load(scenario_name, sets)
    bench = sale.make_bench(resolved, made)
    capacity_rps = bench.capacity_rps(seeds[0])
    say(f"capacity {capacity_rps:.2f}/s by the twin, response caches off")
    rows: dict[str, list[Held]] = {}
    duration_s = profile_of(resolved.scenario, profile).duration_s
    for name, more in rows_of(resolved.scenario).items():
        if only and name not in only:
            continue
        own = load(scenario_name, (*sets, *more))
        rows[name] = []
        for seed in seeds:
            requests = flash_sale(resolved.scenario, profile, rate_rps, seed)
            folder = runs.create(own, "live" if live else "sim")
            if live:
                view, _ = sale.live_sale(own, (*sets, *more), requests, duration_s, seed, folder, lambda done: None)
            else:
                view = sale.twin_sale(sale.make_bench(own, made), own, requests, duration_s, seed, folder)
            rows[name].append(held(view, resolved.scenario, profile))
            say(f"{name}, seed {seed}: {len(requests):,} requests")
    return rows, capacity_rps


def main() -> int:
    """One table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--scenario", default="flash-sale")
    parser.add_argument("--rate", type=float, required=True, help="base rate in requests per second")
    parser.add_argument("--profile", default="demo")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--calibration", type=Path, default=data_path("calibrations", "smollm2-reference.json"))
    parser.add_argument("--live", action="store_true", help="on a live engine of this machine instead of in the twin")
    parser.add_argument("--only", action="append", default=[], metavar="ROW")
    parser.add_argument("--set", dest="sets", action="append", default=[], metavar="SECTION.KEY=VALUE")
    given = parser.parse_args()

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    try:
        made, sets = cost.load(given.calibration), tuple(given.sets)
        rows, capacity_rps = measure(
            given.scenario, sets, given.profile, given.rate, given.seeds, made, given.live, given.only, say
        )
        plateau_s = profile_of(load(given.scenario, sets).scenario, given.profile).plateau_s
    except DoorbusterError as error:
        print(error, file=sys.stderr)
        return 2
    where = "live" if given.live else "twin"
    print(f"{where}, base {given.rate:g}/s, profile {given.profile}, seeds {' '.join(map(str, given.seeds))}, capacity "
          f"{capacity_rps:.2f}/s {' '.join(given.sets)}\n")
    print("\n".join(table(rows, capacity_rps, plateau_s)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

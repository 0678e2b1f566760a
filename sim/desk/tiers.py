"""What each cache tier adds, one after the other, on the very same sales: ``python -m sim.desk.tiers --rate 10``.

Every row runs the same arrivals (common random numbers), so a row's gain over the one above it is a paired difference,
seed by seed; its interval is Student's over the seeds. With replicas enough nothing is shed and the overload level
stays below that from which similar questions are no longer looked up; then rows differ by the caches alone. With few
replicas the rows also differ by what is shed. So the model's tokens are counted for each request that was answered.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import pandas as pd
from scipy import stats

from engine.errors import DoorbusterError
from engine.events import RequestRecord
from engine.policy.similar import BUSY_LEVEL
from engine.scenario import data_path, load
from engine.units import S_NS, s_to_ns
from sim import sale
from sim.desk.capacity import Bench, caches_off
from sim.desk.frames import level_frame, requests_frame
from sim.desk.labels import labelled
from sim.desk.series import DEFLECTED
from sim.desk.wrong_hits import Part, share, wrong_hits
from sim.twin import cost
from sim.twin.workload import Request, flash_sale, profile_of

NO_FLIGHTS, NO_SIMILAR, IN_FLIGHT = "exact.single_flight=false", "semantic.enabled=false", "semantic.coalesce=true"
ROWS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("exact", (NO_FLIGHTS, NO_SIMILAR)),
    ("+ single-flight", (NO_SIMILAR,)),
    ("+ semantic", ()),
    ("+ similar questions in flight", (IN_FLIGHT,)),
)
NONE = "no cache"
REFERENCE = data_path("calibrations", "smollm2-reference.json")


class Outcome(msgspec.Struct, frozen=True):
    """One row on one seed. Shares are of all offered; tokens are those that the model computed, prompts included, for
    each request that got an answer and not the class's last resort."""

    offered: int
    deflected: float
    tiers: dict[str, float]
    not_answered: float  # rejected, or given the class's last resort
    tokens: float
    peak_tokens: float  # the same, of the requests that arrived on the plateau
    busy_s: float  # at an overload level from which standard classes are not looked up
    wrong: Part


Rows = dict[str, list[Outcome]]
"""By row, in order, an outcome for each seed; the first row is without caches."""


class Mean(msgspec.Struct, frozen=True):
    """Over the seeds, with half the width of the 95 % interval; None with one seed."""

    value: float
    half: float | None


def mean(values: list[float]) -> Mean:
    """Student's interval: right if seeds are independent and the values roughly normal."""
    n = len(values)
    if n < 2:
        return Mean(float(np.mean(values)), None)
    half = stats.t.ppf(0.975, n - 1) * float(np.std(values, ddof=1)) / n**0.5
    return Mean(float(np.mean(values)), float(half))


def outcome(bench: Bench, sets: tuple[str, ...] | None, name: str, requests: list[Request], profile: str) -> Outcome:
    """The requests through the twin of scenario ``name`` with ``sets``; None: without response caches."""
    scenario = bench.scenario if sets is None else load(name, sets).scenario
    run = bench.run(requests, caches_off(scenario) if sets is None else scenario)
    frame = labelled(requests_frame(run.requests), requests)
    shape = profile_of(scenario, profile)
    begin_ns = s_to_ns(shape.base_s + shape.ramp_s)
    end_ns = begin_ns + s_to_ns(shape.plateau_s)
    tiers = Counter(r.tier if r.outcome == "served" else None for r in run.requests)
    levels = level_frame(run.levels, max(run.end_ns, s_to_ns(shape.duration_s)))
    found, offered = wrong_hits(frame), len(run.requests)
    return Outcome(
        offered=offered, deflected=sum(tiers[tier] for tier in DEFLECTED) / offered,
        tiers={tier: tiers[tier] / offered for tier in DEFLECTED},
        not_answered=(tiers[None] + tiers["fallback"]) / offered, tokens=_tokens(run.requests),
        peak_tokens=_tokens([r for r in run.requests if begin_ns <= r.arrived_ns < end_ns]),
        busy_s=_busy_s(levels), wrong=found.served if found else share(0, 0),
    )


def _tokens(records: list[RequestRecord]) -> float:
    computed = sum(r.computed_tokens + r.output_tokens * (r.tier == "model") for r in records)
    return computed / max(1, sum(r.outcome == "served" and r.tier != "fallback" for r in records))


def _busy_s(levels: pd.DataFrame) -> float:
    held = levels["at_ns"].diff().shift(-1).fillna(0)
    return float(held[levels["level"] >= BUSY_LEVEL].sum()) / S_NS


def measure(
    bench: Bench, name: str, sets: tuple[str, ...], profile: str, rate_rps: float, seeds: list[int],
    say: Callable[[str], None],
) -> Rows:
    """Every row on every seed; the row without caches has the tokens to be saved."""
    rows: Rows = {NONE: [], **{row: [] for row, _ in ROWS}}
    for seed in seeds:
        requests = flash_sale(bench.scenario, profile, rate_rps, seed)
        rows[NONE].append(outcome(bench, None, name, requests, profile))
        for row, more in ROWS:
            rows[row].append(outcome(bench, (*sets, *more), name, requests, profile))
        say(f"seed {seed}: {len(requests):,} requests, {len(rows)} rows")
    return rows


def table(rows: Rows) -> Iterator[str]:
    """In Markdown, as it stands in ``sim/README.md``."""
    yield ("| tiers | deflected | gain, points | model's tokens saved | on the plateau | wrong / served, pooled "
           "| not answered | s at level 2+ |")
    yield "|---|---:|---:|---:|---:|---:|---:|---:|"
    bare, before = rows[NONE], None
    for name, outcomes in rows.items():
        saved = [1 - mine.tokens / theirs.tokens for mine, theirs in zip(outcomes, bare, strict=True)]
        peak = [1 - mine.peak_tokens / theirs.peak_tokens for mine, theirs in zip(outcomes, bare, strict=True)]
        gain = [mine.deflected - theirs.deflected for mine, theirs in zip(outcomes, before or outcomes, strict=True)]
        wrong = share(sum(o.wrong.count for o in outcomes), sum(o.wrong.total for o in outcomes))
        cells = (
            name, _percent([o.deflected for o in outcomes]), _percent(gain, "+.2f") if before is not bare and before
            else "", _percent(saved) if outcomes is not bare else "", _percent(peak) if outcomes is not bare else "",
            _wrong(wrong) if outcomes is not bare else "", _percent([o.not_answered for o in outcomes]),
            f"{np.mean([o.busy_s for o in outcomes]):.1f}",
        )
        yield f"| {' | '.join(cells)} |"
        before = outcomes


def _percent(values: list[float], form: str = ".1f") -> str:
    found = mean([100 * value for value in values])
    half = "" if found.half is None else f" ± {found.half:{form.lstrip('+')}}"
    return f"{found.value:{form}}{half}"


def _wrong(part: Part) -> str:
    rate = part.rate
    if rate.value is None or rate.low is None or rate.high is None:
        return "0"
    return f"{100 * rate.value:.2f} [{100 * rate.low:.2f}, {100 * rate.high:.2f}] %"


def main() -> int:
    """One table for one rate."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--scenario", default="flash-sale")
    parser.add_argument("--rate", type=float, required=True, help="base rate in requests per second")
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--profile", default="demo")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--calibration", type=Path, default=REFERENCE, help="what a step costs; the bundled one")
    parser.add_argument("--set", dest="sets", action="append", default=[], metavar="SECTION.KEY=VALUE")
    given = parser.parse_args()

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    sets = (*given.sets, f"replicas={given.replicas}")
    try:
        resolved = load(given.scenario, sets)
        bench = sale.make_bench(resolved, cost.load(given.calibration))
        rows = measure(bench, given.scenario, sets, given.profile, given.rate, given.seeds, say)
    except DoorbusterError as error:
        print(error, file=sys.stderr)
        return 2
    peak_rps = given.rate * resolved.scenario.workload.spike_factor
    offered = [o.offered for o in rows[NONE]]
    print(f"plateau {peak_rps:g}/s, {given.replicas} replicas, profile {given.profile}, seeds "
          f"{' '.join(map(str, given.seeds))}, {min(offered):,} to {max(offered):,} requests {' '.join(given.sets)}\n")
    print("\n".join(table(rows)))
    last = list(rows.values())[-1]
    print("\nlast row, of all offered: " + ", ".join(
        f"{tier} {_percent([o.tiers[tier] for o in last], '.2f')} %" for tier in DEFLECTED
    ))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What notebooks work with: sales in the twin, settings against each other, the live engine beside it, a decision.

A notebook asks and argues; what it calls is here and below. Every sale of a bench offers the same load, whatever the
settings: it is sized once, from the scenario as it stands in the file. ``DOORBUSTER_PROFILE`` (``ci``, ``laptop``,
``full``) says how often sales are repeated and how long the live one lasts, never what is asked.
"""

from __future__ import annotations

import contextvars
import copy
import faulthandler
import itertools
import os
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ParamSpec, TypeVar

import msgspec
import pandas as pd
from matplotlib.figure import Figure

from engine.errors import UserError
from engine.scenario import DATA, Resolved, load
from sim import runs, sale
from sim.bare_sim import sized
from sim.demo import answer_lengths
from sim.desk import overlay, plots
from sim.desk.card import card
from sim.desk.compare import Comparison, Side, compare
from sim.desk.decision import write_decision
from sim.desk.progress import Progress
from sim.desk.report import RunView
from sim.desk.trials import AS_IT_IS, Choice, Trial, choose, tidy
from sim.twin import cost
from sim.twin.replay import journals_of, replay
from sim.twin.workload import flash_sale, profile_of

SALE = "question"  # the bench's own sale among the scenario's profiles
ROOT = DATA.parent / "runs"  # a kernel starts in the notebook's folder: runs go beside the others all the same


class Profile(msgspec.Struct, frozen=True):
    """How much is repeated. ``live``: the scenario's profile that the real engine is put through."""

    seeds: int
    live: str


PROFILES = {"ci": Profile(5, "ci"), "laptop": Profile(8, "demo"), "full": Profile(30, "full")}

P = ParamSpec("P")
T = TypeVar("T")


class Pair(msgspec.Struct, frozen=True):
    """A live sale, the twin on its arrivals, how far they agree, and whether all journals replay identically."""

    live: RunView
    twin: RunView
    comparison: Comparison
    identical: bool
    folder: Path


class Workbench:
    """One question. ``sets`` are ``section.key=value`` texts, as for ``--set``; they hold for all sales of the bench.

    The sale: ``base_s`` seconds of calm, a rise to ``workload.spike_factor`` times as much within ``ramp_s``,
    ``plateau_s``, ``decay_s``. ``budget_s``: a cell that hangs for three times as long shows where. Raises UserError.
    """

    def __init__(
        self, scenario: str | Path = "flash-sale", *sets: str, seed: int | None = None, base_s: float = 20,
        ramp_s: float = 60, plateau_s: float = 40, decay_s: float = 20, budget_s: float | None = None,
        root: Path = ROOT,
    ) -> None:
        self.began_s, self.budget_s = time.monotonic(), budget_s
        if budget_s is not None and sys.__stderr__ is not None:
            faulthandler.dump_traceback_later(3 * budget_s, file=sys.__stderr__)
        self.profile_name = os.environ.get("DOORBUSTER_PROFILE", "laptop")
        if self.profile_name not in PROFILES:
            why = f"there are: {', '.join(PROFILES)}"
            raise UserError(f"no notebook profile {self.profile_name!r}", where="DOORBUSTER_PROFILE", why=why)
        self.profile = PROFILES[self.profile_name]
        shape = {"base_s": base_s, "ramp_s": ramp_s, "plateau_s": plateau_s, "decay_s": decay_s}
        self.sets = (*sets, *(f"workload.profiles.{SALE}.{key}={value}" for key, value in shape.items()))
        self.resolved = load(str(scenario), self.sets)
        self.scenario = self.resolved.scenario
        self.seed = self.scenario.seed if seed is None else seed
        self.remarks: list[str] = []
        self.calibration = cost.for_model(self.scenario, say=self.remarks.append)
        self.base_rps = self.scenario.workload.base_rate_rps or sized(
            str(scenario), self.sets, self.resolved, self.calibration, SALE, self.seed, self.remarks.append
        )
        self.folder = runs.create(self.resolved, "bench", root)
        self._numbers = itertools.count(1)

    @property
    def card(self) -> pd.DataFrame:
        """Where and how: what a reader needs to get the same again."""
        rows = card(self.resolved, self.calibration, self.seed, self.base_rps)
        rows["repeated"] = f"{self.profile.seeds} sales a setting (DOORBUSTER_PROFILE={self.profile_name})"
        rows["folder"] = str(self.folder)
        return pd.DataFrame({"": rows.values()}, index=list(rows))

    # ------------------------------------------------------------ sales

    def sim(self, *changes: str, seed: int | None = None) -> RunView:
        """The sale in the twin, with ``changes``; ``seed``: another sale of the same shape."""
        seed = self.seed if seed is None else seed
        resolved = load(self.resolved.path, (*self.sets, *changes))
        requests = flash_sale(resolved.scenario, SALE, self.base_rps, seed)
        duration_s = profile_of(resolved.scenario, SALE).duration_s
        bench = sale.make_bench(resolved, self.calibration)
        return sale.twin_sale(bench, resolved, requests, duration_s, seed, self._new("sim", resolved))

    def try_each(self, settings: Mapping[str, tuple[str, ...]]) -> list[Trial]:
        """Each setting on the same sales in the twin; ``AS_IT_IS`` comes first, named or not."""
        seeds = range(self.seed, self.seed + self.profile.seeds)
        asked = {AS_IT_IS: (), **settings}
        found: list[Trial] = []
        with Progress("sales", len(asked) * len(seeds), budget_s=self.budget_s) as progress:
            for (name, changes), seed in itertools.product(asked.items(), seeds):
                found.append(Trial(name, changes, seed, self.sim(*changes, seed=seed).summary))
                progress.step()
        return found

    def live(self, *changes: str) -> Pair:
        """The real engine under the scenario's own sale of the profile, at the bench's rate, and the twin beside it."""
        resolved = load(self.resolved.path, (*self.sets, *changes))
        requests = flash_sale(resolved.scenario, self.profile.live, self.base_rps, self.seed)
        duration_s = profile_of(resolved.scenario, self.profile.live).duration_s
        folder = self._new("live", resolved)
        with Progress("live sale", len(requests), "requests") as progress:
            live, _ = _in_thread(
                sale.live_sale, resolved, (*self.sets, *changes), requests, duration_s, self.seed, folder,
                progress.update,
            )
        bench = sale.make_bench(resolved, self.calibration)
        bench.learn_lengths(*answer_lengths(requests, live.frame))
        twin = sale.twin_sale(bench, resolved, requests, duration_s, self.seed, folder / "twin")
        same = all(replay(path).identical for path in journals_of(folder))
        return Pair(live, twin, self.compare(live, twin), same, folder)

    def compare(self, a: RunView, b: RunView) -> Comparison:
        """Two runs of the same arrivals, request by request; ``a`` is the measure."""
        first, second = (Side(v.frame, v.levels, v.summary.utilisation, v.summary.duration_s) for v in (a, b))
        return compare(first, second, self.scenario.classes)

    # ------------------------------------------------------------ figures

    def timeline(self, live: RunView | None = None, twin: RunView | None = None) -> Figure:
        """A sale second by second."""
        a, b = (None if v is None else (v.frame, v.levels) for v in (live, twin))
        frames, levels = (a and a[0], b and b[0]), (a and a[1], b and b[1])
        return plots.timeline(*frames, *levels, self.scenario.classes)

    def latencies(self, live: RunView | None = None, twin: RunView | None = None) -> Figure:
        """How long people waited."""
        return plots.latency_ecdf(live and live.frame, twin and twin.frame, self.scenario)

    def settings(self, trials: list[Trial]) -> Figure:
        """Who was kept within their SLO, by setting and class."""
        return overlay.settings(tidy(trials), self.scenario, choose(trials, self.scenario))

    # ------------------------------------------------------------ the end of it

    def choose(self, trials: list[Trial]) -> Choice:
        """The setting that keeps most requests within their SLO and costs no critical class anything."""
        return choose(trials, self.scenario)

    def decide(self, path: Path, *changes: str, why: str = "") -> Workbench:
        """Write the scenario with ``changes`` to ``path``; returns a bench on that file, for the same load."""
        write_decision(self.resolved, changes, path, why)
        decided = copy.copy(self)
        decided.resolved = load(str(path), self.sets)
        decided.scenario = decided.resolved.scenario
        return decided

    def close(self) -> str:
        """How long it took; disarms the alarm."""
        if self.budget_s is not None:
            faulthandler.cancel_dump_traceback_later()
        budget = "" if self.budget_s is None else f" of {self.budget_s:.0f} s"
        return f"{time.monotonic() - self.began_s:.0f} s{budget}; the runs are in {self.folder}"

    def _new(self, kind: str, resolved: Resolved) -> Path:
        folder = self.folder / f"{next(self._numbers):03d}_{kind}"
        folder.mkdir()
        runs.fill(folder, resolved)
        return folder


def _in_thread(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """In a thread of its own: a kernel's has an event loop already. The context goes along: progress finds its cell."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(contextvars.copy_context().run, lambda: call(*args, **kwargs)).result()

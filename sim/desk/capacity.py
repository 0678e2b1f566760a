"""How much the machine can take, and what the sale must therefore offer.

Capacity: the highest steady rate of the scenario's mix, response caches off, at which at least 99 % of the requests
meet their SLO. The twin finds it by bisection on common random numbers; the demo confirms it on the live engine. The
plateau then offers ``overload_factor`` times that much *after* the caches, so their share is found by the twin too.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
from scipy import stats

from engine.config import Scenario, TenantConfig
from engine.model.blockhash import Hasher
from engine.service.facts import FactMaker
from engine.units import S_NS
from sim.desk.frames import requests_frame
from sim.desk.progress import Progress
from sim.desk.summary import DEFLECTED, good
from sim.twin.cost import Calibration
from sim.twin.system import TwinArrival, TwinRun, TwinSystem
from sim.twin.vectors import semantic_classes, vectors_of
from sim.twin.workload import Request, flash_sale, profile_of, read_corpus, steady, twin_arrivals

WANTED = 0.99
STEADY_S = 90.0
PRECISION = 0.03  # relative width at which the bisection stops
ROUNDS = 4  # of the fixed point between rate and deflection


class Bench:
    """One scenario on the twin, with its tokeniser and costs at hand."""

    def __init__(self, scenario: Scenario, calibration: Calibration, facts: FactMaker, hasher: Hasher) -> None:
        self.scenario, self.calibration, self._facts, self._hasher = scenario, calibration, facts, hasher
        self._lengths: dict[tuple[str, str], int] = {}
        self._known: dict[str, int] = {}
        self._vectors: dict[bytes, np.ndarray] | None = None

    def learn_lengths(self, lengths: dict[tuple[str, str], int], by_request: dict[str, int]) -> None:
        """Answer lengths seen elsewhere: by (class, text), and by request id. Otherwise ``max_tokens`` is assumed."""
        self._lengths, self._known = lengths, by_request

    def arrivals(self, requests: list[Request]) -> list[TwinArrival]:
        """The requests as the twin's gateway learns of them."""

        def length(request: Request, most: int) -> int:
            known = self._known.get(request.request_id)
            return self._lengths.get((request.traffic_class, request.text), most) if known is None else known

        return twin_arrivals(requests, self._facts, length)

    def run(
        self, requests: list[Request], scenario: Scenario | None = None, folder: Path | None = None
    ) -> TwinRun:
        """One twin run; its journals go below ``folder``."""
        chosen, made = scenario or self.scenario, self.calibration
        similar = bool(semantic_classes(chosen))
        return TwinSystem(
            chosen, tenants_of(chosen), made.cost, made.lags, self.arrivals(requests), self._hasher, folder,
            encoder=made.encoder if similar else None, vectors=self.vectors() if similar else None,
        ).run()

    def vectors(self) -> dict[bytes, np.ndarray]:
        """Of the corpus's questions, by text key; computed at the first call if no run before has done so."""
        if self._vectors is None:
            corpus = read_corpus(self.scenario)
            asks = {
                (self.scenario.classes[name].tenant, q.text.strip())
                for name in semantic_classes(self.scenario) for q in corpus.get(name, ())
            }
            texts = sorted({text for _, text in asks})
            with Progress("encoding the questions", len(texts), "texts") as progress:
                found = vectors_of(texts, lambda done, of: progress.update(len(texts) - of + done))
            self._vectors = {self._facts.text_key(tenant, text): found[text] for tenant, text in asks}
        return self._vectors

    # ------------------------------------------------------------ capacity

    def attainment(self, rate_rps: float, seed: int) -> float:
        """Share of requests within their SLO at a steady rate, response caches off."""
        bare = caches_off(self.scenario)
        requests = steady(bare, rate_rps, STEADY_S, seed)
        frame = requests_frame(self.run(requests, bare).requests)
        return float(good(frame, bare.classes).mean()) if len(frame) else 1.0

    def capacity_rps(self, seed: int) -> float:
        """The highest rate that the twin believes in."""
        low, high = 0.0, 1.0
        while self.attainment(high, seed) >= WANTED and high < 1e4:
            low, high = high, 2 * high
        while high - low > PRECISION * high:
            middle = (low + high) / 2
            if self.attainment(middle, seed) >= WANTED:
                low = middle
            else:
                high = middle
        return low

    def base_rate_rps(self, capacity_rps: float, profile: str, seed: int) -> tuple[float, float]:
        """(base rate, share of the plateau that caches answer) so that the plateau is overload_factor x capacity."""
        work = self.scenario.workload
        shape = profile_of(self.scenario, profile)
        begin_ns = round((shape.base_s + shape.ramp_s) * S_NS)
        end_ns = begin_ns + round(shape.plateau_s * S_NS)
        deflected = 0.5
        base = 0.0
        for _ in range(ROUNDS):
            base = work.overload_factor * capacity_rps / (1 - deflected) / work.spike_factor
            run = self.run(flash_sale(self.scenario, profile, base, seed))
            plateau = [r for r in run.requests if begin_ns <= r.arrived_ns < end_ns]
            hits = sum(r.tier in DEFLECTED for r in plateau)
            deflected = min(0.95, hits / max(1, len(plateau)))
        return base, deflected


def wilson(hits: int, n: int) -> tuple[float, float]:
    """95 % interval of a share; it stays sensible at none and at all."""
    found = stats.binomtest(hits, n).proportion_ci(0.95, "wilson")
    return float(found.low), float(found.high)


def caches_off(scenario: Scenario) -> Scenario:
    """The same without response caches."""
    classes = {name: msgspec.structs.replace(cls, caches="none") for name, cls in scenario.classes.items()}
    return msgspec.structs.replace(scenario, classes=classes)


def tenants_of(scenario: Scenario) -> dict[str, TenantConfig]:
    """The workload's tenants, with the scenario's default limits."""
    out: dict[str, list[str]] = {}
    for name, cls in scenario.classes.items():
        out.setdefault(cls.tenant, []).append(name)
    return {tenant: TenantConfig(classes=tuple(names)) for tenant, names in out.items()}

"""Who asks what, and when: a flash sale as a list of requests, the same for the same scenario, profile, rate and seed.

Arrivals are a non-homogeneous Poisson process (thinning, Lewis and Shedler 1979) over base, ramp, plateau and decay.
Each purpose draws from a stream of its own, so that a change to one leaves the others as they were. Questions come from
the corpus, Zipf-distributed inside a class; payments are made up one by one.
"""

from __future__ import annotations

import csv
from collections.abc import Callable

import msgspec
import numpy as np

from engine.config import ProfileConfig, Scenario
from engine.errors import ScenarioError
from engine.model.stepping import SamplingParams
from engine.scenario import data_path
from engine.service.facts import FactMaker
from engine.units import s_to_ns
from sim.twin.payments import payment
from sim.twin.retrieval import contexts
from sim.twin.stall import Question, Stall
from sim.twin.system import TwinArrival

BYTES_PER_TOKEN = 4  # of answer text: what the twin charges the exact cache
STREAMS = ("arrivals", "classes", "questions", "popularity", "payments")


class Request(msgspec.Struct, frozen=True, gc=False):
    """One request, as a client will send it at ``at_ns`` from the start of the sale.

    ``label`` says which answer it should get: two requests may share one only if their labels are equal.
    """

    request_id: str
    at_ns: int
    tenant: str
    traffic_class: str
    intent: str
    text: str
    label: str = ""
    trap: bool = False
    context: str = ""  # system message with what was retrieved; "" = none: the class's own system prompt stands

    def messages(self) -> list[dict[str, str]]:
        """The conversation as it is sent."""
        asked = {"role": "user", "content": self.text}
        return [{"role": "system", "content": self.context}, asked] if self.context else [asked]


def sale_rate(profile: ProfileConfig, base_rps: float, factor: float) -> Callable[[float], float]:
    """Requests per second at each moment of the sale."""
    ramp, plateau = profile.base_s, profile.base_s + profile.ramp_s
    decay, end = plateau + profile.plateau_s, profile.duration_s

    def rate(at_s: float) -> float:
        above = (factor - 1) * base_rps
        if at_s < ramp:
            return base_rps
        if at_s < plateau:
            return base_rps + above * (at_s - ramp) / profile.ramp_s
        if at_s < decay:
            return base_rps + above
        return base_rps + above * max(0.0, (end - at_s) / profile.decay_s)

    return rate


def build(
    scenario: Scenario, seed: int, duration_s: float, rate: Callable[[float], float], peak_rps: float, prefix: str = "r"
) -> list[Request]:
    """All requests of ``duration_s`` seconds; ``peak_rps`` bounds ``rate``."""
    streams = {name: np.random.default_rng([seed, index]) for index, name in enumerate(STREAMS)}
    corpus = read_corpus(scenario)
    products = [row["product"] for row in _rows("products.csv")]
    names = list(scenario.classes)
    shares = np.array([scenario.classes[name].share for name in names])
    found = contexts(scenario)
    stalls = {n: Stall(corpus[n], scenario.workload, streams["popularity"]) for n in names if n in corpus}
    out: list[Request] = []
    at_s = 0.0
    while True:
        at_s += streams["arrivals"].exponential(1 / peak_rps)
        if at_s >= duration_s:
            return out
        if streams["arrivals"].random() * peak_rps > rate(at_s):
            continue
        name = names[int(streams["classes"].choice(len(names), p=shares))]
        draws = streams["questions"].random(3)
        number = len(out)
        request_id, tenant = f"{prefix}{number:06d}", scenario.classes[name].tenant
        if name in stalls:
            q = stalls[name].pick(*draws.tolist())
            context = found.get((name, q.intent), "")
            ask = Request(request_id, s_to_ns(at_s), tenant, name, q.intent, q.text, q.answer_id, q.trap, context)
        else:
            text = payment(streams["payments"], products, number)
            ask = Request(request_id, s_to_ns(at_s), tenant, name, "payment", text, request_id)
        out.append(ask)


def flash_sale(scenario: Scenario, profile_name: str, base_rps: float, seed: int) -> list[Request]:
    """The sale of a profile."""
    profile = profile_of(scenario, profile_name)
    factor = scenario.workload.spike_factor
    return build(scenario, seed, profile.duration_s, sale_rate(profile, base_rps, factor), base_rps * max(1.0, factor))


def steady(scenario: Scenario, rate_rps: float, duration_s: float, seed: int) -> list[Request]:
    """The same mix at one rate: for capacity."""
    return build(scenario, seed, duration_s, lambda _: rate_rps, rate_rps, prefix="c")


def profile_of(scenario: Scenario, name: str) -> ProfileConfig:
    """A profile by name; ScenarioError names the known ones."""
    found = scenario.workload.profiles.get(name)
    if found is None:
        known = ", ".join(scenario.workload.profiles) or "none"
        raise ScenarioError(f"scenario {scenario.name} has no profile {name!r}", fix=f"--profile one of: {known}")
    return found


def twin_arrivals(
    requests: list[Request], facts: FactMaker, output_tokens: Callable[[Request, int], int]
) -> list[TwinArrival]:
    """The workload as the twin's gateway will learn of it; ``output_tokens(request, max_tokens)`` says how long."""
    out: list[TwinArrival] = []
    for rid, request in enumerate(requests):
        ask, _ = facts.arrive(
            rid, request.request_id, request.tenant, request.traffic_class, request.messages(), SamplingParams(), None,
            request.at_ns,
        )
        length = min(output_tokens(request, ask.max_tokens), ask.max_tokens)
        answer_id = (ask.exact_key or request.request_id.encode()).hex()  # greedy: equal questions, equal answers
        out.append(TwinArrival(ask, length, answer_id, BYTES_PER_TOKEN * length))
    return out


def read_corpus(scenario: Scenario) -> dict[str, list[Question]]:
    """Questions and traps by traffic class."""
    out: dict[str, list[Question]] = {}
    for name, trap in ((scenario.workload.corpus, False), (scenario.workload.traps, True)):
        for row in _rows(name) if name else ():
            question = Question(row["traffic_class"], row["intent"], row["answer_id"], row["text"], trap)
            out.setdefault(question.traffic_class, []).append(question)
    return out


def _rows(name: str) -> list[dict[str, str]]:
    path = data_path("corpora", name)
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    except OSError as error:
        raise ScenarioError("the corpus cannot be read", where=str(path), why=str(error)) from None

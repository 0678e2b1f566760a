"""``doorbuster calibrate``: steps timed in a process of their own, fitted, judged on whole traces, written to a file.

The lags beside the steps are measured too: a fake model that takes no time behind the real ingress, so that what is
left between the client's instant and the gateway's is connection, parsing and tokenising, and the way back. So is the
encoder, in its own process; without its package a calibration has none, unless the scenario asks for it.
"""

from __future__ import annotations

import asyncio
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import msgspec

from engine.config import Scenario
from engine.errors import CalibrationError, UserError
from engine.events import Answer, Arrive, Submit
from engine.ledger.journal import open_journal
from engine.model.blockhash import Hasher
from engine.model.stepping import SamplingParams
from engine.service.auth import KeyRing
from engine.service.facts import FactMaker
from engine.service.replicas import share_cores
from engine.service.server import ServeOptions, running, tokenizer_for
from engine.units import MS_NS, s_to_ns
from sim.loadgen import play
from sim.twin.cost import FAKE, FAKE_PACE, Calibration, EncoderFit, fit, fit_encoder, kernels_of, this_machine
from sim.twin.driver import Lags
from sim.twin.encoder import EncoderCost
from sim.twin.measure import Measured, MeasureSpec, TracePart
from sim.twin.measure_encoder import measure_encoder
from sim.twin.vectors import semantic_classes
from sim.twin.workload import Request, read_corpus, steady

DESIGN_S = 18.0
TRACES = {"light": (2.0, 4.0), "heavy": (7.0, 3.0)}  # name -> (requests per second, seconds); held out whole
TIMEOUT_S = 300.0


def calibrate(scenario: Scenario, progress: Callable[[str], None], design_s: float = DESIGN_S) -> Calibration:
    """Measure this machine. Just under a minute with the default design."""
    if scenario.model.name == FAKE:
        raise CalibrationError(
            "there is nothing to measure: the fake model takes the time that it is told",
            why=f"its pace is {FAKE_PACE}'s, measured here or bundled, times model.fake_speed",
            fix=f"doorbuster calibrate --set model.name={FAKE_PACE}",
        )
    own_cores, replica_cores, threads = share_cores(scenario.model.threads, scenario.replicas)
    spec = MeasureSpec(
        scenario, threads, replica_cores, secrets.token_bytes(16), traces=_traces(scenario), design_s=design_s
    )
    measured = _measure(spec)
    progress(f"calibrate: {len(measured.samples)} steps measured; now the way in and out")
    lags = asyncio.run(measure_lags(scenario, measured.turn_ns))
    progress("calibrate: now the encoder")
    encoder, encoder_fit = _encoder(scenario, own_cores, progress)
    cost, quality, hull = fit(measured.samples)
    return Calibration(
        model=scenario.model.name, model_digest=measured.model_digest,
        machine=this_machine(
            threads, measured.torch, measured.device, measured.dtype, kernels_of(scenario.model)
        ),
        measured_at=time.strftime("%Y-%m-%dT%H:%M:%S"), cost=cost, lags=lags, fit=quality, hull=hull,
        encoder=encoder, encoder_fit=encoder_fit,
    )


def describe(calibration: Calibration) -> list[str]:
    """What a person should know of it: counts, ranges, errors."""
    fitted, hull, machine = calibration.fit, calibration.hull, calibration.machine
    ranges = ", ".join(f"{name.replace('_', ' ')} {low:,}-{high:,}" for name, (low, high) in hull.items())
    return [
        f"machine   {machine.cpu}, {machine.cores} cores, {machine.threads} torch thread(s), torch {machine.torch}, "
        f"{machine.dtype} on {machine.device}",
        f"fitted    {fitted.steps} designed steps ({fitted.stalls} stalls left out), error {fitted.design_mape:.1%}, "
        f"noise floor {fitted.noise_floor:.1%}",
        f"held out  {len(TRACES)} whole traces, {fitted.trace_steps} steps: error {fitted.trace_mape:.1%} mean, "
        f"{fitted.trace_p95:.1%} p95, bias {fitted.trace_bias:+.1%}, total time {fitted.trace_total:+.1%}",
        f"range     {ranges}",
        f"encoder   {encoder_words(calibration)}",
    ]


def encoder_words(calibration: Calibration) -> str:
    """Its batch curve, and how far to trust it."""
    cost, fitted = calibration.encoder, calibration.encoder_fit
    if cost is None:
        return "not measured"
    curve = f"{cost.fixed_ns / MS_NS:.1f} ms + {cost.text_ns / MS_NS:.2f} ms a text, wire {cost.wire_ns / MS_NS:.2f} ms"
    if fitted is None:
        return curve
    elsewhere = "" if fitted.cpu == calibration.machine.cpu else f"; measured on {fitted.cpu}"
    return (f"{curve}; {fitted.batches} batches of 1-{cost.max_batch} ({fitted.stalls} stalls left out), error "
            f"{fitted.mape:.1%} (texts differ in length), noise floor {fitted.noise_floor:.1%}{elsewhere}")


def busy_words(calibration: Calibration) -> list[str]:
    """Said after a measurement that is not to be trusted; nothing after a good one."""
    doubts = calibration.doubts()
    if not doubts:
        return []
    return [f"WARNING: the machine was busy while it was measured: {'; '.join(doubts)}",
            "         latencies of the twin will be off; end what else runs, then: doorbuster calibrate"]


def _measure(spec: MeasureSpec) -> Measured:
    child = subprocess.run(
        [sys.executable, "-m", "sim.twin.measure"], input=msgspec.msgpack.encode(spec), stdout=subprocess.PIPE,
        timeout=TIMEOUT_S, check=False,
    )
    if child.returncode:
        raise CalibrationError("measuring failed", why=f"exit code {child.returncode}; its last words are above")
    return msgspec.json.decode(child.stdout, type=Measured)


def _encoder(
    scenario: Scenario, cores: tuple[int, ...], progress: Callable[[str], None]
) -> tuple[EncoderCost, EncoderFit] | tuple[None, None]:
    """On the corpus's texts. The gateway's cores, as live."""
    texts = [question.text for questions in read_corpus(scenario).values() for question in questions]
    try:
        return fit_encoder(measure_encoder(texts, cores))
    except UserError as error:
        if semantic_classes(scenario):
            raise
        progress(f"calibrate: no encoder ({error.what}), and no class of the scenario needs one")
        return None, None


def _traces(scenario: Scenario) -> dict[str, list[TracePart]]:
    """Short steady loads of the scenario's own mix."""
    hasher = Hasher(b"calibration", scenario.prefix.block_tokens)
    facts = FactMaker(tokenizer_for(scenario.model.name), hasher, scenario, scenario.model.name)
    out: dict[str, list[TracePart]] = {}
    for number, (name, (rate_rps, seconds)) in enumerate(TRACES.items()):
        parts: list[TracePart] = []
        for sid, request in enumerate(steady(scenario, rate_rps, seconds, seed=100 + number)):
            cls = scenario.classes[request.traffic_class]
            ask, prompt = facts.arrive(
                sid, request.request_id, request.tenant, request.traffic_class, request.messages(), SamplingParams(),
                None, 0,
            )
            submit = Submit(
                sid, sid, ask.tenant, ask.traffic_class, cls.priority, request.at_ns, s_to_ns(3600), ask.prompt_tokens,
                ask.max_tokens, ask.blocks, ask.pinned_blocks,
            )
            parts.append(TracePart(request.at_ns, submit, prompt))
        out[name] = parts
    return out


async def measure_lags(scenario: Scenario, turn_ns: int, count: int = 60) -> Lags:
    """Sixty answers from the exact cache through the real ingress: when the gateway knew, when the client had it."""
    replaced = msgspec.structs.replace
    model = replaced(scenario.model, name="fake", fake_speed=float("inf"))
    name, cls = next((n, c) for n, c in scenario.classes.items() if c.caches != "none")
    scenario = replaced(scenario, model=model, classes={**scenario.classes, name: replaced(cls, caches="exact")})
    scenario = replaced(scenario, semantic=replaced(scenario.semantic, enabled=False))  # the encoder is measured apart
    keys, key = KeyRing.single(cls.tenant)
    text = "is the coupon still good"
    requests = [Request(f"lag{i:03d}", i * 40 * MS_NS, cls.tenant, name, "lag", text) for i in range(count)]
    with tempfile.TemporaryDirectory() as folder:
        options = ServeOptions(folder=Path(folder), pin_cores=False)
        async with running(scenario, keys, options) as engine:
            seen = await play(engine.url, {cls.tenant: key}, requests)
            epoch_ns = engine.epoch_ns
        came: dict[str, int] = {}
        answered: dict[str, int] = {}
        names: dict[int, str] = {}
        for entry in open_journal(Path(folder) / "journal" / "gateway-0.ndjson").entries():
            if isinstance(entry.event, Arrive):
                names[entry.event.rid] = entry.event.request_id
                came[entry.event.request_id] = entry.at_ns + epoch_ns
            for action in entry.actions:
                if isinstance(action, Answer):
                    answered[names[action.rid]] = entry.at_ns + epoch_ns
    good = [s for s in seen if s.status == 200 and s.e2e_ns is not None][5:]
    if not good:
        raise CalibrationError("the ingress gave no answer while its lags were measured", fix="doorbuster doctor")
    admit_ns = median(came[s.request_id] - s.scheduled_ns for s in good)
    emit_ns = median(s.scheduled_ns + (s.e2e_ns or 0) - answered[s.request_id] for s in good)
    return Lags(admit_ns=round(admit_ns), turn_ns=turn_ns, emit_ns=round(emit_ns))

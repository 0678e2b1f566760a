"""From measured steps to a cost model, and the file that carries it: refused where it was not measured for this use.

Fit: non-negative least squares on relative error (weights 1 / t), so no coefficient is ever a negative time and short
steps count as much as long ones. Quality is told on whole traces that the fit has not seen, beside the noise floor of
repeated steps. Provisional: designed steps only, no residual distribution, no coefficient draws yet.
"""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import msgspec
import numpy as np
from scipy.optimize import nnls

from engine.config import ModelConfig, Scenario
from engine.errors import CalibrationError
from engine.events import StepShape
from engine.model import compiling
from engine.model.folder import cache_dir, prepare
from engine.scenario import data_path
from engine.service.replicas import share_cores
from engine.stepcost import StepCost
from sim.twin.driver import Lags
from sim.twin.encoder import EncoderCost
from sim.twin.measure_encoder import BatchSample, EncoderMeasured
from sim.twin.vectors import semantic_classes

VERSION = 1
STALL = 1.6  # a step this much longer than predicted was held up by something else: counted, not fitted
STALL_SHARE = 0.05  # of the designed steps: more than that and something else was running
TRACE_ERROR = 0.10  # mean, on held-out traces: beyond it the twin's latencies are not worth reading closely
FAKE, FAKE_PACE = "fake", "smollm2"  # the fake model has no pace of its own: it takes this one's
FEATURES = ("prefill_tokens", "prefill_rows", "decode_rows", "decode_kv_tokens", "attention_area")


class StepSample(msgspec.Struct, frozen=True, gc=False):
    """One measured step. ``trace``: "" for a designed step, else the held-out trace it belongs to."""

    shape: StepShape
    ns: int
    trace: str = ""


class Machine(msgspec.Struct, frozen=True):
    """Where steps were measured; equal machines may share a calibration."""

    cpu: str
    cores: int
    threads: int
    torch: str
    device: str
    dtype: str
    kernels: str = ""  # mark of our own; "" = torch's alone


class Fit(msgspec.Struct, frozen=True):
    """How good it is. Errors are relative; ``traces`` were held out whole."""

    steps: int
    stalls: int
    design_mape: float
    trace_steps: int
    trace_mape: float
    trace_p95: float
    trace_bias: float
    trace_total: float  # predicted over measured time of all held-out steps, minus one: what throughput depends on
    noise_floor: float  # median spread of equal steps


class EncoderFit(msgspec.Struct, frozen=True):
    """How good the encoder's batch curve is, and what it was measured on. Errors are relative."""

    batches: int
    stalls: int
    mape: float
    noise_floor: float  # median spread of the same batch twice
    digest: str
    cpu: str

    @property
    def measured(self) -> int:
        """All batches, those that stalled too."""
        return self.batches + self.stalls


class Calibration(msgspec.Struct, frozen=True):
    """One file of ``calibrations/``. Those of before the encoder was measured have none."""

    model: str
    model_digest: str
    machine: Machine
    measured_at: str
    cost: StepCost
    lags: Lags
    fit: Fit
    hull: dict[str, tuple[int, int]]  # least and greatest value of each feature among the fitted steps
    version: int = VERSION
    encoder: EncoderCost | None = None
    encoder_fit: EncoderFit | None = None

    def outside(self, shape: StepShape) -> bool:
        """Does a step lie outside of what was measured?"""
        return any(not low <= getattr(shape, name) <= high for name, (low, high) in self.hull.items())

    def doubts(self) -> list[str]:
        """What speaks against using it, in words; none if all is well."""
        designed = self.fit.steps + self.fit.stalls
        found = []
        if self.fit.stalls > STALL_SHARE * designed:
            found.append(f"{self.fit.stalls} of {designed} designed steps stalled (more than {STALL_SHARE:.0%})")
        if self.fit.trace_mape > TRACE_ERROR:
            found.append(f"error on held-out traces {self.fit.trace_mape:.1%} (more than {TRACE_ERROR:.0%})")
        if self.encoder_fit and self.encoder_fit.stalls > STALL_SHARE * self.encoder_fit.measured:
            found.append(f"{self.encoder_fit.stalls} of {self.encoder_fit.measured} batches of the encoder stalled")
        return found


def fit(samples: list[StepSample]) -> tuple[StepCost, Fit, dict[str, tuple[int, int]]]:
    """Coefficients from the designed steps, quality from the traces."""
    design = [s for s in samples if not s.trace]
    cost = _nnls(design)
    kept = [s for s in design if s.ns <= STALL * cost.ns(s.shape)]
    cost = _nnls(kept)
    errors = _relative(cost, kept)
    held_out = [s for s in samples if s.trace]
    trace_errors = _relative(cost, held_out) if held_out else np.zeros(1)
    total = sum(cost.ns(s.shape) for s in held_out) / max(1, sum(s.ns for s in held_out)) - 1 if held_out else 0.0
    quality = Fit(
        steps=len(kept), stalls=len(design) - len(kept), design_mape=float(np.mean(np.abs(errors))),
        trace_steps=len(held_out), trace_mape=float(np.mean(np.abs(trace_errors))),
        trace_p95=float(np.quantile(np.abs(trace_errors), 0.95)), trace_bias=float(np.mean(trace_errors)),
        trace_total=total, noise_floor=_noise(design),
    )
    hull = {name: _range([getattr(s.shape, name) for s in kept]) for name in FEATURES}
    return cost, quality, hull


def _nnls(samples: list[StepSample]) -> StepCost:
    rows = np.array([[1, *(getattr(s.shape, name) for name in FEATURES)] for s in samples], dtype=float)
    times = np.array([s.ns for s in samples], dtype=float)
    scale = rows.max(axis=0)
    scale[scale == 0] = 1
    found, _ = nnls(rows / times[:, None] / scale, np.ones(len(times)))
    fixed, token, row, decode, kv, area = (float(c) for c in found / scale)
    return StepCost(
        fixed_ns=fixed, prefill_token_ns=token, prefill_row_ns=row, decode_row_ns=decode, decode_kv_ns=kv, area_ns=area
    )


def _relative(cost: StepCost, samples: list[StepSample]) -> np.ndarray:
    return np.array([cost.ns(s.shape) / s.ns - 1 for s in samples])


def _noise(samples: list[StepSample]) -> float:
    """Half the relative difference between equal pure-decode steps that followed one another (their KV hardly grew)."""
    pairs = [
        abs(a.ns - b.ns) / (a.ns + b.ns)
        for a, b in pairwise(samples)
        if a.shape.decode_rows == b.shape.decode_rows and not (a.shape.prefill_tokens or b.shape.prefill_tokens)
    ]
    return float(np.median(pairs)) if pairs else float("nan")


def _range(values: list[int]) -> tuple[int, int]:
    return min(values), max(values)


def fit_encoder(measured: EncoderMeasured) -> tuple[EncoderCost, EncoderFit]:
    """``fixed_ns + n * text_ns`` by the same rule as steps: least squares on relative error, never a negative time."""
    samples = measured.batches
    fixed, text = _batch_curve(samples)
    kept = [s for s in samples if s.ns <= STALL * (fixed + s.texts * text)]
    fixed, text = _batch_curve(kept)
    errors = [(fixed + s.texts * text) / s.ns - 1 for s in kept]
    twice = [abs(a.ns - b.ns) / (a.ns + b.ns) for a, b in pairwise(samples) if a.number == b.number]
    cost = EncoderCost(
        fixed_ns=round(fixed), text_ns=round(text), max_batch=measured.max_batch,
        wire_ns=max(0, round(float(np.median(measured.wire_ns)))) if measured.wire_ns else 0,
    )
    return cost, EncoderFit(
        batches=len(kept), stalls=len(samples) - len(kept), mape=float(np.mean(np.abs(errors))),
        noise_floor=float(np.median(twice)) if twice else float("nan"), digest=measured.digest, cpu=_cpu(),
    )


def _batch_curve(samples: list[BatchSample]) -> tuple[float, float]:
    times = np.array([s.ns for s in samples], dtype=float)
    rows = np.array([[1, s.texts] for s in samples], dtype=float)
    (fixed, text), _ = nnls(rows / times[:, None], np.ones(len(times)))
    return float(fixed), float(text)


# ---------------------------------------------------------------- the file


def this_machine(threads: int, torch: str, device: str, dtype: str, kernels: str = "") -> Machine:
    """The machine under our feet."""
    return Machine(_cpu(), os.cpu_count() or 1, threads, torch, device, dtype, kernels)


def kernels_of(model: ModelConfig) -> str:
    """Mark of the kernels that a replica with this model would run on, "" where it would do without."""
    if not model.native or device_of(model.device) != "cpu":
        return ""
    try:
        return compiling.mark()
    except (OSError, subprocess.SubprocessError):
        return ""


def default_path(model: str) -> Path:
    """Where ``calibrate`` writes and the others look."""
    return cache_dir() / "calibrations" / f"{model.replace('/', '_')}.json"


def save(calibration: Calibration, path: Path) -> None:
    """Written beside its place and renamed: never half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".part")
    beside.write_bytes(msgspec.json.format(msgspec.json.encode(calibration), indent=1))
    beside.replace(path)


def load(path: Path) -> Calibration:
    """Read any calibration; CalibrationError says what is wrong with the file."""
    if not path.is_file():
        why = "the twin's clock runs on what a step costs here"
        raise CalibrationError("not measured on this machine yet", str(path), why, "doorbuster calibrate    (a minute)")
    try:
        found = msgspec.json.decode(path.read_bytes(), type=Calibration)
    except msgspec.DecodeError as error:
        raise CalibrationError(f"not a calibration: {error}", where=str(path), fix="doorbuster calibrate") from None
    if found.version != VERSION:
        what = f"version {found.version}, this doorbuster reads {VERSION}"
        raise CalibrationError(what, str(path), fix="doorbuster calibrate")
    return found


def load_for(
    path: Path, threads: int, model: str, foreign_ok: bool = False, digest: str = "", device: str = "",
    dtype: str = "", kernels: str | None = None,
) -> Calibration:
    """A calibration for use on this machine, with so many torch threads; refused when it is somebody else's.

    ``digest``, ``device``, ``dtype`` and ``kernels`` are compared where the caller knows them.
    """
    found = load(path)
    if foreign_ok:
        return found
    for what, theirs, ours in (
        ("model", found.model, model),
        ("set of weights", found.model_digest, digest or found.model_digest),
        ("CPU", found.machine.cpu, _cpu()),
        ("number of cores", found.machine.cores, os.cpu_count() or 1),
        ("number of torch threads", found.machine.threads, threads),
        ("device", found.machine.device.partition(":")[0], device or found.machine.device.partition(":")[0]),
        ("dtype", found.machine.dtype, dtype or found.machine.dtype),
        ("set of kernels", found.machine.kernels, found.machine.kernels if kernels is None else kernels),
    ):
        if theirs != ours:
            raise CalibrationError(
                f"measured with another {what}: {theirs or 'none'}; here it is {ours or 'none'}", where=str(path),
                fix="doorbuster calibrate    (a minute), or --accept-foreign-calibration",
            )
    return found


def for_model(
    scenario: Scenario, path: Path | None = None, foreign_ok: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Calibration:
    """The costs of a scenario's model here, from ``path`` or where ``calibrate`` leaves them.

    The fake model runs at SmolLM2's pace as ``serve`` lets it: this machine's if it was measured, else the bundled
    reference's; times ``fake_speed``.
    """
    model = scenario.model
    name = FAKE_PACE if model.name == FAKE else model.name
    _, _, threads = share_cores(model.threads, scenario.replicas)
    try:
        given = path or default_path(name)
        if foreign_ok or not given.is_file():
            found = load_for(given, threads, name, foreign_ok)
        else:
            device = device_of(model.device)
            digest = "" if model.name == FAKE else prepare(name, lambda line: None).digest
            dtype = DTYPES.get(device, "") if model.dtype == "auto" else model.dtype
            found = load_for(given, threads, name, False, digest, device, dtype, kernels_of(model))
    except CalibrationError as error:
        if model.name != FAKE or path is not None:
            raise
        found = load(data_path("calibrations", f"{FAKE_PACE}-reference.json"))
        say(f"the fake model runs at the bundled pace of {found.machine.cpu}: here, {FAKE_PACE} is {error.what}")
        return _faster(found, model)
    for doubt in found.doubts():
        say(f"warning: the calibration is doubtful: {doubt}; `doorbuster calibrate` on a quiet machine")
    return _faster(found, model)


def require_encoder(scenario: Scenario, found: Calibration) -> None:
    """CalibrationError when classes are answered by similar questions and nobody knows what encoding costs."""
    names = semantic_classes(scenario)
    if names and found.encoder is None:
        raise CalibrationError(
            "the calibration has no encoder, so the twin cannot tell when a similar question is found",
            where=f"{found.model}, measured {found.measured_at}", why=f"semantic: {', '.join(names)}",
            fix=f"doorbuster calibrate --set model.name={found.model}    (a minute); "
            "or do without: --set semantic.enabled=false (and for `sim` a --rate)",
        )


def _faster(found: Calibration, model: ModelConfig) -> Calibration:
    if model.name != FAKE or model.fake_speed == 1:
        return found
    terms = {name: getattr(found.cost, name) / model.fake_speed for name in found.cost.__struct_fields__}
    return msgspec.structs.replace(found, cost=StepCost(**terms))


DTYPES = {"cpu": "float32", "cuda": "bfloat16"}  # what the loader takes by itself


def device_of(asked: str) -> str:
    """What ``auto`` will come to; torch, which takes two seconds, is asked only where there may be a GPU."""
    if asked != "auto":
        return asked
    if platform.system() == "Linux" and not Path("/dev/nvidiactl").exists():
        return "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()

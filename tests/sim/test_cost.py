"""Fitting the cost model and the encoder's batch curve, and refusing a calibration that was not made for this use.

Run: python -m pytest tests/sim/test_cost.py -q
Mutations it caught: weights 1 instead of 1 / t; stalls kept in the fit; feature columns swapped; the thread count left
out of the comparison; the encoder's wire as a mean; its stalls kept; no fixed cost; a batch of fewer texts; a
calibration without an encoder taken for a semantic class.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import numpy as np
import pytest

from engine.config import ModelConfig, Scenario
from engine.errors import CalibrationError
from engine.events import StepShape
from engine.model.encoder_folder import digest_of, find_folder
from engine.scenario import data_path
from engine.scenario import load as load_scenario
from engine.service.replicas import share_cores
from engine.stepcost import StepCost
from sim.twin.calibrate import busy_words, describe
from sim.twin.cost import (
    Calibration,
    StepSample,
    default_path,
    fit,
    fit_encoder,
    for_model,
    kernels_of,
    load,
    load_for,
    require_encoder,
    save,
    this_machine,
)
from sim.twin.driver import Lags
from sim.twin.measure_encoder import BatchSample, EncoderMeasured, measure_encoder
from sim.twin.workload import read_corpus

TRUE = StepCost(
    fixed_ns=30e6, prefill_token_ns=1.8e6, prefill_row_ns=0.4e6, decode_row_ns=2.5e6, decode_kv_ns=9e3, area_ns=150.0
)


def samples(noise: float, stalls: int = 0, count: int = 200) -> list[StepSample]:
    rng = np.random.default_rng(1)
    out = []
    for number in range(count):
        rows, chunks = int(rng.integers(0, 17)), int(rng.integers(0, 4))
        sizes = rng.integers(4, 40, chunks)
        shape = StepShape(
            int(sizes.sum()), chunks, rows, int(rng.integers(150, 350)) * rows,
            int(sum(c * (2 * int(rng.integers(0, 220)) + c) for c in sizes)),
        )
        slow = 4.0 if number < stalls else 1.0
        ns = TRUE.ns(shape) * slow * float(np.exp(rng.normal(0, noise)))
        out.append(StepSample(shape, round(ns), trace="held out" if number % 5 == 4 else ""))
    return out


def of(**model: object) -> Scenario:
    """A scenario that only says which model."""
    return Scenario(name="costs", model=ModelConfig(**model))  # type: ignore[arg-type]


def test_known_coefficients_come_back() -> None:
    cost, quality, _ = fit(samples(noise=0.0))
    for name in TRUE.__struct_fields__:
        assert getattr(cost, name) == pytest.approx(getattr(TRUE, name), rel=0.01)
    assert quality.trace_mape < 1e-3


def test_noise_is_told_and_never_gives_a_negative_time() -> None:
    cost, quality, hull = fit(samples(noise=0.05))
    assert all(getattr(cost, name) >= 0 for name in TRUE.__struct_fields__)
    assert 0.02 < quality.trace_mape < 0.06  # the mean of |N(0, 0.05)| is 0.04
    assert abs(quality.trace_total) < 0.03
    assert quality.trace_steps == 40
    assert hull["decode_rows"] == (0, 16)


def test_stalls_are_counted_and_left_out() -> None:
    cost, quality, _ = fit(samples(noise=0.01, stalls=8))
    assert quality.stalls == 7  # of the first eight, one is held out
    assert cost.prefill_token_ns == pytest.approx(TRUE.prefill_token_ns, rel=0.03)


# ---------------------------------------------------------------- the encoder


def batches(fixed_ms: float, text_ms: float, noise: float, stalls: int = 0) -> EncoderMeasured:
    """Each batch size ten times, each batch twice, as ``measure_encoder`` takes them."""
    rng = np.random.default_rng(2)
    out = []
    for number in range(80):
        size = 1 + number % 8
        for _ in range(2):
            slow = 3.0 if len(out) < stalls else 1.0
            ns = (fixed_ms + size * text_ms) * 1e6 * slow * float(np.exp(rng.normal(0, noise)))
            out.append(BatchSample(size, round(ns), number))
    return EncoderMeasured(out, [200_000, 300_000, 9_000_000], "e1", 8)


def test_the_encoders_curve_comes_back() -> None:
    cost, quality = fit_encoder(batches(3.5, 5.2, noise=0.0))
    assert (cost.fixed_ns, cost.text_ns) == (pytest.approx(3.5e6, rel=1e-4), pytest.approx(5.2e6, rel=1e-4))
    assert (cost.wire_ns, cost.max_batch) == (300_000, 8), "the median: one slow wire does not count"
    assert (quality.batches, quality.stalls, quality.digest) == (160, 0, "e1")
    assert quality.mape < 1e-6 and quality.noise_floor < 1e-6


def test_the_encoders_noise_is_told_and_stalls_are_left_out() -> None:
    cost, quality = fit_encoder(batches(3.5, 5.2, noise=0.05, stalls=6))
    assert cost.text_ns == pytest.approx(5.2e6, rel=0.03)
    assert cost.fixed_ns == pytest.approx(3.5e6, rel=0.15)
    assert (quality.stalls, quality.batches) == (6, 154)
    assert 0.03 < quality.mape < 0.05  # the mean of |N(0, 0.05)| is 0.04
    assert 0.017 < quality.noise_floor < 0.031  # the median of half the difference of two: 0.024


def test_an_encoder_is_never_faster_than_light() -> None:
    cost, _ = fit_encoder(EncoderMeasured([BatchSample(1, 5_000_000, 0), BatchSample(8, 50_000_000, 1)], [-7], "e", 8))
    assert cost.fixed_ns == 0 and cost.text_ns > 0 and cost.wire_ns == 0


def test_the_real_encoder_is_measured_through_the_real_client() -> None:
    texts = [q.text for questions in read_corpus(load_scenario("flash-sale").scenario).values() for q in questions]
    found = measure_encoder(texts, share_cores(0)[0], rounds=1)
    assert found.digest == digest_of(find_folder())
    sizes = {size: [b.ns for b in found.batches if b.texts == size] for size in range(1, found.max_batch + 1)}
    assert all(len(taken) <= 2 for taken in sizes.values()) and len(found.batches) >= 12
    cost, quality = fit_encoder(found)
    assert cost.text_ns > 0 and quality.batches >= 10
    assert min(sizes[8] or [0]) > 2 * min(sizes[1] or [0]), "a batch of eight is eight texts, not what was left of them"


def test_files_of_before_the_encoder_was_measured_still_load_and_say_so(tmp_path: Path) -> None:
    raw = msgspec.to_builtins(calibration())
    for name in ("encoder", "encoder_fit"):
        del raw[name]
    (tmp_path / "old.json").write_bytes(msgspec.json.encode(raw))
    old = load(tmp_path / "old.json")
    assert old.encoder is None and describe(old)[-1] == "encoder   not measured"
    scenario = load_scenario("flash-sale").scenario
    with pytest.raises(CalibrationError, match="the calibration has no encoder") as caught:
        require_encoder(scenario, old)
    assert "doorbuster calibrate" in caught.value.fix and "checkout_help" in caught.value.why
    assert "smollm2" in caught.value.where
    require_encoder(load_scenario("flash-sale", ("semantic.enabled=false",)).scenario, old)


def test_the_bundled_calibration_has_an_encoder_and_says_where_it_was_measured() -> None:
    found = load(data_path("calibrations", "smollm2-reference.json"))
    require_encoder(load_scenario("flash-sale").scenario, found)
    assert "error" in describe(found)[-1] and "noise floor" in describe(found)[-1]
    assert "measured on AMD EPYC" in describe(found)[-1]


def calibration(**changes: object) -> Calibration:
    cost, quality, hull = fit(samples(noise=0.02))
    machine = this_machine(1, "2.13.0", "cpu", "float32")
    found = Calibration("smollm2", "d1", machine, "2026-01-01", cost, Lags(admit_ns=5), quality, hull)
    return msgspec.structs.replace(found, **changes)


def test_file_round_trip_and_hull(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "c.json"
    made = calibration()
    save(made, path)
    assert load_for(path, 1, "smollm2") == made
    assert [p.name for p in path.parent.iterdir()] == ["c.json"]
    assert not made.outside(StepShape(20, 1, 4, 1000, 900))
    assert made.outside(StepShape(20, 1, 400, 1000, 900))


@pytest.mark.parametrize(
    ("threads", "model", "changes", "what"),
    [
        (2, "smollm2", {}, "torch threads: 1; here it is 2"),
        (1, "tiny", {}, "another model: smollm2; here it is tiny"),
        (1, "smollm2", {"cpu": "Z80"}, "another CPU: Z80"),
        (1, "smollm2", {"cores": (os.cpu_count() or 1) + 1}, "number of cores"),
    ],
)
def test_foreign_calibrations_are_refused(
    tmp_path: Path, threads: int, model: str, changes: dict[str, object], what: str
) -> None:
    made = calibration()
    save(msgspec.structs.replace(made, machine=msgspec.structs.replace(made.machine, **changes)), tmp_path / "c.json")
    with pytest.raises(CalibrationError, match=what) as caught:
        load_for(tmp_path / "c.json", threads, model)
    assert "doorbuster calibrate" in caught.value.fix
    assert load_for(tmp_path / "c.json", threads, model, foreign_ok=True).model == "smollm2"


def test_missing_damaged_and_old_files_are_explained(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="not measured on this machine yet"):
        load(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{]")
    with pytest.raises(CalibrationError, match="not a calibration"):
        load(tmp_path / "bad.json")
    save(calibration(version=99), tmp_path / "new.json")
    with pytest.raises(CalibrationError, match="version 99"):
        load(tmp_path / "new.json")


@pytest.mark.parametrize(
    ("asked", "what"),
    [
        ({"digest": "d2"}, "another set of weights: d1; here it is d2"),
        ({"device": "cuda"}, "another device: cpu; here it is cuda"),
        ({"dtype": "bfloat16"}, "another dtype: float32; here it is bfloat16"),
        ({"kernels": "abc"}, "another set of kernels: none; here it is abc"),
    ],
)
def test_other_weights_and_devices_are_refused_where_they_are_known(
    tmp_path: Path, asked: dict[str, str], what: str
) -> None:
    save(calibration(), tmp_path / "c.json")
    with pytest.raises(CalibrationError, match=what):
        load_for(tmp_path / "c.json", 1, "smollm2", **asked)
    assert load_for(tmp_path / "c.json", 1, "smollm2", digest="d1", device="cpu", dtype="float32").model == "smollm2"
    assert load_for(tmp_path / "c.json", 1, "smollm2", True, **asked).model == "smollm2"


def test_a_cuda_calibration_names_its_card_and_still_fits(tmp_path: Path) -> None:
    made = calibration()
    save(msgspec.structs.replace(made, machine=msgspec.structs.replace(made.machine, device="cuda:0")), tmp_path / "c")
    assert load_for(tmp_path / "c", 1, "smollm2", device="cuda").machine.device == "cuda:0"
    with pytest.raises(CalibrationError, match="another device: cuda; here it is cpu"):
        load_for(tmp_path / "c", 1, "smollm2", device="cpu")


def test_a_busy_machine_is_told() -> None:
    good = calibration()
    assert good.doubts() == [] and busy_words(good) == []
    replaced = msgspec.structs.replace
    stalled = replaced(good, fit=replaced(good.fit, steps=94, stalls=6))
    wrong = replaced(good, fit=replaced(good.fit, trace_mape=0.101))
    assert "6 of 100 designed steps stalled" in stalled.doubts()[0]
    assert "held-out traces 10.1%" in wrong.doubts()[0]
    assert "the machine was busy" in busy_words(stalled)[0]
    _, encoder = fit_encoder(batches(3.5, 5.2, noise=0.01, stalls=9))
    assert "9 of 160 batches of the encoder stalled" in replaced(good, encoder_fit=encoder).doubts()[0]
    assert replaced(good, encoder_fit=replaced(encoder, batches=152, stalls=8)).doubts() == []
    assert replaced(good, fit=replaced(good.fit, steps=95, stalls=5, trace_mape=0.1)).doubts() == []


def test_the_fake_model_has_the_pace_that_serve_gives_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOORBUSTER_CACHE", str(tmp_path))
    told: list[str] = []
    reference = load(data_path("calibrations", "smollm2-reference.json"))
    assert for_model(of(name="fake"), say=told.append) == reference
    assert "bundled" in told[0]
    _, _, threads = share_cores(0)
    ours = kernels_of(of().model)
    made = calibration(machine=this_machine(threads, "2.13.0", "cpu", "float32", ours))
    save(made, default_path("smollm2"))
    assert for_model(of(name="fake", device="cpu")) == made
    if ours:  # there is a compiler: without the kernels the pace is another
        told.clear()
        assert for_model(of(name="fake", device="cpu", native=False), say=told.append) == reference
        assert "another set of kernels" in told[0]
    twice = for_model(of(name="fake", device="cpu", fake_speed=2.0))
    assert twice.cost.fixed_ns == made.cost.fixed_ns / 2
    with pytest.raises(CalibrationError, match="not measured on this machine yet"):
        for_model(of(name="tiny"))

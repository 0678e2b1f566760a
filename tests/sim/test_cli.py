"""The command line as a person meets it: real processes, exit codes, words instead of tracebacks.

Run: python -m pytest tests/sim/test_cli.py -q
Mutations it caught: a DoorbusterError that escapes; results on stderr; exit 0 for a journal that differs; a run folder
that is used twice.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from engine.scenario import data_path

REFERENCE = str(data_path("calibrations", "smollm2-reference.json"))


def doorbuster(*args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The command, as installed."""
    return subprocess.run(
        [sys.executable, "-m", "sim.cli", *args], cwd=cwd, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One twin run of the fake model's sale."""
    cwd = tmp_path_factory.mktemp("desk")
    done = doorbuster(
        "sim", "flash-sale", "--profile", "ci", "--rate", "6", "--set", "model.name=fake", "--calibration", REFERENCE,
        "--accept-foreign-calibration", "--json", cwd=cwd,
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["offered"] == sum(c["offered"] for c in summary["classes"].values()) > 50
    (folder,) = (cwd / "runs").iterdir()
    return folder


def test_sim_leaves_a_whole_run_folder(run_folder: Path) -> None:
    found = {str(p.relative_to(run_folder)) for p in run_folder.rglob("*") if p.is_file()}
    assert found == {
        "scenario.toml", "resolved.json", "requests.parquet", "summary.json", "report.html", "ledger/records.ndjson",
        "journal/gateway-0.ndjson", "journal/replica-0.ndjson",
    }
    resolved = json.loads((run_folder / "resolved.json").read_text())
    assert resolved["model.name"] == {"value": "fake", "origin": "--set"}
    assert resolved["exact.ttl_s"]["origin"] == "file"
    assert resolved["ingress.max_body_bytes"]["origin"] == "default"


def test_replay_says_identical_or_exits_3(run_folder: Path) -> None:
    done = doorbuster("replay", str(run_folder), cwd=run_folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("identical") == 2
    done = doorbuster(
        "replay", str(run_folder / "journal" / "gateway-0.ndjson"), "--set", "exact.ttl_s=0.5", "--json", cwd=run_folder
    )
    assert done.returncode == 3
    found = json.loads(done.stdout)
    assert found["identical"] is False
    assert found["first_difference"]["record"] > 0


def test_report_can_be_written_again(run_folder: Path) -> None:
    (run_folder / "report.html").unlink()
    done = doorbuster("report", str(run_folder), cwd=run_folder)
    assert done.returncode == 0, done.stderr
    assert (run_folder / "report.html").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["sim", "flash-sail"], 1, ["no scenario 'flash-sail'", "did you mean flash-sale?"]),
        (["sim", "flash-sale", "--set", "exact.tll_s=3"], 1, ["exact.tll_s is not a known key", "did you mean ttl_s?"]),
        (["sim", "flash-sale", "--calibration", "no.json"], 1, ["not measured on this machine", "calibrate"]),
        (["sim", "flash-sale", "--profile", "weekend"], 1, ["no profile 'weekend'", "demo, full, ci"]),
        (["replay", "nowhere"], 1, ["no journal here", "give a run folder"]),
        (["report", "nowhere"], 1, ["no such run folder"]),
        (["load", "flash-sale", "--key", "x", "--rate", "5", "--profile", "ci", "--url", "http://127.0.0.1:9"], 1,
         ["nothing answered", "doorbuster serve"]),
        (["load", "flash-sale"], 1, ["no API key"]),
        (["serve", "flash-sale", "--host", "0.0.0.0"], 1, ["throw-away key", "doorbuster keys new"]),
        (["simm"], 2, ["No such command"]),
    ],
)
def test_mistakes_are_told_in_words(tmp_path: Path, args: list[str], code: int, words: list[str]) -> None:
    done = doorbuster(*args, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    said = " ".join(done.stderr.split())
    for word in words:
        assert word in said


def test_show_config_names_origins(tmp_path: Path) -> None:
    done = doorbuster("sim", "flash-sale", "--show-config", "--set", "batcher.slots=9", cwd=tmp_path)
    assert done.returncode == 0
    assert "batcher.slots = 9    # --set" in done.stdout
    assert "exact.ttl_s = 60.0    # file" in done.stdout
    assert not (tmp_path / "runs").exists()


def test_a_new_key_is_shown_once_and_only_its_digest_is_kept(tmp_path: Path) -> None:
    done = doorbuster("keys", "new", "shop", "--class", "product_qa", cwd=tmp_path)
    assert done.returncode == 0
    assert done.stdout.startswith("[tenants.shop]\nkey_sha256 = ")
    assert "db-" in done.stderr
    assert "db-" not in done.stdout


def test_doctor_tells_what_it_found(tmp_path: Path) -> None:
    done = doorbuster("doctor", "--json", cwd=tmp_path)
    checks = {check["name"]: check for check in json.loads(done.stdout)}
    assert checks["scenario"]["ok"] is True
    assert "torch 2.13.0" in checks["packages"]["found"]
    assert done.returncode == (1 if any(c["ok"] is False for c in checks.values()) else 0)

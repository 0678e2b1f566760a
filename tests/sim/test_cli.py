"""The command line as a person meets it: real processes, exit codes, words instead of tracebacks.

Run: python -m pytest tests/sim/test_cli.py -q
Mutations it caught: a load that is sized by what --set changes; a report that goes before the next is whole; a
DoorbusterError that escapes; results on stderr; exit 0 for a journal that differs; a run folder
that is used twice.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from engine.scenario import data_path

REFERENCE = str(data_path("calibrations", "smollm2-reference.json"))


def doorbuster(*args: str, cwd: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """The command, as installed; ``more`` goes to its environment."""
    return subprocess.run(
        [sys.executable, "-m", "sim.cli", *args], cwd=cwd, capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, **more},
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
        "scenario.toml", "resolved.json", "requests.parquet", "summary.json", "card.json", "report.html",
        "ledger/records.ndjson", "journal/gateway-0.ndjson", "journal/replica-0.ndjson",
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


def test_a_demos_report_is_written_again_with_its_card_and_tables(run_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    shutil.copytree(run_folder, folder)
    shutil.copytree(run_folder, folder / "twin")
    (folder / "card.json").write_text('{"capacity": "2.98/s, NOT confirmed live"}')
    done = doorbuster("report", str(folder), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    page = (folder / "report.html").read_text()
    for words in ("2.98/s, NOT confirmed live", "Not served by the model or a cache", "Replay of the journals",
                  "twin/journal/replica-0.ndjson", "yes"):
        assert words in page
    assert not list(folder.glob("*.part"))


def test_a_report_that_cannot_be_written_again_stays(run_folder: Path, tmp_path: Path) -> None:
    for name, words in (("summary.json", "not a summary"), ("card.json", "not a card")):
        folder = tmp_path / name
        shutil.copytree(run_folder, folder)
        before = (folder / "report.html").read_bytes()
        (folder / name).write_text("{")
        done = doorbuster("report", str(folder), cwd=tmp_path)
        assert done.returncode == 1
        assert words in done.stderr and "Traceback" not in done.stderr
        assert (folder / "report.html").read_bytes() == before


def test_help_fits_a_narrow_terminal(tmp_path: Path) -> None:
    done = doorbuster("--help", cwd=tmp_path, COLUMNS="80")
    verbs = done.stdout.partition("Commands:\n")[2].splitlines()
    assert {line.split()[0] for line in verbs} >= {"doctor", "serve", "load", "sim", "calibrate", "compare", "demo"}
    assert all(len(line) <= 80 and line.startswith("  ") and line[2] != " " for line in verbs), "one line a verb"
    assert not [line for line in verbs if line.endswith(("...", "…"))]


def test_setup_runs_again_when_its_script_changes(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    (tmp_path / ".installed").touch()
    make = ["make", "-n", "-C", str(root), f"VENV={tmp_path}", "setup"]
    for touched, again in (((), False), (("-W", ".ci/setup"), True), (("-W", "pyproject.toml"), True)):
        done = subprocess.run([*make, *touched], capture_output=True, text=True, check=True)
        assert ("sh .ci/setup" in done.stdout) == again


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
        (["sim", "flash-sale", "--rate", "-5"], 2, ["-5 is no rate"]),
        (["sim", "flash-sale", "--rate", "nan"], 2, ["nan is no rate"]),
        (["sim", "flash-sale", "--rate", "inf"], 2, ["inf is no rate"]),
        (["sim", "flash-sale", "--rate", "0"], 2, ["0 is no rate"]),
        (["sim", "flash-sale", "--seed", "-1"], 2, ["--seed", "greater than or equal to 0"]),
        (["sim", "flash-sale", "--set", "seed=-1"], 1, ["seed: -1 is below 0"]),
        (["load", "flash-sale", "--key", "x", "--rate", "-3"], 2, ["-3 is no rate"]),
        (["load", "flash-sale", "--seed", "-3"], 2, ["--seed", "greater than or equal to 0"]),
        (["load", "flash-sale", "--profile", "nope"], 1, ["no profile 'nope'"]),
        (["demo", "flash-sale", "--seed", "-1"], 2, ["--seed", "greater than or equal to 0"]),
        (["calibrate", "--set", "model.name=fake"], 1, ["there is nothing to measure", "model.name=smollm2"]),
        (["sim", "flash-sale", "--set", "model.name=fake", "--set", "model.fake_speed=inf"], 1, ["has no capacity"]),
        (["keys", "new", "shop", "--class", "product_qs"], 1, ["no traffic class", "did you mean product_qa?"]),
        (["keys", "new", "shop", "--class", "q", "--scenario", "flash-sail"], 1, ["did you mean flash-sale?"]),
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


def test_a_wrong_profile_is_told_before_anything_is_measured(tmp_path: Path) -> None:
    done = doorbuster("demo", "--profile", "nope", "--recalibrate", cwd=tmp_path, DOORBUSTER_CACHE=str(tmp_path / "c"))
    assert done.returncode == 1
    assert "no profile 'nope'" in done.stderr
    assert "calibrat" not in done.stderr and "cache" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_changed_threshold_is_the_same_sale(tmp_path: Path) -> None:
    """Half a sale from the caches, or none of it: the load stays."""
    bundled = data_path("scenarios", "flash-sale.toml").read_text()
    (tmp_path / "exact.toml").write_text(bundled.replace('"semantic"', '"exact"'))  # no question to encode
    args = ("sim", "exact.toml", "--profile", "ci", "--set", "model.name=fake", "--set", "model.fake_speed=4", "--json")
    cache = {"DOORBUSTER_CACHE": str(tmp_path / "empty")}
    plain = doorbuster(*args, cwd=tmp_path, **cache)
    bare = doorbuster(*args, "--set", "exact.enabled=false", cwd=tmp_path, **cache)
    more = doorbuster(*args, "--set", "workload.overload_factor=4", cwd=tmp_path, **cache)
    assert [done.returncode for done in (plain, bare, more)] == [0, 0, 0], plain.stderr + bare.stderr + more.stderr
    offered = [json.loads(done.stdout)["offered"] for done in (plain, bare, more)]
    assert offered[0] == offered[1] < offered[2]
    assert json.loads(plain.stdout)["tiers"] != json.loads(bare.stdout)["tiers"]
    assert "the same sale as without --set exact.enabled=false" in bare.stderr
    assert "the same sale" not in plain.stderr + more.stderr
    for done in (plain, bare, more):
        assert "twin steps lie outside of the calibrated range" in done.stderr
        assert "bundled pace" in done.stderr


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
    assert "admin" not in done.stdout


def test_an_admins_key_says_so_in_its_stanza(tmp_path: Path) -> None:
    done = doorbuster("keys", "new", "office", "--admin", cwd=tmp_path)
    assert done.returncode == 0
    assert done.stdout.endswith("\nadmin = true\n")


def test_doctor_tells_what_it_found(tmp_path: Path) -> None:
    done = doorbuster("doctor", "--json", cwd=tmp_path)
    checks = {check["name"]: check for check in json.loads(done.stdout)}
    assert checks["scenario"]["ok"] is True
    assert "torch 2.13.0" in checks["packages"]["found"]
    assert done.returncode == (1 if any(c["ok"] is False for c in checks.values()) else 0)

"""Equivalence 1: a journal through fresh machines; a changed threshold; damage.

Run: python -m pytest tests/sim/test_replay.py -q
Mutations it caught: a --set laid over the replicas of a folder; the twin's journals left out;
a gateway that keeps state in a class; a breaker verdict that depends on set order; comparing only
the number of actions; a torn line that is decoded.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from engine.errors import JournalError, ScenarioError
from engine.model.blockhash import Hasher
from sim.twin.driver import Lags
from sim.twin.replay import journals_of, replay, replay_all
from sim.twin.system import TwinSystem
from tests.equivalence.test_virtual_time import COST, TENANTS, scenario, workload


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sale with shortage everywhere, as the twin journals it."""
    folder = tmp_path_factory.mktemp("run")
    hasher = Hasher(b"key", 16)
    arrivals = [arrival for *_, arrival in workload(hasher, 5)]
    TwinSystem(scenario(), TENANTS, COST, Lags(admit_ns=1000, pipe_ns=500), arrivals, hasher, folder).run()
    return folder


def test_fresh_machines_do_the_same(run_folder: Path) -> None:
    found = [replay(path) for path in journals_of(run_folder)]
    assert [r.identical for r in found] == [True, True]
    assert all(r.events > 500 for r in found)


def test_another_process_with_another_hash_seed_does_the_same(run_folder: Path) -> None:
    code = "import sys; from pathlib import Path; from sim.twin.replay import replay;"
    code += "sys.exit(not all(replay(Path(p)).identical for p in sys.argv[1:]))"
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", code, *map(str, journals_of(run_folder))], check=False,
            env={"PYTHONHASHSEED": seed, "PATH": "/usr/bin:/bin"}, capture_output=True,
        )
        assert done.returncode == 0, done.stderr.decode()


def test_a_changed_threshold_names_the_first_record_that_differs(run_folder: Path) -> None:
    path = run_folder / "journal" / "gateway-0.ndjson"
    found = replay(path, ("overload.brownout_share=0.1",))
    assert not found.identical
    first = found.first_difference
    assert first is not None
    lines = path.read_text().splitlines()
    entry = msgspec.json.decode(lines[1 + first.record])
    assert entry[0] == first.record, "the record's number is its serial in the journal"
    assert entry[3] == msgspec.to_builtins(first.journal)
    assert first.fresh != first.journal


def test_a_slot_less_changes_the_replica(run_folder: Path) -> None:
    found = replay(run_folder / "journal" / "replica-0.ndjson", ("batcher.slots=5",))
    assert not found.identical


def test_a_torn_tail_is_cut_and_told(run_folder: Path, tmp_path: Path) -> None:
    whole = (run_folder / "journal" / "gateway-0.ndjson").read_bytes()
    torn = tmp_path / "torn.ndjson"
    torn.write_bytes(whole[:-40])
    found = replay(torn)
    last = len(whole[:-40]) - (whole[:-40].rfind(b"\n") + 1)
    assert found.identical
    assert found.torn_bytes == last
    assert found.events == whole.count(b"\n") - 2


def test_damage_in_the_middle_is_an_error(run_folder: Path, tmp_path: Path) -> None:
    whole = (run_folder / "journal" / "gateway-0.ndjson").read_bytes().splitlines(keepends=True)
    bad = tmp_path / "bad.ndjson"
    bad.write_bytes(b"".join([*whole[:50], b'[49,1,{"type":"Nonsense"},[]]\n', *whole[50:]]))
    with pytest.raises(JournalError, match="line 51 is damaged"):
        replay(bad)


def test_mistakes_are_explained(run_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="no such journal"):
        replay(tmp_path / "none.ndjson")
    other = tmp_path / "other.ndjson"
    other.write_text("hello\n")
    with pytest.raises(JournalError, match="no journal header"):
        replay(other)
    with pytest.raises(ScenarioError, match="cannot set that"):
        replay(run_folder / "journal" / "gateway-0.ndjson", ("overload.brownout=1",))
    with pytest.raises(JournalError, match="no journal here"):
        journals_of(tmp_path)


@pytest.fixture(scope="module")
def demo_folder(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same journals as live ones and, below them, as the twin's."""
    folder = tmp_path_factory.mktemp("demo")
    for base in (folder, folder / "twin"):
        shutil.copytree(run_folder / "journal", base / "journal")
    return folder


@pytest.mark.parametrize(
    ("sets", "differ"),
    [
        ((), set()),
        (("overload.brownout_share=0.1",), {"gateway-0.ndjson"}),
        (("batcher.slots=5",), {"replica-0.ndjson"}),
        (("batcher.slots=5", "overload.brownout_share=0.1"), {"gateway-0.ndjson", "replica-0.ndjson"}),
    ],
)
def test_in_a_folder_each_setting_goes_where_it_belongs(
    demo_folder: Path, sets: tuple[str, ...], differ: set[str]
) -> None:
    found = replay_all(demo_folder, sets)
    names = [str(Path(r.journal).relative_to(demo_folder)) for r in found]
    assert names == [f"{where}{kind}-0.ndjson" for where in ("journal/", "twin/journal/") for kind in
                     ("gateway", "replica")]
    assert {r.journal for r in found if not r.identical} == {r.journal for r in found if Path(r.journal).name in differ}


@pytest.mark.parametrize(
    ("item", "words"),
    [("workload.spike_factor=2", "no journal here was made with a section 'workload'"),
     ("overload.brownout=1", "cannot set that in this gateway journal"), ("overload", "sets nothing")],
)
def test_what_no_machine_reads_is_said(demo_folder: Path, item: str, words: str) -> None:
    with pytest.raises(ScenarioError, match=words):
        replay_all(demo_folder, (item,))

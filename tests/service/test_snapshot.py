"""A server that stops and comes back: what it still knows, how old it says it is, and what it must not say any more.

Real servers, one after the other, with the fake model and the real encoder; files are damaged by hand.

Run: python -m pytest tests/service/test_snapshot.py -q
Mutations it caught: the time between two lives not counted; a clock that went back; digest, model, tags of a class or
encoder not compared; the file left, or a write under way not thrown away, after a word; a key of its own; readable by
all; written in place; vectors not put back; the place not tried; never written at times.
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from engine.cache_config import SemanticConfig, SnapshotConfig
from engine.config import ModelConfig
from engine.errors import UserError
from engine.events import Entry, Remember
from engine.model import whole_file
from engine.model.index import VectorIndex
from engine.service.similar import PackedVectors
from engine.service.snapshot import FIRST_LINE, Origin, Snapshot, read, to_bytes
from engine.service.stream import StoredAnswer
from sim.twin.replay import replay
from tests.service import harness
from tests.service.harness import CHAT, Engine, body, journal, start

CLASSES = {
    **harness.SCENARIO.classes,
    "chat": msgspec.structs.replace(harness.SCENARIO.classes["chat"], caches="semantic"),
}
SEMANTIC = SemanticConfig(cosine=0.8, deadline_ms=5000, quarantine=0)
FIRST, NEAR = "is the slate grey kettle still in stock?", "is the slate grey kettle in stock still?"


@contextlib.contextmanager
def life(tmp_path: Path, number: int, encoder: bool = False, **changes: Any) -> Iterator[Engine]:
    """One of several, with one snapshot. The encoder takes seconds to start: only where it is asked for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(harness.TENANTS, "office", 'classes = ["chat"]\nadmin = true\n')
        folder = tmp_path / f"life-{number}"
        folder.mkdir()
        if encoder:
            changes = {"classes": CLASSES, "semantic": SEMANTIC, **changes}
        changes = {"snapshot": SnapshotConfig(path=str(tmp_path / "deep" / "snapshot")), **changes}
        with start(folder, **changes) as engine:
            yield engine
    assert replay(folder / "journal" / "gateway-0.ndjson").identical


def ask(engine: Engine, text: str = FIRST, **headers: str) -> Any:
    with engine.http(**headers) as client:
        got = client.post(CHAT, json=body(text))
    assert got.status_code == 200, got.text
    return got


def tiers(engine: Engine, *texts: str) -> list[str]:
    return [ask(engine, text).headers["x-doorbuster-tier"] for text in texts]


def flush(engine: Engine, **what: Any) -> None:
    with engine.http("office") as client:
        assert client.post("/admin/cache", json=what).status_code == 200


@pytest.mark.parametrize("identity", ["text", "meaning"])
def test_the_next_life_knows_the_same_question_and_similar_ones(tmp_path: Path, identity: str) -> None:
    semantic = msgspec.structs.replace(SEMANTIC, identity=identity, same_answer_cosine=0.8)
    with life(tmp_path, 1, True, semantic=semantic) as engine:
        first = ask(engine)
        assert first.headers["x-doorbuster-tier"] == "model"
        asked_s = time.time()
        driver = engine.inside.driver
        engine.until(lambda: len(driver.packed("").questions.to_bytes()) and driver.kept().what.similar)
        if identity == "meaning":
            engine.until(lambda: driver.machine.answers.kept().similar[0].group)
    path = tmp_path / "deep" / "snapshot"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and [p.name for p in path.parent.iterdir()] == ["snapshot"]
    with life(tmp_path, 2, True, semantic=semantic) as engine:
        assert engine.inside.warm_answers == 1
        again, near = ask(engine), ask(engine, NEAR)
        away_s = time.time() - asked_s
        if identity == "meaning":
            assert engine.call(lambda: engine.inside.driver.machine.answers.kept()).similar[0].group
    assert [got.headers["x-doorbuster-tier"] for got in (again, near)] == ["exact", "semantic"]
    assert first.json()["choices"] == again.json()["choices"] == near.json()["choices"], "the very answer"
    for got in (again, near):
        assert got.headers["x-doorbuster-source"] == first.headers["x-request-id"]
        assert away_s - 5 < float(got.headers["x-doorbuster-age-s"]) < away_s + 1, "the time between two lives counts"
    (event,) = [entry.event for entry in journal(tmp_path / "life-2") if isinstance(entry.event, Remember)]
    assert all(entry.stored_ns < 0 for entry in event.exact) and len(event.similar) == 1


@pytest.mark.parametrize("later_s", [301, -301])
def test_what_is_too_old_does_not_come_back_nor_what_has_no_known_age(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, later_s: int
) -> None:
    with life(tmp_path, 1) as engine:
        assert tiers(engine, FIRST) == ["model"]
    wall_ns = time.time_ns
    monkeypatch.setattr("engine.service.keeper.time.time_ns", lambda: wall_ns() + later_s * 10**9)
    with life(tmp_path, 2) as engine:
        assert engine.inside.warm_answers == 0 and engine.stats().exact.entries == 0
        assert not engine.call(lambda: list(engine.inside.driver._answers)), "nor does its text"
        assert tiers(engine, FIRST, FIRST) == ["model", "exact"]
    assert ("by the clock" in caplog.text) == (later_s < 0), "wall time has gone back"


def test_what_was_called_off_does_not_come_back(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "snapshot"
    with life(tmp_path, 1) as engine:
        flush(engine, tag="catalogue", version=4)
        assert tiers(engine, FIRST) == ["model"]
    with life(tmp_path, 2) as engine:
        assert path.exists()
        flush(engine, tag="catalogue", version=4)  # known: it comes once more
        assert tiers(engine, FIRST) == ["exact"]
        assert not path.exists(), "what is on disk is never older than the last word"
    with life(tmp_path, 3) as engine:
        assert tiers(engine, FIRST) == ["exact"]
        flush(engine, tag="catalogue", version=5)
        assert tiers(engine, "and the red one?") == ["model"]
    with life(tmp_path, 4) as engine:
        flush(engine, tag="catalogue", version=5)
        assert tiers(engine, "and the red one?", FIRST) == ["exact", "model"]


def test_it_is_written_at_times_and_a_word_makes_a_write_under_way_worthless(tmp_path: Path) -> None:
    path = tmp_path / "now"
    with life(tmp_path, 1, snapshot=SnapshotConfig(path=str(path), every_s=0.01)) as engine:
        assert tiers(engine, FIRST) == ["model"]
        engine.until(path.exists)
        before = path.stat().st_mtime_ns
        engine.until(lambda: path.exists() and path.stat().st_mtime_ns > before)
        flush(engine, all=True)
        engine.until(path.exists)
        copied = path.read_bytes()
    path.write_bytes(copied)  # as if it had been killed then
    with life(tmp_path, 2, snapshot=SnapshotConfig(path=str(path))) as engine:
        assert engine.inside.warm_answers == 0


def test_a_word_during_a_write_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with life(tmp_path, 1) as engine:
        assert tiers(engine, FIRST) == ["model"]
        write, driver = whole_file.write_beside, engine.inside.driver
        path = tmp_path / "deep" / "snapshot"

        def and_then(*args: Any) -> Path:
            beside = write(*args)
            engine.call(driver._called_off)  # on the gateway's own thread, while this one has just written
            return beside

        monkeypatch.setattr(whole_file, "write_beside", and_then)
        # the end's own save runs with it
    assert list(path.parent.iterdir()) == []


def test_a_file_that_cannot_be_used_is_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "deep" / "snapshot"
    with life(tmp_path, 1) as engine:
        assert tiers(engine, FIRST) == ["model"]
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) // 2])
    with life(tmp_path, 2) as engine:
        assert engine.inside.warm_answers == 0
        assert tiers(engine, FIRST) == ["model"]
    (said,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert str(path) in said and "damaged" in said and "start empty" in said and "fix:" in said
    with life(tmp_path, 3) as engine:
        assert tiers(engine, FIRST) == ["exact"], "the next one took its place"


@pytest.mark.parametrize(
    ("damage", "word"),
    [("cut", "damaged"), ("bit", "damaged"), ("none", ""), ("empty", "no snapshot"), ("text", "no snapshot"),
     ("version", "another version"), ("fields", "another version"), ("folder", "Is a directory")],
)
def test_a_damaged_file_is_refused_in_words(tmp_path: Path, damage: str, word: str) -> None:
    path, none = tmp_path / "snapshot", VectorIndex(4)
    assert read(path) is None
    entry = Entry(b"k", "a", 4, 7, "r", 1, "t", ("x",))
    origin = Origin(b"key", "m", "d", {"qa": ("x",)}, "e", 4, "float32")
    whole = Snapshot(origin, 5, 6, Remember((entry,)), [("a", StoredAnswer("text"))])
    raw = b"".join(to_bytes(whole, PackedVectors(none.pack("e"), none.pack("e"))))
    middle, body = len(raw) // 2, b"\x90"  # an empty list
    damaged = {
        "cut": raw[:middle], "bit": raw[:middle] + bytes([raw[middle] ^ 1]) + raw[middle + 1 :], "none": raw,
        "empty": b"", "text": b"no snapshot here", "version": raw.replace(FIRST_LINE, b"doorbuster snapshot 0\n"),
        "fields": FIRST_LINE + blake2b(body, digest_size=32).digest() + body,
    }
    path.mkdir() if damage == "folder" else path.write_bytes(damaged[damage])
    if damage == "none":
        again = read(path)
        assert again and again.what == whole.what and again.texts == whole.texts and again.origin == whole.origin
        return
    with pytest.raises(UserError, match=word) as caught:
        read(path)
    assert caught.value.where == str(path) and caught.value.fix


def test_another_models_answers_stay_where_they_are(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with life(tmp_path, 1) as engine:
        assert tiers(engine, FIRST) == ["model"]
    tiny = ModelConfig(name="tiny", context_tokens=512)
    with life(tmp_path, 2, model=tiny) as engine:
        assert engine.inside.warm_answers == 0
    (said,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert "of model fake" in said and "not tiny" in said


def test_other_tags_of_a_class_make_its_answers_foreign(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A word on the new tag would never reach the old answers."""
    with life(tmp_path, 1) as engine:
        assert tiers(engine, FIRST) == ["model"]
    more = msgspec.structs.replace(harness.SCENARIO.classes["chat"], depends_on=("catalogue", "stock"))
    with life(tmp_path, 2, classes={**harness.SCENARIO.classes, "chat": more}) as engine:
        assert engine.inside.warm_answers == 0
    assert "class chat depended on catalogue when it was saved" in caplog.text


@pytest.mark.parametrize("change", [{"enabled": False}, {"vectors": "int8"}])
def test_without_its_vectors_the_exact_answers_come_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, change: dict[str, Any]
) -> None:
    with life(tmp_path, 1, True) as engine:
        assert tiers(engine, FIRST) == ["model"]
        engine.until(lambda: engine.inside.driver.kept().what.similar)
    with life(tmp_path, 2, True, semantic=msgspec.structs.replace(SEMANTIC, **change)) as engine:
        assert engine.inside.warm_answers == 1 and engine.stats().semantic.entries == 0
        assert tiers(engine, FIRST) == ["exact"]
    assert ("similar questions are left out (1)" in caplog.text) == ("vectors" in change), "it was asked to do without"


def test_a_place_where_nothing_can_be_written_is_said_before_anything_starts(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    folder = tmp_path / "folder"
    folder.mkdir()
    for number, path in enumerate((file / "below", folder)):
        with (
            pytest.raises(UserError, match="no snapshot can be written") as caught,
            life(tmp_path, number, snapshot=SnapshotConfig(path=str(path))),
        ):
            raise AssertionError("it must not start")
        assert caught.value.where == str(path) and caught.value.why and "snapshot.path" in caught.value.fix


def test_serve_says_how_it_started(tmp_path: Path) -> None:
    sets = ("model.name=fake", "semantic.enabled=false", "snapshot.path=snapshot")
    command = [sys.executable, "-m", "sim.cli", "serve", "flash-sale", "--port", "0", "--json"]
    command += [part for item in sets for part in ("--set", item)]
    for number, (word, tier) in enumerate([("cold: no answers", "model"), ("warm: 1 answer from snapshot\n", "exact")]):
        with (
            (tmp_path / f"said-{number}").open("wb") as err,
            subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=err) as process,
        ):
            assert process.stdout is not None
            ready = msgspec.json.decode(process.stdout.readline())
            headers = {"authorization": f"Bearer {ready['api_key']}"}
            with httpx.Client(base_url=ready["url"], headers=headers, timeout=20, trust_env=False) as client:
                assert client.post(CHAT, json=body(FIRST)).headers["x-doorbuster-tier"] == tier
            process.terminate()
            assert process.wait(20) == 0
        said = (tmp_path / f"said-{number}").read_text()
        assert f"started {word}" in said and "Traceback" not in said


KILLED = """
import os, sys
from pathlib import Path
from engine.model import whole_file
path, point = Path(sys.argv[1]), sys.argv[2]
setattr(os, point, lambda *_: os._exit(9))
whole_file.install(path, whole_file.write_beside(path, [b"new" * 100_000]))
"""


@pytest.mark.parametrize("point", ["fsync", "replace"])
def test_who_is_killed_while_writing_leaves_the_old_one(tmp_path: Path, point: str) -> None:
    path = tmp_path / "snapshot"
    path.write_bytes(b"old")
    done = subprocess.run([sys.executable, "-c", KILLED, str(path), point], env={**os.environ}, check=False)
    assert done.returncode == 9
    assert path.read_bytes() == b"old"
    for part in tmp_path.glob("*.part"):
        part.chmod(0o644)
    whole_file.install(path, whole_file.write_beside(path, [b"new", b"er"]))
    assert path.read_bytes() == b"newer" and [p.name for p in tmp_path.iterdir()] == ["snapshot"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_disk_that_is_full_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "snapshot"
    path.write_bytes(b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("engine.model.whole_file.os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        whole_file.write_beside(path, [b"new"])
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["snapshot"]

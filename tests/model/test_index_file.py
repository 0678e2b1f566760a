"""The index on disk: what comes back answers as before, and what does not fit is refused in words.

    pytest tests/model/test_index_file.py

Caught (each made on purpose in a copy): ages that begin at nought again; factors of 8-bit rows left out; an encoder
that is not compared.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from engine.errors import UserError
from engine.model import inverted_index
from engine.model.index import Encoding, VectorIndex

DIMS, ENCODER = 16, "abc123"


def made(encoding: Encoding, seed: int = 0) -> tuple[VectorIndex, np.ndarray]:
    """A hard key in lists, a flat one, and an empty one; copies among them, which ages tell apart."""
    rows = np.random.default_rng(seed).normal(size=(400, DIMS))
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    rows[50:60] = rows[3]
    index = VectorIndex(DIMS, "numpy", encoding, exact_rows=100)
    for number, row in enumerate(rows):
        index.add(b"many" if number % 4 else b"few", b"t%d" % number, row)
    index.add(b"", b"", rows[0])
    index.remove(b"few", b"t8")
    index.add(b"many", b"t51", rows[3])  # again: the youngest of the copies now
    return index, rows


@pytest.mark.parametrize("encoding", ["float32", "int8"])
def test_it_answers_as_before_and_goes_on_as_before(
    encoding: Encoding, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"LONGEST": 20, "SHORTEST": 4, "PROBED_ROWS": 60}.items():
        monkeypatch.setattr(inverted_index, name, value)
    index, rows = made(encoding)
    path = tmp_path / "deep" / "vectors.npz"
    index.save(path, ENCODER)
    index.save(path, ENCODER)  # over the old one
    assert [file.name for file in path.parent.iterdir()] == ["vectors.npz"]
    again = VectorIndex.load(path, ENCODER, DIMS, "numpy", encoding, exact_rows=100)
    assert len(again) == len(index)
    assert index.stats().approximate_rows > 200 and again.stats()[:4] == index.stats()[:4]
    for round_ in range(2):
        for row in rows[::7]:
            for hard in (b"many", b"few", b"", b"none"):
                assert again.search(hard, row, 12) == index.search(hard, row, 12)
        for each in (index, again):
            for number in range(0, 200, 3):
                each.remove(b"many", b"t%d" % number)
                each.add(b"many", b"n%d" % number, rows[number + round_])


def test_an_empty_index_comes_back_empty(tmp_path: Path) -> None:
    VectorIndex(DIMS, "numpy").save(tmp_path / "none.npz", ENCODER)
    again = VectorIndex.load(tmp_path / "none.npz", ENCODER, DIMS, "numpy")
    assert len(again) == 0 and again.stats().entry_bytes == 0


def test_what_does_not_fit_is_refused_in_words(tmp_path: Path) -> None:
    path = tmp_path / "vectors.npz"
    made("float32")[0].save(path, ENCODER)
    with pytest.raises(UserError, match="its encoder is abc123, not other") as caught:
        VectorIndex.load(path, "other", DIMS, "numpy")
    assert caught.value.where == str(path) and "delete it" in caught.value.fix
    with pytest.raises(UserError, match="its width is 16, not 17"):
        VectorIndex.load(path, ENCODER, DIMS + 1, "numpy")
    with pytest.raises(UserError, match="its encoding is float32, not int8"):
        VectorIndex.load(path, ENCODER, DIMS, "numpy", "int8")
    with pytest.raises(UserError, match="No such file"):
        VectorIndex.load(tmp_path / "nowhere.npz", ENCODER, DIMS, "numpy")


@pytest.mark.parametrize("damage", ["cut", "bit", "empty", "text", "version", "missing", "rows", "keys", "nan"])
def test_a_damaged_file_is_refused_in_words(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "vectors.npz"
    made("float32")[0].save(path, ENCODER)
    raw = bytearray(path.read_bytes())
    with np.load(path) as stored:
        arrays = {name: stored[name] for name in stored.files}
    match damage:
        case "cut":
            path.write_bytes(raw[: len(raw) // 2])
        case "bit":
            at = raw.find(arrays["vectors"].tobytes()[:64])
            raw[at + 5] ^= 64
            path.write_bytes(raw)
        case "empty":
            path.write_bytes(b"")
        case "text":
            path.write_text("no vectors here")
        case "version":
            arrays["head"][0] += 1
        case "missing":
            del arrays["ages"]
        case "rows":
            arrays["vectors"] = arrays["vectors"][:-1]
        case "keys":
            arrays["text_lengths"][0] += 1
        case "nan":
            arrays["vectors"][3, 3] = np.nan
    if damage in ("version", "missing", "rows", "keys", "nan"):
        np.savez(path, **arrays)
    with pytest.raises(UserError, match="version 2" if damage == "version" else "damaged"):
        VectorIndex.load(path, ENCODER, DIMS, "numpy")


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "vectors.npz"
    index, rows = made("float32")
    index.save(path, ENCODER)
    before = path.read_bytes()
    index.add(b"few", b"more", rows[0])

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("engine.model.index_file.os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        index.save(path, ENCODER)
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["vectors.npz"]

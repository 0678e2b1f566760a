"""Vectors of the workload's questions: the real encoder's, computed once and kept on disk by weights and text.

What live learns during a sale from its encoder, the twin must have beforehand. The model runs in a process of its own
(``python -m sim.twin.vectors``), so that a sale in the twin whose questions are known imports no torch.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch

import subprocess
import sys
from collections.abc import Callable, Iterable
from hashlib import blake2b
from pathlib import Path
from zipfile import BadZipFile

import msgspec
import numpy as np

from engine.config import Scenario
from engine.errors import UserError
from engine.model.encoder_folder import digest_of, find_folder
from engine.model.encoder_process import DIMS
from engine.model.folder import cache_dir

KEY_BYTES = 16
CHUNK = 64  # texts between two words on how far it is

OnDone = Callable[[int, int], None]


class VectorSpec(msgspec.Struct, frozen=True):
    """What the process is to encode, and with how many threads."""

    texts: list[str]
    threads: int


def semantic_classes(scenario: Scenario) -> list[str]:
    """Classes that are answered by similar questions: none, and no encoder is needed."""
    return [name for name, cls in scenario.classes.items() if cls.caches == "semantic" and scenario.semantic.enabled]


def vectors_of(
    texts: Iterable[str], on_done: OnDone = lambda done, of: None, folder: Path | None = None
) -> dict[str, np.ndarray]:
    """fp32 ``[384]`` of length 1 by text; a text that is too long to have a vector is not there.

    ``folder``: where they are kept; below the cache folder by default. ``on_done(done, of)`` hears of those that are
    computed now. Raises UserError when there is no encoder.
    """
    wanted = list(dict.fromkeys(texts))
    if not wanted:
        return {}
    digest = digest_of(find_folder())
    path = (folder or cache_dir() / "vectors") / f"{digest}.npz"
    known = _read(path)
    missing = [text for text in wanted if _key(text) not in known]
    if missing:
        rows = _compute(missing, digest, on_done)
        known |= {_key(text): row for text, row in zip(missing, rows, strict=True)}
        _write(path, known)
    found = {text: known[_key(text)] for text in wanted}
    return {text: row for text, row in found.items() if row.any()}


def _key(text: str) -> bytes:
    return blake2b(text.encode(), digest_size=KEY_BYTES).digest()


def _read(path: Path) -> dict[bytes, np.ndarray]:
    """A file that cannot be read is as good as none: it is made again."""
    try:
        with path.open("rb") as file, np.load(file) as stored:
            keys, rows = stored["keys"], stored["rows"]
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        return {}
    if rows.shape != (len(keys), DIMS):
        return {}
    return {key.tobytes(): row for key, row in zip(keys, rows, strict=True)}


def _write(path: Path, known: dict[bytes, np.ndarray]) -> None:
    """Beside its place and renamed: never half a file, whoever else writes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(f".{os.getpid()}.part")
    with beside.open("wb") as file:
        keys = np.frombuffer(b"".join(known), np.uint8).reshape(-1, KEY_BYTES)
        np.savez(file, keys=keys, rows=np.stack(list(known.values())))
    beside.replace(path)


def _compute(texts: list[str], digest: str, on_done: OnDone) -> np.ndarray:
    """fp32 ``[len(texts), 384]``, in the order of ``texts``; of like length together, which saves padding."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    spec = VectorSpec([texts[i] for i in order], threads=os.cpu_count() or 1)
    rows = np.empty((len(texts), DIMS), np.float32)
    done = 0
    on_done(done, len(texts))
    with subprocess.Popen(
        [sys.executable, "-m", "sim.twin.vectors"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdin is not None and child.stdout is not None
        child.stdin.write(msgspec.msgpack.encode(spec))
        child.stdin.close()
        theirs = child.stdout.readline().decode().strip()
        while raw := child.stdout.read(4 * DIMS * CHUNK):
            part = np.frombuffer(raw, "<f4").reshape(-1, DIMS)
            rows[order[done : done + len(part)]] = part
            done += len(part)
            on_done(done, len(texts))
    if child.returncode or done != len(texts):
        raise UserError("encoding the questions failed", why=f"exit code {child.returncode}; its last words are above")
    if theirs != digest:
        raise UserError("the encoder is not the one that was looked for", why=f"{theirs}, not {digest}")
    return rows


def main() -> None:
    """The process: a VectorSpec on stdin; its weights' digest on a line, then rows of fp32, on stdout."""
    spec = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=VectorSpec)
    try:
        from engine.model.embedder import Embedder

        embedder = Embedder(threads=spec.threads)
    except UserError as error:
        print(error, file=sys.stderr, flush=True)
        sys.exit(1)
    sys.stdout.buffer.write(embedder.digest.encode() + b"\n")
    for begin in range(0, len(spec.texts), CHUNK):
        rows = embedder.encode(spec.texts[begin : begin + CHUNK])
        sys.stdout.buffer.write(rows.astype("<f4").tobytes())
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()

"""An index as bytes: an ``.npz``. No texts, no answers.

Lists and their means are written as they are, so what is read back answers as before, in a fraction of a second.
"""

from __future__ import annotations

import io
from typing import NamedTuple
from zipfile import BadZipFile

import numpy as np

from engine.errors import UserError
from engine.model.index_rows import Encoding, Rows

VERSION = 1


class StoredKey(NamedTuple):
    """One hard key. The first block belongs to no list; ``centroids``: fp32 ``[blocks - 1, dims]``."""

    hard_key: bytes
    lists: bool  # an inverted index
    blocks: list[Rows]
    centroids: np.ndarray


class Stored(NamedTuple):
    """A whole index. ``added``: the insertion number of the next vector."""

    added: int
    keys: list[StoredKey]


class Packed:
    """An index, copied: another thread may turn it into bytes while the index goes on."""

    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        self._arrays = arrays

    def to_bytes(self) -> bytes:
        """What ``read`` wants."""
        file = io.BytesIO()
        np.savez(file, allow_pickle=False, **self._arrays)
        return file.getvalue()


def pack(stored: Stored, encoder: str, dims: int, encoding: Encoding) -> Packed:
    """``encoder``: digest of the weights that made the vectors."""
    blocks = [block for key in stored.keys for block in key.blocks]
    empty = Rows(dims, encoding)
    text_keys = [text for block in blocks for text in block.keys]
    return Packed({
        "head": np.array([VERSION, dims, stored.added], np.int64),
        "encoder": np.array(encoder), "encoding": np.array(encoding),
        "hard_keys": np.frombuffer(b"".join(key.hard_key for key in stored.keys), np.uint8),
        "hard_lengths": np.array([len(key.hard_key) for key in stored.keys], np.int64),
        "lists": np.array([key.lists for key in stored.keys], bool),
        "blocks": np.array([len(key.blocks) for key in stored.keys], np.int64),
        "block_rows": np.array([len(block) for block in blocks], np.int64),
        "text_keys": np.frombuffer(b"".join(text_keys), np.uint8),
        "text_lengths": np.array([len(text) for text in text_keys], np.int64),
        "vectors": np.concatenate([empty.vectors, *(block.vectors[: len(block)] for block in blocks)]),
        "factors": np.concatenate([empty.factors, *(block.factors[: len(block)] for block in blocks)]),
        "ages": np.concatenate([empty.ages, *(block.ages[: len(block)] for block in blocks)]),
        "centroids": np.concatenate([np.empty((0, dims), np.float32), *(key.centroids for key in stored.keys)]),
    })


def read(raw: bytes, where: str, encoder: str, dims: int, encoding: Encoding) -> Stored:
    """UserError when these bytes cannot be read, or hold other vectors than those that are asked for."""
    try:
        with np.load(io.BytesIO(raw), allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        version, theirs, added = (int(number) for number in arrays["head"])
        if version != VERSION:
            raise _refusal(where, f"they are of version {version}, not {VERSION}")
        for what, there, asked in (
            ("encoder", str(arrays["encoder"]), encoder), ("width", theirs, dims),
            ("encoding", str(arrays["encoding"]), encoding),
        ):
            if there != asked:
                raise _refusal(where, f"their {what} is {there}, not {asked}")
        return Stored(added, _keys(arrays, dims, encoding))
    except (OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile) as error:
        raise _refusal(where, f"they are damaged: {error}") from None


def _keys(arrays: dict[str, np.ndarray], dims: int, encoding: Encoding) -> list[StoredKey]:
    vectors, factors, ages, block_rows = arrays["vectors"], arrays["factors"], arrays["ages"], arrays["block_rows"]
    n = int(block_rows.sum())
    if vectors.shape != (n, dims) or vectors.dtype != encoding or ages.shape != (n,):
        raise ValueError("the rows are not as many as their blocks say")
    if len(factors) != (n if encoding == "int8" else 0) or not np.isfinite(factors).all():
        raise ValueError("the rows' factors are not there")
    if encoding == "float32" and not np.isfinite(vectors).all():
        raise ValueError("a vector is not finite")
    hard_keys = _cut(arrays["hard_keys"], arrays["hard_lengths"])
    text_keys = _cut(arrays["text_keys"], arrays["text_lengths"])
    if len(text_keys) != n or len(hard_keys) != len(arrays["blocks"]) or arrays["blocks"].sum() != len(block_rows):
        raise ValueError("the keys are not as many as their rows")
    found, row, block, centroid = [], 0, 0, 0
    for hard_key, lists, count in zip(hard_keys, arrays["lists"].tolist(), arrays["blocks"].tolist(), strict=True):
        mine = []
        for rows in block_rows[block : block + count].tolist():
            part = slice(row, row + rows)
            mine.append(Rows.of(text_keys[part], ages[part], vectors[part], factors[part]))
            row += rows
        centroids = arrays["centroids"][centroid : centroid + count - 1]
        if centroids.shape != (count - 1, dims):
            raise ValueError("the lists have no means")
        found.append(StoredKey(hard_key, lists, mine, centroids))
        block, centroid = block + count, centroid + count - 1
    return found


def _cut(joined: np.ndarray, lengths: np.ndarray) -> list[bytes]:
    raw, ends = joined.tobytes(), np.cumsum(lengths).tolist()
    if (ends[-1] if ends else 0) != len(raw) or (lengths < 0).any():
        raise ValueError("the keys have another length")
    return [raw[end - length : end] for end, length in zip(ends, lengths.tolist(), strict=True)]


def _refusal(where: str, why: str) -> UserError:
    return UserError(
        "these vectors cannot be used", where=where, why=why, fix="delete them, and begin with an empty semantic cache"
    )

"""A snapshot of the response caches as bytes: what the machine knows, the texts, the vectors, and whose they are.

A line that names the format, a digest of all that follows, and one msgpack message. It holds answers' texts and the key
of all digests, so it is its owner's alone to read. No policy here: what may still serve is for the machine to say.
"""

from __future__ import annotations

from hashlib import blake2b
from pathlib import Path

import msgspec
from msgspec.structs import replace

from engine.errors import UserError
from engine.events import Remember
from engine.model.index import Encoding
from engine.service.similar import PackedVectors
from engine.service.stream import StoredAnswer

FORMAT = b"doorbuster snapshot "
FIRST_LINE = FORMAT + b"1\n"  # another number where keys, marks or this message are made otherwise
DIGEST_BYTES = 32
COLD = "delete it, or leave it: the next one takes its place"


class Origin(msgspec.Struct, frozen=True):
    """Whose answers and vectors these are. ``encoder``: its weights' digest, "" = there is none."""

    hash_key: bytes  # of all digests
    model: str
    model_digest: str
    depends_on: dict[str, tuple[str, ...]]  # tags by class
    encoder: str
    dims: int
    encoding: Encoding

    @property
    def vectors(self) -> tuple[str, int, Encoding]:
        """What must be equal for vectors to be of use."""
        return self.encoder, self.dims, self.encoding


class Snapshot(msgspec.Struct, frozen=True):
    """All of it. The machine's times are on a clock that showed ``at_ns`` when wall time was ``saved_at_ns``."""

    origin: Origin
    saved_at_ns: int
    at_ns: int
    what: Remember
    texts: list[tuple[str, StoredAnswer]]
    questions: bytes = b""
    answers: bytes = b""


_encoder = msgspec.msgpack.Encoder()
_decode = msgspec.msgpack.Decoder(Snapshot).decode


def to_bytes(snapshot: Snapshot, packed: PackedVectors) -> list[bytes]:
    """With the vectors put in. May run in a thread of its own."""
    body = _encoder.encode(
        replace(snapshot, questions=packed.questions.to_bytes(), answers=packed.answers.to_bytes())
    )
    return [FIRST_LINE, blake2b(body, digest_size=DIGEST_BYTES).digest(), body]


def read(path: Path) -> Snapshot | None:
    """What is there; None = no file. UserError when it cannot be read."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise refusal(path, error.strerror or str(error)) from None
    if not raw.startswith(FIRST_LINE):
        raise refusal(path, "it is of another version" if raw.startswith(FORMAT) else "it is no snapshot")
    begin = len(FIRST_LINE) + DIGEST_BYTES
    body = memoryview(raw)[begin:]
    if blake2b(body, digest_size=DIGEST_BYTES).digest() != raw[len(FIRST_LINE) : begin]:
        raise refusal(path, "it is damaged: its digest is another")
    try:
        return _decode(body)
    except msgspec.DecodeError as error:
        raise refusal(path, f"it is of another version: {error}") from None


def aged(snapshot: Snapshot, now_ns: int, wall_ns: int) -> Remember:
    """Its entries on a clock that shows ``now_ns`` at wall time ``wall_ns``: the time in between is part of their age.

    ValueError where wall time has gone back: nobody knows their age then.
    """
    away_ns = wall_ns - snapshot.saved_at_ns
    if away_ns < 0:
        raise ValueError(f"it was saved {-away_ns / 1e9:.0f} s from now, by the clock")
    shift_ns = now_ns - snapshot.at_ns - away_ns
    exact = tuple(replace(entry, stored_ns=entry.stored_ns + shift_ns) for entry in snapshot.what.exact)
    similar = tuple(
        replace(kept, entry=replace(kept.entry, stored_ns=kept.entry.stored_ns + shift_ns))
        for kept in snapshot.what.similar
    )
    return Remember(exact, similar, snapshot.what.versions)


def why_foreign(there: Origin, here: Origin) -> str:
    """Why answers from there may not serve here; "" = they may. Of vectors it says nothing."""
    if (there.model, there.model_digest) != (here.model, here.model_digest):
        return f"its answers are of model {there.model} ({there.model_digest}), not {here.model} ({here.model_digest})"
    if there.hash_key != here.hash_key:
        return "its digests were made with another key than this run's"
    for name, tags in there.depends_on.items():
        if here.depends_on.get(name, tags) != tags:  # a word on the new tags would not reach the old answers
            return f"class {name} depended on {', '.join(tags) or 'nothing'} when it was saved"
    return ""


def refusal(path: Path, why: str) -> UserError:
    """A snapshot that cannot be used."""
    return UserError("this snapshot cannot be used: the response caches start empty", str(path), why, COLD)

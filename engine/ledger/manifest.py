"""Which segments a ledger has, and how far each counts. Replaced whole; the only list of segments there is.

A folder is never searched: a segment that the manifest does not name holds nothing that was acknowledged.
"""

from __future__ import annotations

from pathlib import Path

import google_crc32c
import msgspec

from engine.ledger.errors import LedgerError
from engine.ledger.files import Files, write_whole

MANIFEST, VERSION = "MANIFEST", 1
PREFIX, SUFFIX = "segment-", ".ledger"


class Segment(msgspec.Struct, frozen=True):
    """One segment: its number (its name), its random id in hex, and where it begins and ends.

    ``end_bytes``, ``next_seq``: behind its last frame; None while it is the one that is written. What stands behind
    ``end_bytes`` does not count: a footer, or what a failed disk left.
    """

    number: int
    id: str
    first_seq: int
    end_bytes: int | None = None
    next_seq: int | None = None
    closed_ns: int | None = None  # wall clock; only retention by age reads it

    @property
    def name(self) -> str:
        """File name."""
        return f"{PREFIX}{self.number:08d}{SUFFIX}"


class Manifest(msgspec.Struct, frozen=True):
    """All segments, oldest first, and where the next one begins; both outlive the segments that retention takes."""

    segments: tuple[Segment, ...] = ()
    next_number: int = 0
    next_seq: int = 0  # behind the last closed segment
    version: int = VERSION


def read_manifest(files: Files, folder: Path) -> Manifest | None:
    """None: there is none yet. LedgerError: damaged, or of another version."""
    path = folder / MANIFEST
    try:
        crc, _, body = files.read(path).partition(b"\n")
    except FileNotFoundError:
        return None
    if crc != b"%08x" % google_crc32c.value(body):
        why, fix = "its checksum is wrong", "restore it from a copy of the folder"
        raise LedgerError("the manifest is damaged", str(path), why, fix)
    manifest = msgspec.json.decode(body, type=Manifest)
    if manifest.version != VERSION:
        what = f"manifest version {manifest.version}; this doorbuster reads {VERSION}"
        raise LedgerError(what, str(path), "it was written by another version", "read it with the one that wrote it")
    return manifest


def write_manifest(files: Files, folder: Path, manifest: Manifest) -> None:
    """It is on disk when this returns."""
    body = msgspec.json.encode(manifest)
    write_whole(files, folder / MANIFEST, b"%08x\n" % google_crc32c.value(body) + body)

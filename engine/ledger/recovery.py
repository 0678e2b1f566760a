"""What opening a ledger does with what the last life left: cut a torn tail, refuse damage before it, seal, tidy up.

Only the segment that was being written is read; the others are known whole (they were synced before they were
closed) and are checked when they are read, or by ``verify``. The tail is written anew as a whole file: after a failed
fsync a frame may be readable and yet not on disk, and no second fsync would put it there.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from engine.ledger.errors import LedgerError
from engine.ledger.files import Files, write_whole
from engine.ledger.frame import HEAD, Frame, Head, chain, frame_at, frames, later_frame, pack_footer, read_head
from engine.ledger.manifest import MANIFEST, PREFIX, SUFFIX, Manifest, Segment, read_manifest, write_manifest
from engine.ledger.payload import FOOTER
from engine.ledger.record import SCHEMA_VERSION

FIX = "restore the file from a copy, or move the folder away and begin anew"


class Recovered(msgspec.Struct, frozen=True):
    """What was found. ``torn_bytes`` were cut from ``torn_segment``: part of a frame that nobody was told is safe."""

    manifest: Manifest
    torn_bytes: int = 0
    torn_segment: str = ""


def recover(files: Files, folder: Path, wall_ns: int) -> Recovered:
    """A manifest in which every segment is closed. LedgerError: damage, with its offset; OSError: the disk."""
    manifest = read_manifest(files, folder)
    if manifest is None:
        refuse_without_manifest(files, folder)
        manifest = Manifest()
    recovered = Recovered(manifest)
    if manifest.segments and manifest.segments[-1].end_bytes is None:
        recovered = _close_last(files, folder, manifest, wall_ns)
        write_manifest(files, folder, recovered.manifest)
    kept = {segment.name for segment in recovered.manifest.segments}
    for name in files.names(folder):
        if (name.startswith(PREFIX) or name == MANIFEST + ".tmp") and name not in kept:
            files.unlink(folder / name)
    return recovered


def _close_last(files: Files, folder: Path, manifest: Manifest, wall_ns: int) -> Recovered:
    last = manifest.segments[-1]
    data = read_segment(files, folder, last)
    found = list(frames(data, _head(data, folder, last), next_seq=last.first_seq))
    end = found[-1].end if found else HEAD.size
    torn = len(data) - end
    if frame_at(data, end, bytes.fromhex(last.id)) or later_frame(data, end, bytes.fromhex(last.id)) is not None:
        raise damaged(folder, last, end)
    sealed = bool(found) and found[-1].codec == FOOTER
    if sealed:
        found.pop()
    before = manifest.segments[:-1]
    next_seq = found[-1].next_seq if found else last.first_seq
    if found:
        end = found[-1].end
        if not sealed:
            write_whole(files, folder / last.name, data[:end] + footer_of(last, found))
        before += (closed(last, end, next_seq, wall_ns),)
    return Recovered(Manifest(before, manifest.next_number, next_seq), torn, last.name if torn else "")


def verify(files: Files, folder: Path, segment: Segment) -> list[Frame]:
    """All frames of a closed segment, each checked; LedgerError with the offset of the first that is wrong."""
    data = read_segment(files, folder, segment)[: segment.end_bytes]
    found = list(frames(data, _head(data, folder, segment), next_seq=segment.first_seq))
    end = found[-1].end if found else HEAD.size
    if end != segment.end_bytes or (found and found[-1].next_seq != segment.next_seq):
        raise damaged(folder, segment, end)
    return found


def closed(segment: Segment, end_bytes: int, next_seq: int, wall_ns: int) -> Segment:
    """The same, no longer written."""
    return Segment(segment.number, segment.id, segment.first_seq, end_bytes, next_seq, wall_ns)


def footer_of(segment: Segment, found: list[Frame]) -> bytes:
    """The footer that seals ``found``."""
    crc = 0
    for frame in found:
        crc = chain(crc, frame.crc)
    next_seq = found[-1].next_seq
    return pack_footer(bytes.fromhex(segment.id), next_seq - segment.first_seq, next_seq, crc)


def read_segment(files: Files, folder: Path, segment: Segment, offset: int = 0) -> bytes:
    """From ``offset`` on; LedgerError where the file is gone."""
    try:
        return files.read(folder / segment.name, offset)
    except FileNotFoundError:
        why = "the manifest names it"
        raise LedgerError("a segment is missing", str(folder / segment.name), why, FIX) from None


def damaged(folder: Path, segment: Segment, offset: int) -> LedgerError:
    """Damage that no crash explains."""
    what = f"damaged at byte {offset}"
    why = "what stands there is no right frame, and acknowledged records stood there or behind it"
    return LedgerError(what, os.fspath(folder / segment.name), why, FIX)


def _head(data: bytes, folder: Path, segment: Segment) -> Head:
    head = read_head(data, str(folder / segment.name))
    if head is None or head.id.hex() != segment.id or head.first_seq != segment.first_seq:
        raise damaged(folder, segment, 0)
    if head.schema > SCHEMA_VERSION:
        what = f"records of schema {head.schema}; this doorbuster reads {SCHEMA_VERSION}"
        where, fix = str(folder / segment.name), "read it with the doorbuster that wrote it"
        raise LedgerError(what, where, "it was written by a later version", fix)
    return head


def refuse_without_manifest(files: Files, folder: Path) -> None:
    """LedgerError where segments hold records that no manifest names."""
    for name in files.names(folder):
        if not (name.startswith(PREFIX) and name.endswith(SUFFIX)):
            continue
        data = files.read(folder / name)
        head = read_head(data, str(folder / name))
        if head is not None and next(frames(data, head), None) is not None:
            why = f"{name} holds records, and nothing says which segments belong to this ledger"
            raise LedgerError("the manifest is missing", str(folder / MANIFEST), why, FIX)

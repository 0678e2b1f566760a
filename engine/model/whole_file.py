"""A file that is there whole or not at all: written beside its place, brought to the disk, and renamed.

Whoever is killed at any moment leaves the old one whole, and at most a part that the next writer writes over. One
writer at a time.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from engine.errors import UserError

OWNER_ONLY = 0o600


def write_beside(path: Path, pieces: Iterable[bytes]) -> Path:
    """What ``install`` puts in place; only its owner may read it. If it fails, OSError, and nothing is left."""
    beside = _beside(path)
    number = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, OWNER_ONLY)
    try:
        with open(number, "wb") as file:
            os.fchmod(number, OWNER_ONLY)  # a part that was left may have been made otherwise
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(number)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    return beside


def install(path: Path, beside: Path) -> None:
    """From now on it is the file."""
    os.replace(beside, path)
    _sync_folder(path)


def remove(path: Path) -> None:
    """Gone, even after a power cut. No file is no mistake."""
    path.unlink(missing_ok=True)
    _sync_folder(path)


def check_place(path: Path, what: str, fix: str) -> None:
    """UserError when no file can be written there; makes the folder. ``what`` cannot be written, in words."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(21, "it is a folder")
        write_beside(path, ()).unlink()
    except OSError as error:
        raise UserError(what, str(path), error.strerror or str(error), fix) from None


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.part")


def _sync_folder(path: Path) -> None:
    number = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)

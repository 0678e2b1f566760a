"""The few things that a ledger asks of a file system, behind a seam where tests put crashes, full and failing disks.

All may raise OSError. ``write`` may leave part of its bytes behind when it does. Nothing is on disk before ``sync`` of
the file and, for its name, ``sync_folder``.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path
from typing import Protocol

from engine.ledger.errors import LedgerError

_sync = getattr(os, "fdatasync", os.fsync)  # the length is data to it; times are not


class Files(Protocol):
    """A folder's files. A handle is a number."""

    def lock(self, path: Path) -> int:
        """Makes the folder and holds it; LedgerError where another process does."""

    def create(self, path: Path) -> int:
        """A new file, or an empty one in the place of a file that a crash left."""

    def write(self, handle: int, data: bytes) -> None:
        """All of ``data`` at the end."""

    def sync(self, handle: int) -> None:
        """What was written is on disk."""

    def close(self, handle: int) -> None:
        """Nothing is written by it."""

    def read(self, path: Path, offset: int = 0) -> bytes:
        """From ``offset`` to the end as it is now. FileNotFoundError."""

    def replace(self, source: Path, target: Path) -> None:
        """Atomic rename."""

    def unlink(self, path: Path) -> None:
        """Gone; a missing file is no mistake."""

    def names(self, folder: Path) -> list[str]:
        """Sorted."""

    def sync_folder(self, folder: Path) -> None:
        """Names made, changed and removed there are on disk."""


class OsFiles:
    """The real ones, without a buffer between."""

    def lock(self, path: Path) -> int:
        """Makes the folder; LedgerError where another process holds it. The kernel lets go when a process dies."""
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            why, fix = "a ledger has one writer", "stop the other, or give a folder of its own"
            raise LedgerError("another process writes this ledger", str(path.parent), why, fix) from None
        except OSError:  # a file system without locks
            os.close(handle)
            raise
        return handle

    def create(self, path: Path) -> int:
        """A new file, or an empty one in the place of a file that a crash left."""
        return os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC, 0o644)

    def write(self, handle: int, data: bytes) -> None:
        """All of ``data`` at the end."""
        left = memoryview(data)
        while left:
            left = left[os.write(handle, left) :]

    def sync(self, handle: int) -> None:
        """What was written is on disk."""
        _sync(handle)

    def close(self, handle: int) -> None:
        """Nothing is written by it."""
        os.close(handle)

    def read(self, path: Path, offset: int = 0) -> bytes:
        """From ``offset`` to the end as it is now."""
        with path.open("rb") as file:
            file.seek(offset)
            return file.read()

    def replace(self, source: Path, target: Path) -> None:
        """Atomic rename."""
        source.replace(target)

    def unlink(self, path: Path) -> None:
        """Gone; a missing file is no mistake."""
        path.unlink(missing_ok=True)

    def names(self, folder: Path) -> list[str]:
        """Sorted."""
        return sorted(os.listdir(folder))

    def sync_folder(self, folder: Path) -> None:
        """Names made, changed and removed there are on disk."""
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_whole(files: Files, path: Path, data: bytes) -> None:
    """``path`` holds ``data``, or what it held before: temporary file, fsync, rename, fsync of the folder."""
    beside = path.with_name(path.name + ".tmp")
    handle = files.create(beside)
    try:
        files.write(handle, data)
        files.sync(handle)
    except OSError:
        with contextlib.suppress(OSError):
            files.unlink(beside)
        raise
    finally:
        files.close(handle)
    files.replace(beside, path)
    files.sync_folder(path.parent)

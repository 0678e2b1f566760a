"""A disk that crashes, fills up and fails, in memory: the ledger's ``Files`` over sectors that are synced or not.

``cut_power`` keeps what was synced, and of the rest a random subset of 512-byte sectors, a random length, and a random
beginning of the changes of names: what a real disk may do. A sync that fails marks its pages clean, as Linux does: a
second sync returns without writing them. A killed process leaves all that it wrote: the kernel has it.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from random import Random

SECTOR = 512
Fault = str | None  # "before", "half", "after": the process dies there; "enospc", "eio": the call fails
Plan = Callable[[int, str], Fault]  # number and name of the call


class Died(BaseException):
    """The process is gone: nothing of the ledger may catch it."""


class Inode:
    def __init__(self) -> None:
        self.durable, self.now = b"", b""
        self.dirty: set[int] = set()
        self.lost: set[int] = set()  # marked clean by a sync that failed


class Disk:
    """What outlives a process."""

    def __init__(self, rng: Random) -> None:
        self.rng = rng
        self.names: dict[Path, Inode] = {}
        self.durable_names: dict[Path, Inode] = {}
        self.changes: list[tuple[Path, Inode | None]] = []
        self.full = False

    def change(self, path: Path, inode: Inode | None) -> None:
        self.changes.append((path, inode))
        self._apply(self.names, path, inode)

    @staticmethod
    def _apply(names: dict[Path, Inode], path: Path, inode: Inode | None) -> None:
        for other in [p for p, i in names.items() if i is inode]:
            del names[other]  # a rename takes the old name away
        names.pop(path, None)
        if inode is not None:
            names[path] = inode

    def sync_names(self) -> None:
        self.durable_names, self.changes = dict(self.names), []

    def cut_power(self) -> None:
        for path, inode in self.changes[: self.rng.randint(0, len(self.changes))]:
            self._apply(self.durable_names, path, inode)
        self.names, self.changes = dict(self.durable_names), []
        for inode in self.names.values():
            self._tear(inode)

    def _tear(self, inode: Inode) -> None:
        size = self.rng.randint(min(len(inode.durable), len(inode.now)), max(len(inode.durable), len(inode.now)))
        data = bytearray(inode.durable[:size].ljust(size, b"\0"))
        for sector in inode.dirty | inode.lost:
            if self.rng.random() < 0.5:
                at = sector * SECTOR
                piece = inode.now[at : min(at + SECTOR, size)]
                data[at : at + len(piece)] = piece
        inode.durable = inode.now = bytes(data)
        inode.dirty, inode.lost = set(), set()


class SimFiles:
    """One process' view of a disk. Each call asks the plan first; after a death every call dies."""

    def __init__(self, disk: Disk, plan: Plan = lambda number, name: None) -> None:
        self.disk, self._plan = disk, plan
        self._open: dict[int, Inode] = {}
        self._handles = 2
        self.calls: list[str] = []
        self._dead = False

    def _ask(self, name: str) -> Fault:
        if self._dead:
            raise Died
        fault = self._plan(len(self.calls), name)
        self.calls.append(name)
        if fault == "before":
            self._die()
        if fault == "eio" and name != "sync":
            raise OSError(errno.EIO, "Input/output error")
        return fault

    def _die(self) -> None:
        self._dead = True
        raise Died

    def _after(self, fault: Fault) -> None:
        if fault in ("half", "after"):
            self._die()

    def lock(self, path: Path) -> int:
        return 1

    def create(self, path: Path) -> int:
        fault = self._ask("create")
        if fault == "enospc" or self.disk.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        self._handles += 1
        inode = self._open[self._handles] = Inode()
        self.disk.change(path, inode)
        self._after(fault)
        return self._handles

    def write(self, handle: int, data: bytes) -> None:
        fault = self._ask("write")
        full = fault == "enospc" or self.disk.full
        if full or fault == "half":
            data = data[: self.disk.rng.randint(0, len(data) - 1)]
        inode = self._open[handle]
        begin = len(inode.now)
        inode.now += data
        if data:
            inode.dirty |= set(range(begin // SECTOR, (len(inode.now) - 1) // SECTOR + 1))
        if full:
            raise OSError(errno.ENOSPC, "No space left on device")
        self._after(fault)

    def sync(self, handle: int) -> None:
        fault = self._ask("sync")
        inode = self._open[handle]
        if fault in ("eio", "enospc"):
            inode.lost |= inode.dirty
            inode.dirty = set()
            raise OSError(errno.EIO, "Input/output error")
        if fault != "half":
            if not inode.lost:
                inode.durable = inode.now
            else:  # the lost pages are clean to the kernel, and not on disk
                data = bytearray(inode.durable.ljust(len(inode.now), b"\0"))
                for sector in inode.dirty - inode.lost:
                    at = sector * SECTOR
                    data[at : at + SECTOR] = inode.now[at : at + SECTOR]
                inode.durable = bytes(data)
            inode.dirty = set()
        self._after(fault)

    def close(self, handle: int) -> None:
        self._open.pop(handle, None)

    def read(self, path: Path, offset: int = 0) -> bytes:
        if path not in self.disk.names:
            raise FileNotFoundError(errno.ENOENT, "No such file", str(path))
        return self.disk.names[path].now[offset:]

    def replace(self, source: Path, target: Path) -> None:
        fault = self._ask("replace")
        if fault == "enospc":
            raise OSError(errno.ENOSPC, "No space left on device")
        self.disk.change(target, self.disk.names[source])
        self._after(fault)

    def unlink(self, path: Path) -> None:
        fault = self._ask("unlink")
        if path in self.disk.names:
            self.disk.change(path, None)
        self._after(fault)

    def names(self, folder: Path) -> list[str]:
        return sorted(path.name for path in self.disk.names)

    def sync_folder(self, folder: Path) -> None:
        fault = self._ask("sync_folder")
        if fault in ("eio", "enospc"):
            raise OSError(errno.EIO, "Input/output error")
        if fault != "half":
            self.disk.sync_names()
        self._after(fault)

"""The journal: every event that a machine was told, when, and every action it took. One JSON line each.

The header makes a replay possible on its own: kind of machine, its whole config, hash key, versions. The clock is the
driver's; wall time stands in the header only, as a label. A torn last line (a killed process) is cut and reported.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Literal

import msgspec

from engine.config import GatewayConfig, LaneConfig, ReplicaConfig
from engine.errors import JournalError
from engine.events import GatewayAction, GatewayEvent, ReplicaAction, ReplicaEvent
from engine.lane_events import LaneAction, LaneEvent
from engine.units import MS_NS

VERSION = 1
FLUSH_BYTES = 1 << 16
FLUSH_NS = 200 * MS_NS  # a killed process loses no more than this

Kind = Literal["gateway", "replica", "lane"]
Config = GatewayConfig | ReplicaConfig | LaneConfig


class Header(msgspec.Struct, frozen=True):
    """First line."""

    kind: Kind
    config: msgspec.Raw
    hash_key: bytes = b""
    version: int = VERSION
    written_at: str = ""
    python: str = ""


class GatewayEntry(msgspec.Struct, frozen=True, array_like=True):
    """What a gateway was told at ``at_ns``, and what it did."""

    serial: int
    at_ns: int
    event: GatewayEvent
    actions: list[GatewayAction]


class ReplicaEntry(msgspec.Struct, frozen=True, array_like=True):
    """What a replica was told at ``at_ns``, and what it did."""

    serial: int
    at_ns: int
    event: ReplicaEvent
    actions: list[ReplicaAction]


class LaneEntry(msgspec.Struct, frozen=True, array_like=True):
    """What a lane was told at ``at_ns``, and what it did."""

    serial: int
    at_ns: int
    event: LaneEvent
    actions: list[LaneAction]


Entry = GatewayEntry | ReplicaEntry | LaneEntry
CONFIG_OF: dict[Kind, type[Config]] = {"gateway": GatewayConfig, "replica": ReplicaConfig, "lane": LaneConfig}
ENTRY_OF: dict[Kind, type[Entry]] = {"gateway": GatewayEntry, "replica": ReplicaEntry, "lane": LaneEntry}


class JournalWriter:
    """Appends; buffered, flushed by size, every ``FLUSH_NS`` of the writer's own time, and on close.

    Time passes only with a write: who falls silent calls ``flush``.
    """

    def __init__(self, path: Path, kind: Kind, config: Config, hash_key: bytes) -> None:
        self._encoder = msgspec.json.Encoder()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file: IO[bytes] = path.open("xb", buffering=FLUSH_BYTES)
        except OSError as error:
            why = error.strerror or str(error)
            raise JournalError("no journal can be written", str(path), why, "give a new run folder") from None
        self._serial = 0
        self._flush_ns = 0  # a write at or after this instant flushes
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        header = Header(
            kind, msgspec.Raw(self._encoder.encode(config)), hash_key, written_at=stamp,
            python=platform.python_version(),
        )
        self._file.write(self._encoder.encode(header) + b"\n")

    def write(
        self, at_ns: int, event: GatewayEvent | ReplicaEvent | LaneEvent,
        actions: list[GatewayAction] | list[ReplicaAction] | list[LaneAction],
    ) -> None:
        """One line."""
        self._file.write(self._encoder.encode((self._serial, at_ns, event, actions)) + b"\n")
        self._serial += 1
        if at_ns >= self._flush_ns:
            self._flush_ns = at_ns + FLUSH_NS
            self._file.flush()

    def flush(self) -> None:
        """All that was written is with the kernel: it outlives this process. A closed journal is no mistake."""
        if not self._file.closed:
            self._file.flush()

    def close(self) -> None:
        """Flush and close; more than once is fine."""
        self._file.close()


class Journal(msgspec.Struct, frozen=True):
    """A journal on disk, its header read."""

    path: Path
    header: Header
    torn_bytes: int  # cut from the end

    def config(self) -> Config:
        """The machine's config as it ran."""
        return msgspec.json.decode(self.header.config, type=CONFIG_OF[self.header.kind])

    def entries(self) -> Iterator[Entry]:
        """All whole lines, in order."""
        decoder = msgspec.json.Decoder(ENTRY_OF[self.header.kind])
        with self.path.open("rb") as file:
            file.readline()
            for number, line in enumerate(file, 2):
                if not line.endswith(b"\n"):
                    return
                try:
                    yield decoder.decode(line)
                except msgspec.DecodeError as error:
                    raise JournalError(f"line {number} is damaged: {error}", where=str(self.path)) from None


def open_journal(path: Path) -> Journal:
    """Read the header; JournalError says what is wrong with the file."""
    if not path.is_file():
        raise JournalError("no such journal", where=str(path), fix="give a run folder, or a file of its journal/")
    with path.open("rb") as file:
        first = file.readline()
        tail = b""
        size = file.seek(0, 2)
        file.seek(max(0, size - FLUSH_BYTES))
        tail = file.read()
    try:
        header = msgspec.json.decode(first, type=Header)
    except msgspec.DecodeError as error:
        raise JournalError(f"the first line is no journal header: {error}", where=str(path)) from None
    if header.version != VERSION:
        raise JournalError(f"journal version {header.version}; this doorbuster reads {VERSION}", where=str(path))
    torn = 0 if tail.endswith(b"\n") else len(tail) - (tail.rfind(b"\n") + 1)
    return Journal(path, header, torn)

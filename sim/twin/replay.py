"""Equivalence 1: a journal's events through a fresh machine must bring the same actions, record by record.

With a threshold changed, the first record that differs says what it would have decided otherwise. Needs nothing but
the journal: config, hash key and every event are in it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from engine.config import GatewayConfig, LaneConfig
from engine.errors import JournalError, ScenarioError
from engine.ledger.journal import CONFIG_OF, Entry, Journal, open_journal
from engine.policy.gateway import Gateway
from engine.policy.lane import Lane
from engine.policy.replica import Replica
from engine.scenario import overlay
from engine.units import S_NS


class Difference(msgspec.Struct, frozen=True):
    """The first record whose actions are not those of the journal."""

    record: int
    at_s: float
    event: Any
    journal: list[Any]
    fresh: list[Any]


class Replayed(msgspec.Struct, frozen=True):
    """What ``doorbuster replay --json`` prints."""

    journal: str
    identical: bool
    events: int
    first_difference: Difference | None = None
    torn_bytes: int = 0


def replay(path: Path, sets: tuple[str, ...] = ()) -> Replayed:
    """Feed the journal to a machine made from its own config, with ``sets`` (``section.key=value``) laid over it."""
    journal = open_journal(path)
    machine = _machine(journal, sets)
    events = 0
    for entry in journal.entries():
        try:
            fresh = machine.handle(entry.at_ns, entry.event)  # type: ignore[arg-type]
        except (AssertionError, KeyError) as error:
            # with other settings the journal's later events may make no sense any more
            return _differs(journal, events, entry, [f"the machine cannot go on: {type(error).__name__}: {error}"])
        events += 1
        if fresh != entry.actions:
            return _differs(journal, events - 1, entry, [msgspec.to_builtins(a) for a in fresh])
    return Replayed(str(path), True, events, torn_bytes=journal.torn_bytes)


def _differs(journal: Journal, record: int, entry: Entry, fresh: list[Any]) -> Replayed:
    said = [msgspec.to_builtins(action) for action in entry.actions]
    event = msgspec.to_builtins(entry.event)
    difference = Difference(record, entry.at_ns / S_NS, event, said, fresh)
    return Replayed(str(journal.path), False, record, difference, journal.torn_bytes)


def _machine(journal: Journal, sets: tuple[str, ...]) -> Gateway | Replica | Lane:
    tree = msgspec.json.decode(journal.header.config)
    for item in sets:
        overlay(tree, item)
    try:
        config = msgspec.convert(tree, CONFIG_OF[journal.header.kind], strict=False)
    except msgspec.ValidationError as error:
        raise ScenarioError(f"cannot set that in this {journal.header.kind} journal: {error}", where="--set") from None
    if isinstance(config, LaneConfig):
        return Lane(config)
    return Gateway(config) if isinstance(config, GatewayConfig) else Replica(config)


def replay_all(path: Path, sets: tuple[str, ...] = ()) -> list[Replayed]:
    """A journal, or all of a run folder: there each of ``sets`` goes to the journals whose config has its section."""
    journals = journals_of(path)
    if path.is_file():
        return [replay(path, sets)]
    trees = {journal: msgspec.json.decode(open_journal(journal).header.config) for journal in journals}
    known = sorted({section for tree in trees.values() for section in tree})
    for item in sets:
        if _section(item) not in known:
            raise ScenarioError(
                f"no journal here was made with a section {_section(item)!r}", where="--set",
                why=f"their sections: {', '.join(known)}", fix="a workload is replayed as it was: doorbuster sim",
            )
    return [replay(journal, tuple(i for i in sets if _section(i) in tree)) for journal, tree in trees.items()]


def _section(item: str) -> str:
    return overlay({}, item).partition(".")[0]  # complains of what sets nothing


def journals_of(path: Path) -> list[Path]:
    """A journal file, or all journals of a run folder; a demo's twin comes last."""
    if path.is_file():
        return [path]
    found = [*sorted(path.glob("journal/*.ndjson")), *sorted(path.glob("twin/journal/*.ndjson"))]
    if not found:
        why = "there is no such file or folder" if not path.exists() else "it has no journal/*.ndjson"
        raise JournalError("no journal here", str(path), why, "give a run folder, or a file of its journal/")
    return found

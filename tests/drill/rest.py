"""What a replica's journal says of its last moment."""

from __future__ import annotations

from pathlib import Path

from engine.config import ReplicaConfig
from engine.ledger.journal import open_journal
from engine.policy.replica import Replica


def at_rest(journal: Path) -> bool:
    """Once more through its machine: nobody is left, and only pins hold blocks."""
    opened = open_journal(journal)
    config = opened.config()
    assert isinstance(config, ReplicaConfig)
    machine = Replica(config)
    for entry in opened.entries():
        machine.handle(entry.at_ns, entry.event)  # type: ignore[arg-type]
    machine.check()
    stats = machine.stats()
    return (stats.running, stats.waiting, stats.prefix.used) == (0, 0, stats.prefix.pinned)

"""The breakers of one gateway under the names that the ledger knows them by, and what became of their states."""

from __future__ import annotations

from collections.abc import Iterator

from engine.events import BreakerRecord, Record
from engine.policy.breaker import Breaker


class Boundaries:
    """The encoder's and each replica's."""

    def __init__(self, encoder: Breaker, replicas: list[Breaker]) -> None:
        self._breakers = {"encoder": encoder} | {f"replica-{n}": breaker for n, breaker in enumerate(replicas)}

    def moved(self) -> Iterator[Record]:
        """A record for each change of state since the last call."""
        for name, breaker in self._breakers.items():
            for moved in breaker.transitions():
                yield Record(BreakerRecord(moved.at_ns, name, moved.before, moved.after, moved.why))

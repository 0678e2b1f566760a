"""Which rows something happens to at which step: found by step index, never by looking at all that run.

A row is entered for one step and taken out when it leaves, so no entry is ever stale and none has to be skipped.
"""

from __future__ import annotations

from engine.policy.sequence import Sequence


class Calendar:
    """Step index -> rows, in the order in which they were entered. Each operation is O(1) a row."""

    def __init__(self) -> None:
        self._rows: dict[int, dict[int, Sequence]] = {}

    def enter(self, step: int, rows: list[Sequence]) -> None:
        """Something happens to these at that step."""
        if rows:
            self._rows.setdefault(step, {}).update({seq.ask.sid: seq for seq in rows})

    def strike(self, step: int, seq: Sequence) -> None:
        """It does not; one that was taken already is a no-op."""
        rows = self._rows.get(step)
        if rows is not None and rows.pop(seq.ask.sid, None) is not None and not rows:
            del self._rows[step]

    def take(self, step: int) -> list[Sequence]:
        """Those of that step, no longer entered."""
        rows = self._rows.pop(step, None)
        return [] if rows is None else [*rows.values()]

    def __contains__(self, step: int) -> bool:
        return step in self._rows

    def entries(self) -> dict[int, int]:
        """sid -> step, of all."""
        return {sid: step for step, rows in self._rows.items() for sid in rows}

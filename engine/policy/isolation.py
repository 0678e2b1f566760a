"""Which sequence makes a step raise: found by halves, so that its neighbours live on.

A step that raised says that somebody in it is guilty, not who. Its sequences are halved, each half is tried in a step
of its own, and a half that raises is halved again; what raises alone is guilty. A step that raised once and never again
costs two good steps and nobody's answer. One culprit among n takes at most 2 * ceil(log2 n) trials, and hardware on
which every step raises has failed all of them after 2n - 1 steps. Method: bisection, as in group testing.
"""

from __future__ import annotations

from collections.abc import Container, Iterable


class Isolation:
    """Owned by one Batcher. Knows sequences by their sids."""

    def __init__(self) -> None:
        self._groups: list[list[int]] = []  # under suspicion; the next one to be tried comes last

    @property
    def active(self) -> bool:
        """Somebody is under suspicion: a step holds one group and nobody else."""
        return bool(self._groups)

    def raised(self, ran: list[int], alone: bool = True) -> int | None:
        """A step with these raised. The guilty one, where that is certain; else their halves are to be tried.

        ``alone`` False: others were in the step whose turn comes again later, so even a single one is not yet guilty.
        """
        self._tried(ran)
        if len(ran) == 1 and alone:
            return ran[0]
        middle = (len(ran) + 1) // 2
        self._groups += [half for half in (ran[middle:], ran[:middle]) if half]
        return None

    def passed(self, ran: list[int]) -> None:
        """A step with these went well: they are cleared."""
        self._tried(ran)

    def trial(self, running: Container[int]) -> list[int]:
        """Who is in the next step, and nobody else; empty when anybody may be."""
        while self._groups:
            self._groups[-1] = [sid for sid in self._groups[-1] if sid in running]
            if self._groups[-1]:
                return self._groups[-1]
            self._groups.pop()
        return []

    def _tried(self, ran: Iterable[int]) -> None:
        """Whoever was in the step is no longer in the group that waited for it."""
        if self._groups:
            tried = set(ran)
            self._groups[-1] = [sid for sid in self._groups[-1] if sid not in tried]
            if not self._groups[-1]:
                self._groups.pop()

    def check(self) -> None:
        """Invariants."""
        sids = [sid for group in self._groups for sid in group]
        assert len(set(sids)) == len(sids), "isolation: nobody is in two groups"
        assert all(self._groups), "isolation: no group is empty"

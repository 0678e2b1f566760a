"""Until when each request on its way is waited for: its whole answer, and a replica that is to come back.

Knows numbers and instants; what follows when one has passed is the gateway's to say.
"""

from __future__ import annotations

from heapq import heappop, heappush


class Patience:
    """Owned by one Gateway. At one instant the lower number comes first."""

    def __init__(self) -> None:
        self._until_ns: list[tuple[int, int, bool]] = []  # heap of (instant, rid, stranded); some no longer count
        self._open: dict[int, None] = {}
        self._stranded: dict[int, int] = {}  # rid -> until when it waits for a replica, in order of waiting

    def begin(self, rid: int, until_ns: int) -> None:
        """A request has come; its answer is due by then."""
        self._open[rid] = None
        heappush(self._until_ns, (until_ns, rid, False))

    def end(self, rid: int) -> None:
        """It is through."""
        del self._open[rid]
        self._stranded.pop(rid, None)

    def strand(self, rid: int, until_ns: int) -> None:
        """It can go on only when a replica is back, and has time for that until then."""
        self._stranded[rid] = until_ns
        heappush(self._until_ns, (until_ns, rid, True))

    def rescue(self) -> list[int]:
        """A replica is back: those that have waited for it, longest first. They no longer do."""
        rids = list(self._stranded)
        self._stranded.clear()
        return rids

    def pop_due(self, now_ns: int) -> tuple[int, bool] | None:
        """One whose time is up: its number, and whether it was only a replica that it could no longer wait for."""
        self._tidy()
        if not self._until_ns or self._until_ns[0][0] > now_ns:
            return None
        _, rid, stranded = heappop(self._until_ns)
        if stranded:
            del self._stranded[rid]
        return rid, stranded

    def next_ns(self) -> int | None:
        """When the next one's time is up."""
        self._tidy()
        return self._until_ns[0][0] if self._until_ns else None

    def _tidy(self) -> None:
        """The first entry counts."""
        while self._until_ns:
            until_ns, rid, stranded = self._until_ns[0]
            if self._stranded.get(rid) == until_ns if stranded else rid in self._open:
                return
            heappop(self._until_ns)

    def check(self) -> None:
        """Invariants."""
        entries = set(self._until_ns)
        assert self._stranded.keys() <= self._open.keys(), "stranded: only requests on their way"
        assert all((ns, rid, True) in entries for rid, ns in self._stranded.items()), "stranded: each has its end"

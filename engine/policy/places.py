"""How many requests an upstream is given at a time: a window, part of it for critical work, less when it says no.

All but critical work may have the window without its reserve. An upstream that refuses (429, 503) is shared, or smaller
than the window says: from then on they may have as many places as it did not refuse, and one more after each round of
good answers. Critical work may always have the whole window; a promise made for it is made up to there. A refusal also
stops everything for a moment, longer each time in a row, or as long as the upstream says, or until an answer shows that
a place has come free. Method: AIMD on refusals alone, since a latency says how long an answer is; the decrease is not a
factor but what was seen to fit.
"""

from __future__ import annotations

from engine.units import MS_NS, S_NS

PAUSE_NS, PAUSE_MAX_NS = 100 * MS_NS, 5 * S_NS
DOUBLINGS = 6


class Places:
    """Owned by a Lane. ``limit``: what all but critical work may have now."""

    def __init__(self, window: int, reserved: int) -> None:
        assert 0 <= reserved < window, "places: some are left for the others"
        self.window, self._most = window, window - reserved
        self.limit = self._most
        self.running = self.others = 0
        self.resume_ns: int | None = None  # nobody is sent before
        self._row = 0  # refusals without a good answer between them
        self._good = 0  # answers since the limit grew

    def free(self, now_ns: int, priority: int) -> bool:
        """Whether one more of this priority may be sent."""
        if self.resume_ns is not None and now_ns < self.resume_ns:
            return False
        return self.running < self.window and (priority == 0 or self.others < self.limit)

    def take(self, priority: int) -> None:
        """It is sent."""
        self.running += 1
        self.others += priority > 0

    def give_back(self, priority: int) -> None:
        """It is over."""
        self.running -= 1
        self.others -= priority > 0

    def refused(self, now_ns: int, retry_after_ns: int) -> None:
        """The upstream takes no more, now that the one it refused has given its place back."""
        self.limit = max(1, min(self.limit, self.others))
        self._good = 0
        pause_ns = PAUSE_NS << min(self._row, DOUBLINGS)
        self._row += 1
        self.resume_ns = now_ns + min(PAUSE_MAX_NS, max(pause_ns, retry_after_ns))

    def answered(self) -> None:
        """A good answer is complete."""
        self.resume_ns, self._row = None, 0
        self._good += 1
        if self._good >= self.limit and self.limit < self._most:
            self.limit, self._good = self.limit + 1, 0

    def check(self) -> None:
        """Invariants."""
        assert 0 <= self.others <= self.running <= self.window, "places: never more than the window"
        assert self.others <= self._most, "places: the reserve is only for critical"
        assert 1 <= self.limit <= self._most, "limit: between one and the window without its reserve"

"""When to flush: so many rows, or so long a wait, whichever is first. Pure: it is told the time and how many wait.

It does not hear of each row. A row that it finds may have come right after it last looked and found none; it counts
the window from there, so none waits longer than the window where it is asked as often as ``next_look_ns`` says.
"""

from __future__ import annotations


class MicroBatcher:
    """``look`` at each chance, ``flushed`` after each flush."""

    def __init__(self, max_rows: int, window_ns: int) -> None:
        self.max_rows, self.window_ns = max_rows, window_ns
        self._since_ns: int | None = None  # no row that waits is older

    def look(self, now_ns: int, rows: int, hurried: bool = False) -> bool:
        """Is a flush due? ``rows`` wait; ``hurried``: somebody waits for one of them to be on disk."""
        if self._since_ns is None or rows == 0:
            self._since_ns = now_ns
        return rows >= self.max_rows or (rows > 0 and (hurried or now_ns >= self._since_ns + self.window_ns))

    def flushed(self, now_ns: int, left: int) -> None:
        """All but ``left`` rows were taken at ``now_ns``. Those that are left keep their age."""
        if left == 0:
            self._since_ns = now_ns

    def next_look_ns(self, now_ns: int) -> int:
        """Look again no later than this, or when ``max_rows`` wait."""
        return (now_ns if self._since_ns is None else self._since_ns) + self.window_ns

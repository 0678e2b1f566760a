"""A clock that a test moves, in the shapes in which libraries read theirs."""

from __future__ import annotations

from datetime import datetime, timedelta, tzinfo

from engine.units import S_NS, US_NS


class Clock:
    """``now_ns`` belongs to the test."""

    def __init__(self) -> None:
        self.now_ns = 0

    def s(self) -> float:
        """Seconds."""
        return self.now_ns / S_NS

    def date(self, zone: tzinfo | None = None) -> datetime:
        """To the microsecond."""
        return datetime(2026, 1, 1, tzinfo=zone) + timedelta(microseconds=self.now_ns // US_NS)

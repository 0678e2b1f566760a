"""One timer for one machine: rings at the moment that it named last, on the running asyncio loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from engine.units import S_NS


class Alarm:
    """Owned by a driver, which sets it after every event."""

    def __init__(self, clock_ns: Callable[[], int], ring: Callable[[int], None]) -> None:
        """``ring`` is told the moment that was named: a timer that fires a hair early is on time."""
        self._clock_ns, self._ring = clock_ns, ring
        self._timer: asyncio.TimerHandle | None = None
        self._at_ns: int | None = None

    def set(self, at_ns: int | None) -> None:
        """For this moment and no other; None: for none."""
        if at_ns == self._at_ns:
            return
        self.stop()
        if at_ns is not None:
            wait_s = max(0, at_ns - self._clock_ns()) / S_NS
            self._timer, self._at_ns = asyncio.get_running_loop().call_later(wait_s, self._fire, at_ns), at_ns

    def stop(self) -> None:
        """It does not ring."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._at_ns = None

    def _fire(self, at_ns: int) -> None:
        self._timer = self._at_ns = None
        self._ring(at_ns)

"""How many texts an encoder should take at once, so that those who ask have their vectors in time."""

from __future__ import annotations

from collections import deque

LATELY = 64  # askers whose patience counts: some batches' worth
TRIES_AFTER = 4  # full batches in a row that were quick enough: then one text more


class BatchSize:
    """Two batches in a row fit into the time of the least patient who asked lately.

    Who comes while a batch is under way waits for its rest and then for its own. Long batches take less time a text
    (MiniLM on a CPU: 5.7 ms in eight, 6.1 in four), but near saturation they make everybody late who does not have
    twice their time. The size is found by trying: no shape of the cost is assumed.
    """

    def __init__(self, most: int) -> None:
        """``most``: never more than this."""
        self._most = self._now = most
        self._quick = 0
        self._patience_ns: deque[int] = deque(maxlen=LATELY)

    def asked(self, within_ns: int) -> None:
        """Somebody wants a vector within this time, from when it was asked."""
        self._patience_ns.append(within_ns)

    def took(self, texts: int, ns: int) -> None:
        """A batch is done. One that was too long shortens the next; one that was not full says nothing for more."""
        if not self._patience_ns:
            return
        if 2 * ns > min(self._patience_ns):
            self._now, self._quick = max(1, min(self._now, texts - 1)), 0
        elif texts >= self._now:
            self._quick += 1
            if self._quick >= TRIES_AFTER:
                self._now, self._quick = min(self._most, self._now + 1), 0

    def next(self) -> int:
        """Texts of the next batch, at most; always at least one."""
        return self._now

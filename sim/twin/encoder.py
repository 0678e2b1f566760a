"""The encoder as a server with a measured batch curve: what ``engine/service/encoder.py`` and its process do, in time.

Newest first, as many at once as live takes (``engine/model/batch_size.py``); a text in flight is encoded once; a call
past its deadline is a miss, and its vector is remembered all the same. Runs on any clock: SimPy's in the twin, a
virtual asyncio loop in a test.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from engine.model.batch_size import BatchSize
from engine.service.similar import Done
from engine.values import Section


class EncoderCost(Section):
    """A batch of n texts takes ``fixed_ns + n * text_ns``; ``wire_ns`` both ways together."""

    fixed_ns: int
    text_ns: int
    wire_ns: int = 0
    max_batch: int = 8


@dataclass(slots=True, eq=False)
class _Job:
    text_key: bytes
    vector: np.ndarray
    calls: list[Call] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Call:
    """One caller's wait; ``done`` is None once it has been told, or has left."""

    deadline_ns: int
    done: Done | None


class EncoderServer:
    """``now()`` in ns; ``later(delay_ns, call)`` runs a call later. ``vectors``: by text key; others are unfit."""

    def __init__(
        self, now: Callable[[], int], later: Callable[[int, Callable[[], None]], None], cost: EncoderCost,
        vectors: dict[bytes, np.ndarray],
    ) -> None:
        self._now, self._later, self._cost, self._vectors = now, later, cost, vectors
        self._memo: dict[bytes, np.ndarray] = {}
        self._jobs: dict[bytes, _Job] = {}
        self._queue: list[_Job] = []
        self._busy = False
        self._size = BatchSize(cost.max_batch)
        self.batches = self.texts = 0

    def encode(self, text_key: bytes, deadline_ns: int, done: Done) -> Call | None:
        """Calls ``done`` exactly once; at once when the vector is known or cannot be. The result is for ``cancel``."""
        if text_key in self._memo:
            done(self._memo[text_key], "ok")
            return None
        vector = self._vectors.get(text_key)
        if vector is None:
            done(None, "unfit")
            return None
        job = self._jobs.get(text_key)
        if job is None:
            job = self._jobs[text_key] = _Job(text_key, vector)
            self._queue.append(job)
            self._size.asked(deadline_ns - self._now())
        call = Call(deadline_ns, done)
        job.calls.append(call)
        self._later(deadline_ns - self._now(), lambda: self._late(call))
        self._turn()
        return call

    @staticmethod
    def cancel(call: Call) -> None:
        """The caller has left: ``done`` will not be called."""
        call.done = None

    def _late(self, call: Call) -> None:
        if call.done is not None:
            done, call.done = call.done, None
            done(None, "late")

    def _turn(self) -> None:
        if self._busy or not self._queue:
            return
        batch: list[_Job] = []
        most = self._size.next()
        while self._queue and len(batch) < most:
            job = self._queue.pop()  # the newest
            if any(call.done is not None for call in job.calls):
                batch.append(job)
            else:
                del self._jobs[job.text_key]  # all its callers have given up: skipped
        if not batch:
            return
        self._busy = True
        self.batches += 1
        self.texts += len(batch)
        cost_ns = self._cost.fixed_ns + len(batch) * self._cost.text_ns
        self._size.took(len(batch), cost_ns)
        self._later(cost_ns + self._cost.wire_ns, lambda: self._finish(batch))

    def _finish(self, batch: list[_Job]) -> None:
        self._busy = False
        for job in batch:
            self._memo[job.text_key] = job.vector
            del self._jobs[job.text_key]
            for call in job.calls:
                if call.done is not None:
                    done, call.done = call.done, None
                    done(job.vector, "ok")
        self._turn()

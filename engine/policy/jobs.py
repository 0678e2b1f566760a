"""What a gateway computes for nobody: a hit once more, to see whether it was right; an answer, before it is too old.

Jobs wait until it is calm, one runs at once, and the oldest is let go when there are too many: a sale must not pay for
them. Which hits are audited is drawn when they are served, so waiting does not choose among them; what is dropped is
counted.
"""

from __future__ import annotations

from collections import deque
from typing import Literal

from engine.events import Arrive, Tier
from engine.policy.rules import Key
from engine.values import Struct

WAITING = 256  # jobs that wait for a calm moment
AT_ONCE = 1  # a second one would hold up the next request that comes


class Job(Struct):
    """``audit``: the answer that ``ask`` got is compared with the one that it should have got."""

    kind: Literal["audit", "refresh"]
    ask: Arrive
    key: Key | None = None  # audit: of the entry that served
    answer_id: str = ""  # audit: what it served
    source: str = ""
    tier: Tier = "semantic"
    cosine_millionths: int = 0
    since: int = 0  # audit: what was called off before the hit has no bearing on it


class JobStats(Struct):
    """``offered`` = done + dropped + waiting + open."""

    offered: int
    done: int
    dropped: int
    waiting: int
    open: int


class Jobs:
    """Owned by one gateway."""

    def __init__(self) -> None:
        self._waiting: deque[Job] = deque()
        self._refreshed: dict[bytes, None] = {}  # exact keys of refreshes that wait or run
        self._open = self._offered = self._done = self._dropped = 0

    @property
    def waits(self) -> bool:
        """Is there one to be begun?"""
        return bool(self._waiting)

    def renews(self, key: bytes) -> bool:
        """Is this answer on its way to be renewed?"""
        return key in self._refreshed

    def offer(self, job: Job) -> Job | None:
        """One more; what is dropped for it, if anything."""
        self._offered += 1
        self._waiting.append(job)
        if job.kind == "refresh":
            self._refreshed[job.ask.exact_key] = None
        return self._drop(self._waiting.popleft()) if len(self._waiting) > WAITING else None

    def next(self) -> Job | None:
        """The one that may run now, if any."""
        return self._waiting[0] if self._waiting and self._open < AT_ONCE else None

    def take(self) -> None:
        """What ``next`` gave runs."""
        self._waiting.popleft()
        self._open += 1

    def end(self, job: Job, done: bool) -> None:
        """What ``take`` gave is over."""
        self._open -= 1
        if done:
            self._done += 1
            self._forget(job)
        else:
            self._drop(job)

    def clear(self) -> list[Job]:
        """Nothing more is begun: those that waited."""
        gone = [self._drop(job) for job in self._waiting]
        self._waiting.clear()
        return gone

    def _drop(self, job: Job) -> Job:
        self._dropped += 1
        self._forget(job)
        return job

    def _forget(self, job: Job) -> None:
        if job.kind == "refresh":
            self._refreshed.pop(job.ask.exact_key, None)

    def stats(self) -> JobStats:
        """A snapshot."""
        return JobStats(self._offered, self._done, self._dropped, len(self._waiting), self._open)

    def check(self) -> None:
        """Invariants."""
        s = self.stats()
        assert s.offered == s.done + s.dropped + s.waiting + s.open, "jobs: each has one end"
        assert s.waiting <= WAITING and 0 <= s.open <= AT_ONCE, "jobs: bounded"
        assert len(self._refreshed) <= s.waiting + s.open, "refreshes: of jobs that wait or run"

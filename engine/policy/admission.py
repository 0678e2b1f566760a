"""Under overload, which share of the work still reaches the model: all critical, then standard, then sheddable work.

One number, from 2 (everything) over 1 (no sheddable work) to 0 (critical work alone), as DAGOR's compound level is one
number (Zhou et al. 2018). It is cut when somebody who was let in since the last cut has waited for too large a part of
what the class is promised: so each cut is judged by those whom it let in, and none is made twice for one queue, but
for one so old that it would be late. It is cut to what the model has lately begun of what was lately sent to it, and
by ``cut_share`` at least. It grows while nobody waits long. All or nothing instead would let a queue run empty and
then flood it, some times in ten seconds (measured in ``README.md``).

Who is let in is not chance but a lot that sticks to a user for some minutes: a conversation that was begun goes on,
and the next sale's unlucky ones are others. Knows no queue lengths.
"""

from __future__ import annotations

from engine.config import ClassConfig, OverloadConfig
from engine.events import PRIORITY, Arrive
from engine.units import S_NS, ms_to_ns

ALL = 2_000_000  # millionths; the upper million is sheddable work's
STANDARD = 1_000_000
LEAST = 5_000  # that the share grows in a calm window
DOUBLINGS = 5  # of that, while nobody waits at all: from nothing to everything in three seconds
URGENT = 2  # times the part that calls for a cut: it is cut again though those who wait were let in before
AGAIN_WINDOWS = 4
URGENT_CUT = 0.8
FORGET = 8  # of what was sent and begun, an eighth is forgotten with every window
FEW = 8  # requests: too few to tell what the model has time for
LONG_AGO_NS = -(1 << 62)
LONG_AGO = 64  # windows: nothing is left of what was noted
NOTED = 1 << 16  # one request, in the counts that are forgotten bit by bit
LOT_NS = 300 * S_NS  # a named user's lot holds so long
SPREAD = 0x9E3779B97F4A7C15  # Knuth's multiplicative hashing: 2**64 over the golden ratio
SHEDDABLE_LEVEL, STANDARD_LEVEL, EMERGENCY_LEVEL = 2, 3, 4


class Admission:
    """The share, moved by observations."""

    def __init__(self, config: OverloadConfig, classes: dict[str, ClassConfig]) -> None:
        self.share = ALL
        self._config = config
        self._enabled = config.enabled and config.graded
        self._window_ns = config.window_ns
        self._slos = {name: (cls.priority, ms_to_ns(cls.slo_ttft_ms)) for name, cls in classes.items()}
        # who was sent before a cut is no evidence against the share of now. Sheddable work waits behind all other, so a
        # cut of it alone does nothing for those, and their waiting still counts
        self._cut_ns = self._weak_cut_ns = LONG_AGO_NS
        self._window_from_ns: int | None = None
        self._loudest = 0.0  # share of a promise, in this window, whoever waited
        self._waited = False
        self._sent = {PRIORITY[each]: 0 for each in PRIORITY}  # lately, to the model
        self._started = 0  # lately, by it
        self._idle = 0  # windows in a row in which nobody waited

    def sent(self, priority: int) -> None:
        """One more was let in and goes to the model."""
        self._sent[priority] += NOTED

    def started(self) -> None:
        """The model has begun to answer one."""
        self._started += NOTED

    def observe(self, now_ns: int, oldest_ns: dict[str, int], predicted_ns: dict[str, int] | None = None) -> None:
        """``oldest_ns``: when the oldest waiting request of each class was sent; ``predicted_ns``: see ``Overload``."""
        if not self._enabled:
            return
        if self._window_from_ns is None:
            self._window_from_ns = now_ns
        firm = weak = oldest = 0.0  # of standard and critical classes, of sheddable ones; and of whoever waits longest
        for name, sent_ns in oldest_ns.items():
            if name not in self._slos:
                continue
            priority, slo_ns = self._slos[name]
            part = max(0, now_ns - sent_ns, (predicted_ns or {}).get(name, 0)) / slo_ns
            self._waited = True
            if priority == PRIORITY["sheddable"]:
                if sent_ns >= self._weak_cut_ns:
                    weak = max(weak, part)
                continue
            oldest = max(oldest, part)
            if sent_ns >= self._cut_ns:
                firm = max(firm, part)
        self._loudest = max(self._loudest, oldest)
        urgent = oldest >= URGENT * self._config.shed_share
        if urgent and self.share <= STANDARD and now_ns - self._cut_ns >= AGAIN_WINDOWS * self._window_ns:
            self._cut(now_ns, round(self.share * URGENT_CUT))  # what waits already will be late unless it runs empty
        elif firm >= self._config.shed_share:
            self._cut(now_ns, min(STANDARD, round(min(self.share, STANDARD) * self._sustainable())))
        elif weak >= self._config.degraded_share and self.share > STANDARD:
            self._weaken(now_ns, STANDARD + (self.share - STANDARD) // 2)
        elif now_ns - self._window_from_ns >= self._window_ns:
            self._close(now_ns)

    def _cut(self, now_ns: int, share: int) -> None:
        self._cut_ns = now_ns
        self._weaken(now_ns, share)

    def _weaken(self, now_ns: int, share: int) -> None:
        self.share, self._weak_cut_ns, self._idle = share, now_ns, 0
        self._begin(now_ns)

    def _sustainable(self) -> float:
        """Of the standard work that was let in lately, the share that the model has had time for."""
        standard, critical = self._sent[PRIORITY["standard"]], self._sent[PRIORITY["critical"]]
        least = 1.0 if self.share > STANDARD else 1 - self._config.cut_share  # sheddable work alone may do
        if standard < FEW * NOTED:
            return least
        return min(least, max(0, self._started - critical) / standard)

    def _close(self, now_ns: int) -> None:
        """The end of a window without a cut."""
        self._idle = 0 if self._waited else self._idle + 1
        if self._loudest < self._config.brownout_share:
            grown = max(round(self.share * self._config.grow_share), LEAST) << min(self._idle, DOUBLINGS)
            self.share = min(ALL, self.share + grown)
        self._begin(now_ns)

    def _begin(self, now_ns: int) -> None:
        assert self._window_from_ns is not None
        for _ in range(min((now_ns - self._window_from_ns) // self._window_ns, LONG_AGO)):
            self._started -= self._started // FORGET
            for priority, noted in self._sent.items():
                self._sent[priority] = noted - noted // FORGET
        self._window_from_ns, self._loudest, self._waited = now_ns, 0.0, False

    def admits(self, ask: Arrive, priority: int, now_ns: int) -> bool:
        """Whether its lot lies within the share; critical work always."""
        if not priority or self.share >= ALL:
            return True
        spare = self.share - STANDARD if priority == PRIORITY["sheddable"] else self.share
        return lot(ask, now_ns) < spare

    @property
    def level(self) -> int:
        """The overload level that such a share amounts to."""
        if self.share >= ALL:
            return 0
        if self.share >= STANDARD:
            return SHEDDABLE_LEVEL
        return STANDARD_LEVEL if self.share > self._config.emergency_share * STANDARD else EMERGENCY_LEVEL

    def check(self) -> None:
        """Invariants."""
        assert 0 <= self.share <= ALL, "the share lies between nothing and all"
        assert self._enabled or self.share == ALL, "a controller that is off lets everybody in"


def lot(ask: Arrive, now_ns: int) -> int:
    """Uniform in [0, 1,000,000): the same for a named user for some minutes, else a request's own."""
    seed = ask.draw
    if ask.asker:
        seed = int.from_bytes(ask.asker[:8], "big") + now_ns // LOT_NS
    return ((seed * SPREAD & (1 << 64) - 1) >> 32) * STANDARD >> 32

"""Overload level 0 normal, 1 brown-out, 2 degraded, 3 shed, 4 emergency: by how long the oldest of a class has waited.

A class's age is measured against its own TTFT SLO. Waiting alone calls for level 1; the higher ones say which share of
the work ``admission.py`` lets in. Up at once; down when a level was not called for during ``hold_ms``.
Second tries beyond their budget go first (``retries.py``). Knows neither queue lengths nor service rates.
Signal: head-of-line delay as in CoDel and DAGOR; hysteresis as in Breakwater. The study behind it is in ``README.md``.
"""

from __future__ import annotations

from engine.config import ClassConfig, OverloadConfig, RetryConfig
from engine.events import PRIORITY, Arrive
from engine.policy.admission import Admission
from engine.policy.retries import RetryBudget, RetryStats
from engine.units import S_NS, ms_to_ns
from engine.values import Struct

LEVELS = 5
CALM = 0, "", 0
LONG_AGO_NS = -(1 << 62)
BROWNOUT, SHED = 1, 3
SHEDDABLE_HIGHEST = 2  # waiting sheddable work must never get standard work shed: lowest first


class LevelChange(Struct):
    """The level from ``at_ns`` on, and the waiting that decided it (no class: nothing waits)."""

    at_ns: int
    level: int
    traffic_class: str
    age_ns: int


class OverloadStats(Struct):
    """``level_ns[i]`` is the time spent at level i, up to the last observation."""

    level: int
    rises: int
    falls: int
    level_ns: tuple[int, ...]
    share_millionths: int = 2_000_000  # of the work that is let in: the upper million is sheddable work's
    retries: RetryStats = RetryStats()


class Overload:
    """The level: the highest that was called for within the last ``hold_ms``, by any observation."""

    def __init__(
        self, config: OverloadConfig, classes: dict[str, ClassConfig], retry: RetryConfig | None = None
    ) -> None:
        self.level = 0
        self.admission, self._retries = Admission(config, classes), RetryBudget(retry or RetryConfig())
        self._graded = config.graded
        self._enabled = config.enabled
        self._window_ns, self._hold_ns = config.window_ns, config.hold_ns
        shares = (config.brownout_share, config.degraded_share, config.shed_share)
        self._rules = [  # in the order of the configuration: the first class of the highest level is the one named
            (
                name,
                tuple(round(share * ms_to_ns(cls.slo_ttft_ms)) for share in shares),
                BROWNOUT if config.graded else SHEDDABLE_HIGHEST if cls.priority == PRIORITY["sheddable"] else SHED,
            )
            for name, cls in classes.items()
        ]
        self._now_ns: int | None = None
        self._called_ns = [LONG_AGO_NS] * LEVELS  # when each level, or a higher one, was called for last
        self._waits = False
        self._rises = self._falls = 0
        self._level_ns = [0] * LEVELS

    def observe(
        self, now_ns: int, oldest_ns: dict[str, int], predicted_ns: dict[str, int] | None = None
    ) -> LevelChange | None:
        """``oldest_ns``: when the oldest waiting request of each class was sent. The change, if the level moved.

        ``predicted_ns``: how long the next one of a class would wait; it counts where longer, if somebody waits at all.
        """
        if self._now_ns is None:
            self._now_ns = now_ns
        now_ns = max(now_ns, self._now_ns)
        self._level_ns[self.level] += now_ns - self._now_ns
        self._now_ns = now_ns
        if not self._enabled:
            return None
        before = self.level
        raw, traffic_class, age_ns = self._raw(now_ns, oldest_ns, predicted_ns or {}) if oldest_ns else CALM
        self.admission.observe(now_ns, oldest_ns, predicted_ns)
        raw = max(raw, self.admission.level)
        self._waits = bool(traffic_class)
        if not raw and not before:  # as nearly always
            return None
        for level in range(1, raw + 1):
            self._called_ns[level] = now_ns
        self.level = sum(now_ns - called_ns < self._hold_ns for called_ns in self._called_ns[1:])
        if self.level == before:
            return None
        if self.level > before:
            self._rises += 1
        else:
            self._falls += 1
        return LevelChange(now_ns, self.level, traffic_class, age_ns)

    def arrived(self, ask: Arrive) -> None:
        """Somebody asks, for the first time or again."""
        self._retries.arrived(ask.tenant, ask.attempt)

    def sheds(self, ask: Arrive, priority: int, now_ns: int, drawn: bool = False) -> bool:
        """Whether it is kept from the model: second tries beyond the budget first, then whom the share leaves out.

        Not graded, level 2 keeps out all sheddable work and level 3 all standard work. Critical work never is.
        """
        if not priority or not self.level:
            return False
        out = not self.admission.admits(ask, priority, now_ns) if self._graded else self.level >= SHED + 1 - priority
        return out or bool(ask.attempt and not drawn and not self._retries.take(ask.tenant))

    def calm_ns(self) -> int:
        """Until the level can have fallen, if nothing calls for it any more: an honest Retry-After."""
        now_ns = self._now_ns or 0
        called_ns = self._called_ns[self.level] if self.level else now_ns
        return max(S_NS, called_ns + self._hold_ns - now_ns)

    def next_wake_ns(self) -> int | None:
        """The next end of a window (they lie on a grid), while there is something to watch."""
        if self._now_ns is None or not (self.level or self._waits):
            return None
        return (self._now_ns // self._window_ns + 1) * self._window_ns

    def stats(self) -> OverloadStats:
        """The level now, how often it moved, and how long it stayed."""
        return OverloadStats(
            self.level, self._rises, self._falls, tuple(self._level_ns), self.admission.share, self._retries.stats()
        )

    def check(self) -> None:
        """Invariants."""
        self.admission.check()
        self._retries.check()
        assert 0 <= self.level < LEVELS, "the level is one of five"
        assert self._enabled or self.level == 0, "a controller that is off stays at level 0"
        assert sorted(self._called_ns[1:], reverse=True) == self._called_ns[1:], "a call is one for lower levels too"
        assert not self._enabled or self.level >= self.admission.level, "the level never lags behind the share"

    def _raw(self, now_ns: int, oldest_ns: dict[str, int], predicted_ns: dict[str, int]) -> tuple[int, str, int]:
        """Level that the ages alone call for, and who calls."""
        raw, traffic_class, age_ns = -1, "", 0
        for name, thresholds_ns, highest in self._rules:
            if (sent_ns := oldest_ns.get(name)) is None:
                continue
            waited_ns = max(0, now_ns - sent_ns, predicted_ns.get(name, 0))
            level = min(highest, sum(waited_ns >= threshold_ns for threshold_ns in thresholds_ns))
            if level > raw:
                raw, traffic_class, age_ns = level, name, waited_ns
        return max(raw, 0), traffic_class, age_ns

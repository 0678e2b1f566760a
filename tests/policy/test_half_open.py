"""A thousand callers at a breaker that is half open, as the whole gateway machine meets them: N probes, never N + 1.

``test_breaker.py`` shows it of the breaker alone; here the way to it counts too: ``Arrive`` events in, ``Submit`` or
``FindSimilar`` out, round a replica and round the encoder. 1,000 requests of one instant, none like another.

Mutations it caught: N + 1 probes; all are let through; a client that leaves keeps its probe's permit (round a replica,
round the encoder); a cancelled probe counts as failed; a lost probe is never given up.
"""

from __future__ import annotations

from collections import Counter

import pytest

from engine.config import (
    BreakerConfig,
    ClassConfig,
    GatewayConfig,
    LimiterConfig,
    OverloadConfig,
    SemanticConfig,
    TenantConfig,
)
from engine.events import (
    Abort,
    Arrive,
    Cancel,
    Ended,
    FindSimilar,
    GatewayAction,
    GatewayEvent,
    Reject,
    Similar,
    Submit,
    Wake,
)
from engine.policy.breaker import BreakerStats
from engine.policy.gateway import Gateway
from engine.units import MS_NS, S_NS

CALLERS, PERMITS = 1_000, 4
BREAKER = BreakerConfig(
    window="count", window_size=10, minimum_calls=10, failure_share=0.5, slow_share=0.5, slow_ms=0, open_ms=1_000,
    open_jitter=0.0, half_open_permits=PERMITS, half_open_max_ms=3_000,
)


class Door:
    """One gateway; ``boundary`` says which of its breakers has been tripped by ten failures and has rested since."""

    def __init__(self, boundary: str) -> None:
        semantic = boundary == "encoder"
        cls = ClassConfig(criticality="standard", caches="semantic" if semantic else "none", timeout_ms=60_000)
        self.machine = Gateway(
            GatewayConfig(
                classes={"chat": cls}, tenants={"shop": TenantConfig()}, limiter=LimiterConfig(enabled=False),
                semantic=SemanticConfig(enabled=semantic), overload=OverloadConfig(enabled=False),
                breaker=BREAKER, encoder_breaker=BREAKER,
            )
        )
        self.boundary, self.now_ns, self.rids = boundary, 0, 0
        self.sid_of: dict[int, int] = {}
        for rid in self.asked(self.crowd(10)):
            self.tell(self.end(rid, good=False))
        assert self.breaker.state == "open"
        assert not self.asked(self.crowd(10)), "open: nobody asks"
        self.now_ns += S_NS

    @property
    def breaker(self) -> BreakerStats:
        stats = self.machine.stats()
        return stats.encoder if self.boundary == "encoder" else stats.fleet.breakers[0]

    def tell(self, *events: GatewayEvent) -> list[GatewayAction]:
        actions = [action for event in events for action in self.machine.handle(self.now_ns, event)]
        self.sid_of |= {a.rid: a.sid for a in actions if isinstance(a, Submit)}
        self.machine.check()
        return actions

    def crowd(self, count: int) -> list[GatewayAction]:
        """All in this very instant; what the machine does about it."""
        rids = range(self.rids, self.rids + count)
        self.rids += count
        keys = [b"%d" % rid for rid in rids]
        return self.tell(
            *(Arrive(rid, f"r{rid}", "shop", "chat", self.now_ns, 5, 4, exact_key=key, hard_key=b"h", text_key=key)
              for rid, key in zip(rids, keys, strict=True))
        )

    def asked(self, actions: list[GatewayAction]) -> list[int]:
        """Who was let through to the boundary."""
        kind = FindSimilar if self.boundary == "encoder" else Submit
        return [a.rid for a in actions if isinstance(a, kind)]

    def end(self, rid: int, good: bool) -> GatewayEvent:
        """What the boundary answers to a call."""
        if self.boundary == "encoder":
            return Similar(rid, status="ok" if good else "failed")
        return Ended(self.sid_of[rid], "stop" if good else "failed")


@pytest.fixture(params=["replica", "encoder"])
def door(request: pytest.FixtureRequest) -> Door:
    return Door(request.param)


def test_exactly_n_of_a_thousand_are_probes(door: Door) -> None:
    actions = door.crowd(CALLERS)
    assert len(door.asked(actions)) == PERMITS
    assert door.breaker.state == "half_open" and door.breaker.probes == PERMITS
    kinds = Counter(type(a) for a in actions)
    if door.boundary == "encoder":  # a miss: all others are computed
        assert kinds[Submit] == CALLERS - PERMITS and not kinds[Reject]
    else:  # an open breaker is explicit, and says when to come again
        refused = [a for a in actions if isinstance(a, Reject)]
        assert len(refused) == CALLERS - PERMITS
        assert all(a.code == "breaker_open" and a.retry_after_ns == 3 * S_NS for a in refused)


def test_a_cancelled_probe_frees_its_permit_and_no_more(door: Door) -> None:
    first, *rest = door.asked(door.crowd(CALLERS))
    left = door.tell(Cancel(first))
    assert door.breaker.state == "half_open", "a client that leaves says nothing of the boundary"
    [next_one] = door.asked(door.crowd(CALLERS))
    if door.boundary == "replica":
        [abort] = [a for a in left if isinstance(a, Abort)]
        door.tell(Ended(abort.sid, "aborted"))  # the replica has heard: its permit was back already
    else:
        door.tell(Similar(first))  # the encoder answers all the same
    assert not door.asked(door.crowd(CALLERS)), "once is once"
    for rid in (*rest, next_one):
        assert door.breaker.state == "half_open"
        door.tell(door.end(rid, good=True))
    assert door.breaker.state == "closed"
    assert len(door.asked(door.crowd(CALLERS))) == CALLERS


def test_a_thousand_cancelled_probes_one_after_the_other_never_get_it_stuck(door: Door) -> None:
    for _ in range(CALLERS // PERMITS):
        probes = door.asked(door.crowd(PERMITS + 1))
        assert len(probes) == PERMITS
        for rid in probes:
            door.tell(Cancel(rid))
    probes = door.asked(door.crowd(CALLERS))
    assert len(probes) == PERMITS
    for rid in probes:
        door.tell(door.end(rid, good=True))
    assert door.breaker.state == "closed"


def test_probes_that_never_come_back_are_given_up_after_the_longest_wait(door: Door) -> None:
    assert len(door.asked(door.crowd(CALLERS))) == PERMITS
    door.now_ns += 3 * S_NS - MS_NS
    assert not door.asked(door.crowd(CALLERS)), "they still have time"
    door.now_ns += MS_NS
    door.tell(Wake())
    assert not door.asked(door.crowd(CALLERS)) and door.breaker.state == "open", "two of four have failed: open again"
    door.now_ns += 2 * S_NS  # twice as long as the first time
    assert len(door.asked(door.crowd(CALLERS))) == PERMITS

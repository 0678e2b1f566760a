"""What refused clients are told about coming back: never sooner than it makes sense, and not all at the same moment.

invariant: mutation that it caught
- jitter: none; less than whole seconds
"""

from __future__ import annotations

from engine.config import ClassConfig, GatewayConfig, LimiterConfig, RetryConfig
from engine.events import Arrive, Reject
from engine.policy.gateway import Gateway
from engine.units import S_NS


def refusals(jitter_share: float, of: int = 300, burst: float = 1.0, least_s: float = 0.0) -> list[int | None]:
    gateway = Gateway(
        GatewayConfig(
            classes={"chat": ClassConfig("standard")}, tenants={},
            retry=RetryConfig(jitter_share=jitter_share, jitter_least_s=least_s),
            limiter=LimiterConfig(rate_rps=0.1, burst=burst),
        )
    )
    said = []
    for rid in range(of):
        ask = Arrive(rid, f"r{rid}", "t", "chat", 0, 10, 10, draw=rid * 7_919_000_003)
        said += [a.retry_after_ns for a in gateway.handle(0, ask) if isinstance(a, Reject)]
    return said


def test_they_come_back_one_after_the_other() -> None:
    waits = [wait for wait in refusals(0.2) if wait is not None]
    assert len(waits) == 299 and min(waits) >= 10 * S_NS and max(waits) <= 12 * S_NS
    assert len({wait // 200_000_000 for wait in waits}) == 10, "in every tenth of the two seconds"


def test_a_short_wait_is_spread_over_whole_seconds() -> None:
    waits = [wait for wait in refusals(0.2, least_s=4.0) if wait is not None]
    assert min(waits) >= 10 * S_NS and {-(-wait // S_NS) for wait in waits} >= {11, 12, 13, 14}


def test_without_jitter_it_is_the_moment_itself() -> None:
    assert set(refusals(0.0)) == {10 * S_NS}


def test_who_can_never_pass_is_told_no_time() -> None:
    assert set(refusals(0.2, of=3, burst=0.5)) == {None}

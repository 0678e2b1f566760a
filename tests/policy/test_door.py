"""The door through a whole Gateway: limits of every level, second tries, and the share that is let in.

What each part does has tests of its own; here is shown that the gateway asks them, with what they need to know.

invariant: mutation that it caught
- user and class not passed to the limiter, on taking or on settling; every refusal called rate_limited
- arrivals not told to the retry budget; its configuration not passed; drawn twice when a replica dies
- what was sent and begun not told to the admission
"""

from __future__ import annotations

from collections.abc import Sequence

from engine.config import ClassConfig, GatewayConfig, LimiterConfig, OverloadConfig, RetryConfig
from engine.events import (
    Arrive,
    Ended,
    FirstToken,
    GatewayAction,
    Pressure,
    Reject,
    ReplicaBack,
    ReplicaLost,
    Submit,
    Waiting,
)
from engine.policy.admission import STANDARD
from engine.policy.gateway import Gateway
from engine.units import MS_NS, S_NS

CLASSES = {
    "chat": ClassConfig("standard", slo_ttft_ms=1000),
    "fraud": ClassConfig("critical", slo_ttft_ms=1000, cap_rps=1.0),
}


def gateway(limiter: LimiterConfig | None = None, **more) -> Gateway:
    return Gateway(GatewayConfig(classes=CLASSES, tenants={}, limiter=limiter or LimiterConfig(), **more))


def ask(rid: int, cls: str = "chat", user: bytes = b"", tenant: str = "t", attempt: int = 0, at_ns: int = 0) -> Arrive:
    return Arrive(rid, f"r{rid}", tenant, cls, at_ns, 100, 10, asker=user, attempt=attempt)


def code(actions: Sequence[GatewayAction]) -> str:
    [end] = [a for a in actions if isinstance(a, Reject | Submit)]
    return end.code if isinstance(end, Reject) else "sent"


def sid(actions: Sequence[GatewayAction]) -> int:
    return next(a.sid for a in actions if isinstance(a, Submit))


def busy(machine: Gateway, now_ns: int, age_ns: int, acked: int = -1) -> None:
    """The replica says that a chat has waited so long."""
    machine.handle(now_ns, Pressure(0, acked, 1, waiting=(Waiting("chat", 1, now_ns - age_ns),)))


def test_a_users_limit_is_the_users() -> None:
    machine = gateway(LimiterConfig(user_rps=0.1, user_burst_s=1.0))
    said = [code(machine.handle(0, ask(i, user=user))) for i, user in enumerate((b"ann", b"ann", b"bob", b"", b""))]
    assert said == ["sent", "rate_limited", "sent", "sent", "sent"]


def test_everybodys_limit_is_nobodys_fault() -> None:
    machine = gateway(LimiterConfig(total_rps=1.0))
    assert [code(machine.handle(0, ask(i, tenant=f"t{i}"))) for i in range(2)] == ["sent", "overloaded"]


def test_a_classs_cap_is_the_classs_and_the_tenants() -> None:
    machine = gateway(LimiterConfig(rate_rps=0.01, burst=1))
    said = [
        code(machine.handle(0, ask(i, cls, tenant=who)))
        for i, (cls, who) in enumerate((("chat", "t"), ("chat", "t"), ("fraud", "t"), ("fraud", "t"), ("fraud", "u")))
    ]
    assert said == ["sent", "rate_limited", "sent", "rate_limited", "sent"]


def test_what_a_user_did_not_use_comes_back_to_the_user() -> None:
    machine = gateway(LimiterConfig(user_tokens_per_s=0.001, token_burst_s=200_000))  # 200 tokens
    first = machine.handle(0, ask(0, user=b"ann"))
    assert code(machine.handle(0, ask(1, user=b"ann"))) == "rate_limited", "110 are reserved of 200"
    machine.handle(1, Ended(sid(first), "failed"))
    assert code(machine.handle(2, ask(2, user=b"ann"))) == "sent"


def test_second_tries_have_the_configured_budget() -> None:
    machine = gateway(retry=RetryConfig(budget_share=1.0, budget_most=2))
    busy(machine, 0, 300 * MS_NS)
    assert machine.stats().level == 1
    assert [code(machine.handle(1, ask(i, attempt=1))) for i in range(3)] == ["sent", "sent", "overloaded"]
    assert code(machine.handle(1, ask(3))) == "sent"
    assert code(machine.handle(1, ask(4, attempt=1))) == "sent", "a first try has paid in"
    assert machine.stats().overload.retries.refused == 1


def test_a_second_try_draws_once_though_its_replica_dies() -> None:
    machine = Gateway(
        GatewayConfig(classes=CLASSES, tenants={}, replicas=2, retry=RetryConfig(budget_most=1, budget_share=0.0))
    )
    busy(machine, 0, 300 * MS_NS)
    sent = machine.handle(1, ask(0, attempt=1))
    [submit] = [a for a in sent if isinstance(a, Submit)]
    machine.handle(2, ReplicaLost(submit.replica))
    assert code(machine.handle(2, Ended(submit.sid, "lost"))) == "sent", "computed elsewhere, on the same budget"
    machine.handle(3, ReplicaBack(submit.replica))


def test_the_share_follows_what_was_sent_and_what_was_begun() -> None:
    config = OverloadConfig(window_ms=1000)
    for begun in (5, 15):
        machine = gateway(overload=config)
        busy(machine, 0, 450 * MS_NS)
        assert machine.stats().overload.share_millionths == STANDARD
        sids = [sid(machine.handle(1, ask(i, at_ns=1))) for i in range(20)]
        for each in sids[:begun]:
            machine.handle(2, FirstToken(each))
        busy(machine, S_NS // 2, S_NS // 2 - 2, sids[-1])
        assert machine.stats().overload.share_millionths == STANDARD * begun // 20, "20 were sent, so many begun"

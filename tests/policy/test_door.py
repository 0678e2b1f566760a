"""The door through a whole Gateway: limits of every level, second tries, and the share that is let in.

What each part does has tests of its own; here is shown that the gateway asks them, with what they need to know.

invariant: mutation that it caught
- user and class not passed to the limiter, on taking or on settling; every refusal called rate_limited
- a user refunded who was not charged; embeddings out of an account of their own, or without their user, or unjittered
- arrivals not told to the retry budget; its configuration not passed; drawn twice when a replica dies
- what was sent and begun not told to the admission
"""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config import ClassConfig, GatewayConfig, LimiterConfig, OverloadConfig, RetryConfig
from engine.events import (
    Arrive,
    Charge,
    Charged,
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
from engine.policy.limiter import Limiter
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


def test_who_was_not_watched_gets_no_refund() -> None:
    """The table of users was full when they asked: what they did not use was never theirs to be charged for."""
    machine = gateway(LimiterConfig(user_tokens_per_s=0.001, token_burst_s=200_000, users_most=1))  # 200 tokens
    machine.handle(1, Ended(sid(machine.handle(0, ask(0, user=b"ann"))), "failed"))  # known, until somebody sweeps
    unwatched = []
    for rid in range(1, 60):
        said = machine.handle(1 + rid, ask(rid, user=b"bob"))
        if code(said) == "rate_limited":
            break
        unwatched.append(sid(said))
    watched = unwatched.pop()
    assert len(unwatched) > 5, "ann's place was bob's in the end, and 110 of his 200 are reserved"
    for each in unwatched:
        machine.handle(70, Ended(each, "failed"))
    assert code(machine.handle(71, ask(71, user=b"bob"))) == "rate_limited", "nothing of it was in his bucket"
    machine.handle(72, Ended(watched, "failed"))
    assert [code(machine.handle(73, ask(rid, user=b"bob"))) for rid in (73, 74)] == ["sent", "rate_limited"]


def charge(machine: Gateway, now_ns: int, rid: int, tokens: int = 10, tenant: str = "t", user: bytes = b"",
           draw: int = 0) -> Charged:
    [charged] = machine.handle(now_ns, Charge(rid, tenant, tokens, user, draw))
    assert isinstance(charged, Charged) and charged.rid == rid
    machine.check()
    return charged


def test_embeddings_and_requests_have_one_account() -> None:
    machine = gateway(LimiterConfig(rate_rps=0.01, burst=3))
    assert charge(machine, 0, 0).code == "" and code(machine.handle(0, ask(1))) == "sent"
    assert charge(machine, 0, 2).code == ""
    assert charge(machine, 0, 3).code == code(machine.handle(0, ask(4))) == "rate_limited"
    assert code(machine.handle(0, ask(5, "fraud"))) == "sent", "a class with a cap of its own is not crowded out"
    of_all = gateway(LimiterConfig(total_rps=1.0))
    assert code(of_all.handle(0, ask(0))) == "sent" and charge(of_all, 0, 1, tenant="u").code == "overloaded"
    of_users = gateway(LimiterConfig(user_rps=0.1, user_burst_s=10.0))
    assert code(of_users.handle(0, ask(0, user=b"ann"))) == "sent"
    assert charge(of_users, 0, 1, user=b"ann").code == "rate_limited" and charge(of_users, 0, 2).code == ""


def test_not_all_come_back_at_once_nor_too_soon() -> None:
    machine = gateway(LimiterConfig(rate_rps=1.0, burst=1), retry=RetryConfig(jitter_share=0.5))
    assert charge(machine, 0, 0) == Charged(0)
    waits = {charge(machine, 0, 1 + draw, draw=draw).retry_after_ns for draw in range(0, 4000, 400)}
    assert len(waits) == 10 and all(ns is not None and S_NS <= ns <= 3 * S_NS for ns in waits)
    assert charge(gateway(LimiterConfig(tokens_per_s=1.0)), 0, 0, tokens=999).retry_after_ns is None, "never"


@given(st.lists(st.tuples(
    st.booleans(), st.sampled_from("tu"), st.sampled_from([b"", b"ann", b"bob"]), st.integers(0, 60),
    st.sampled_from([0, MS_NS, 400 * MS_NS, 3 * S_NS]),
), max_size=60))
@settings(max_examples=150, deadline=None)
def test_whatever_is_asked_for_the_limiter_is_asked_once(
    asked: list[tuple[bool, str, bytes, int, int]],
) -> None:
    """Requests that never end and embeddings, in any order, against one limiter by itself."""
    limits = LimiterConfig(
        rate_rps=1.0, burst=4, tokens_per_s=30.0, token_burst_s=2.0, total_rps=2.0, total_burst_s=3.0, user_rps=0.5,
    )
    machine, alone = gateway(limits, overload=OverloadConfig(enabled=False)), Limiter(limits, {}, CLASSES)
    now_ns = 0
    for rid, (embeds, tenant, user, tokens, step_ns) in enumerate(asked):
        now_ns += step_ns
        verdict = alone.take(now_ns, tenant, tokens, user)
        if embeds:
            said = charge(machine, now_ns, rid, tokens, tenant, user).code
        else:
            said = code(machine.handle(now_ns, Arrive(rid, f"r{rid}", tenant, "chat", now_ns, tokens, 0, asker=user)))
        want = "" if embeds else "sent"
        assert said == (want if verdict.ok else "overloaded" if verdict.scope == "total" else "rate_limited")
    assert machine.stats().limiter == alone.stats()


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

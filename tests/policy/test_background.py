"""Audits, refreshes, what is called off, quarantine, comparisons by meaning: through a whole gateway, by hand.

Run: python -m pytest tests/policy/test_background.py -q
"""

from __future__ import annotations

import pytest

from engine.events import (
    Abort,
    Answer,
    Attach,
    Drain,
    Ended,
    Hold,
    Invalidate,
    Likeness,
    PlaceAnswer,
    Placed,
    Pressure,
    Reject,
    Release,
    ReplicaBack,
    ReplicaLost,
    StoreAnswer,
    Submit,
    Waiting,
    Wake,
)
from engine.policy.flights import BACKGROUND
from engine.units import MS_NS, S_NS
from tests.policy.background_world import ALWAYS, NEVER, World, only, records

# ------------------------------------------------------------ audits


@pytest.mark.parametrize(("other", "right"), [("a1", True), ("a2", False)])
def test_an_audited_hit_is_answered_at_once_and_computed_when_nobody_waits(other: str, right: bool) -> None:
    world = World(audit_share=0.5)
    world.end(world.ask("red"), "a1")
    out = world.ask("crimson", near=0.96, draw=ALWAYS)
    (answer,), (hold,), (submit,) = only(out, Answer), only(out, Hold), only(out, Submit)
    assert out.index(hold) < out.index(answer), "the driver lets go of the prompt with the answer"
    assert (answer.tier, hold.rid, submit.rid) == ("semantic", 1, 1)
    assert (submit.traffic_class, submit.priority) == (BACKGROUND, 2)
    out = world.end(out, other)
    assert only(out, Release) == [Release(1)]
    (row,) = records(out)
    assert (row.kind, row.done, row.right, row.request_id, row.source, row.cosine_millionths) == (
        "audit", True, right, "r1", "r0", 960_000
    )
    rule = world.gateway.stats().semantic.rule
    assert (rule.lessons, rule.wrong) == (1, not right)
    (answer,) = only(world.ask("crimson"), Answer)
    assert (answer.tier, answer.answer_id) == ("exact", other), "what was computed is kept for the question itself"


def test_what_chance_leaves_alone_is_not_computed() -> None:
    world = World(audit_share=0.5)
    world.end(world.ask("red"), "a1")
    assert not only(world.ask("crimson", near=0.96, draw=NEVER), Submit)


def test_an_audit_waits_until_it_is_calm_and_one_runs_at_a_time() -> None:
    world = World(audit_share=1.0)
    world.end(world.ask("red"), "a1")
    busy = Pressure(0, 10**9, 3, (Waiting("qa", 1, world.now_ns),))
    world.tell(busy)
    assert not only(world.ask("crimson", near=0.96), Submit)
    assert not only(world.ask("scarlet", near=0.96), Submit)
    first = world.tell(Pressure(0, 10**9, 3))
    assert [submit.rid for submit in only(first, Submit)] == [1]
    second = world.end(first, "a1")
    assert [submit.rid for submit in only(second, Submit)] == [2]
    world.end(second, "a1", "failed")
    assert world.gateway.stats().jobs.dropped == 1 and world.gateway.stats().jobs.done == 1


def test_an_audits_waiting_raises_no_level() -> None:
    world = World(audit_share=1.0)
    world.end(world.ask("red"), "a1")
    world.ask("crimson", near=0.96)
    world.now_ns += 5 * S_NS
    world.tell(Pressure(0, 10**9, 0, (Waiting(BACKGROUND, 1, 0),)))
    assert world.gateway.stats().level == 0


def test_a_drain_lets_go_of_what_waits() -> None:
    world = World(audit_share=1.0)
    world.end(world.ask("red"), "a1")
    world.tell(Pressure(0, 10**9, 3, (Waiting("qa", 1, world.now_ns),)))
    world.ask("crimson", near=0.96)
    out = world.tell(Drain())
    assert only(out, Release) == [Release(1)]
    assert [(row.done, row.right) for row in records(out)] == [(False, None)]


def test_answers_are_compared_by_their_vectors_where_words_differ() -> None:
    world = World(audit_share=1.0, identity="meaning", same_answer_cosine=0.9)
    out = world.end(world.ask("red"), "a1")
    assert only(out, PlaceAnswer) == [PlaceAnswer(b"ht", "a1")]
    world.tell(Placed(b"ht", "a1"))
    out = world.end(world.ask("crimson", near=0.96), "a2")
    assert only(out, PlaceAnswer) == [PlaceAnswer(b"ht", "a2")]
    assert not records(out), "not before its vector is there"
    (row,) = records(world.tell(Placed(b"ht", "a2", (Likeness("a1", 950_000),))))
    assert row.right is True
    out = world.end(world.ask("scarlet", near=0.96), "a3")
    (row,) = records(world.tell(Placed(b"ht", "a3", (Likeness("a1", 850_000),))))
    assert row.right is False


# ------------------------------------------------------------ stale-while-revalidate


def test_an_old_answer_serves_once_more_while_it_is_renewed() -> None:
    world = World(revalidate_s=5)
    world.end(world.ask("red"), "a1")
    world.now_ns = 12 * S_NS
    out = world.ask("red")
    (answer,) = only(out, Answer)
    assert (answer.tier, answer.answer_id, answer.age_ns) == ("exact", "a1", 12 * S_NS)
    assert len(only(out, Submit)) == 1
    again = world.ask("red")
    assert only(again, Answer) and not only(again, Submit), "renewed once, however many ask"
    (row,) = records(world.end(out, "a9"))
    assert (row.kind, row.done) == ("refresh", True)
    (answer,) = only(world.ask("red"), Answer)
    assert (answer.answer_id, answer.age_ns) == ("a9", 0)
    world.now_ns = 30 * S_NS
    assert not only(world.ask("red"), Answer), "beyond the window it is a miss"


# ------------------------------------------------------------ what is called off


@pytest.mark.parametrize(
    ("what", "gone"),
    [
        (Invalidate(tag="kettle"), True), (Invalidate(tag="catalogue"), True), (Invalidate(answer_id="a1"), True),
        (Invalidate(tenant="t"), True), (Invalidate(), True), (Invalidate(tag="teapot"), False),
        (Invalidate(tenant="u"), False), (Invalidate(tenant="u", tag="kettle"), False),
        (Invalidate(answer_id="a2"), False),
    ],
)
def test_what_is_meant_serves_nobody_any_more(what: Invalidate, gone: bool) -> None:
    world = World()
    world.end(world.ask("red", tags=("kettle",)), "a1")
    world.tell(what)
    assert bool(only(world.ask("red"), Answer)) == (not gone)
    assert bool(only(world.ask("crimson", near=0.96), Answer)) == (not gone)


def test_a_version_counts_once() -> None:
    world = World()
    world.tell(Invalidate(tag="catalogue", version=7))
    world.end(world.ask("red"), "a1")
    world.tell(Invalidate(tag="catalogue", version=7))
    world.tell(Invalidate(tag="catalogue", version=6))
    assert only(world.ask("red"), Answer), "no news"
    world.tell(Invalidate(tag="catalogue", version=8))
    assert not only(world.ask("red"), Answer)


def test_what_was_begun_before_is_neither_kept_nor_joined() -> None:
    world = World(coalesce=True)
    led = world.ask("red")
    world.tell(Invalidate(tag="catalogue"))
    assert only(world.ask("red"), Submit), "the old price is read in that flight: nobody new gets aboard"
    done = world.end(led, "a1")
    assert [a.rid for a in only(done, Answer)] == [0], "who was aboard gets it"
    assert not only(done, StoreAnswer)


# ------------------------------------------------------------ quarantine


def test_an_entry_serves_others_after_enough_of_them_got_an_equal_answer() -> None:
    world = World(quarantine=2)
    world.end(world.ask("red", asker="eve"), "a1")
    assert only(world.ask("reddish", near=0.96, asker="eve"), Answer), "her own"
    for name in ("ann", "ann", "bob"):
        out = world.ask(f"{name}'s {world.rid}", near=0.96, asker=name)
        assert not only(out, Answer), "not yet"
        world.end(out, "a1")
    assert only(world.ask("crimson", near=0.96, asker="cyd"), Answer)


def test_a_poisoned_entry_stays_where_it_is() -> None:
    world = World(quarantine=1)
    world.end(world.ask("red", asker="eve"), "poison")
    for name in ("ann", "bob", "cyd", ""):
        out = world.ask(f"{name} asks", near=0.96, asker=name)
        assert not only(out, Answer)
        world.end(out, "a1")
    assert world.gateway.stats().semantic.quarantined >= 1


def test_nobody_without_a_name_is_served_from_quarantine_or_vouches() -> None:
    world = World(quarantine=1)
    world.end(world.ask("red", asker=""), "a1")
    for number in range(3):
        out = world.ask(f"q{number}", near=0.96, asker="")
        assert not only(out, Answer)
        world.end(out, "a1")


def test_time_is_told() -> None:
    """An entry past its time to live is no hit, but evidence; past the stale window it is neither."""
    world = World()
    world.end(world.ask("red"), "a1")
    world.now_ns = 10 * S_NS
    assert only(world.ask("crimson", near=0.96), Answer)
    world.now_ns += MS_NS
    assert not only(world.ask("scarlet", near=0.96), Answer)


@pytest.mark.parametrize("rule", ["adaptive", "conformal"])
def test_a_rule_that_learns_hears_what_was_computed_beside_its_candidates(rule: str) -> None:
    world = World(rule=rule)
    world.end(world.ask("red"), "a1")
    for number in range(5):
        out = world.ask(f"q{number}", near=0.9)
        if not only(out, Answer):
            world.end(out, "a1")
    stats = world.gateway.stats().semantic.rule
    assert stats.asked == 6 and stats.lessons >= 1 and stats.wrong == 0


def test_quarantine_and_a_learning_rule_both_hear_of_a_miss() -> None:
    world = World(rule="adaptive", quarantine=1)
    world.end(world.ask("red", asker="eve"), "a1")
    world.end(world.ask("crimson", near=0.9, asker="ann"), "a1")
    assert world.gateway.stats().semantic.quarantined == 1, "eve's is out, ann's is in"


# ------------------------------------------------------------ what a review found


def test_a_version_that_comes_again_hides_no_flight() -> None:
    world = World()
    world.tell(Invalidate(tag="catalogue", version=7))
    world.ask("red")
    world.tell(Invalidate(tag="catalogue", version=7))
    assert only(world.ask("red"), Attach) and not only(world.ask("red"), Submit)


def test_a_version_said_of_one_answer_is_not_the_tags() -> None:
    world = World()
    world.end(world.ask("red"), "a1")
    world.tell(Invalidate(tag="catalogue", version=8, answer_id="a9"))
    world.tell(Invalidate(tag="catalogue", version=8))
    assert not only(world.ask("red"), Answer)


def test_an_audit_across_a_new_price_says_nothing() -> None:
    world = World(audit_share=1.0)
    world.end(world.ask("red"), "a1")
    out = world.ask("crimson", near=0.96)
    world.tell(Invalidate(tag="catalogue"))
    (row,) = records(world.end(out, "a2"))
    assert row.done and row.right is None and world.gateway.stats().semantic.rule.lessons == 0


def test_jobs_outlast_a_replica_that_is_away() -> None:
    world = World(audit_share=1.0)
    world.end(world.ask("red"), "a1")
    world.tell(ReplicaLost(0))
    world.ask("crimson", near=0.96)
    for _ in range(3):
        world.tell(Wake())
    assert world.gateway.stats().jobs.waiting == 1
    assert [submit.rid for submit in only(world.tell(ReplicaBack(0)), Submit)] == [1]


def test_an_answer_without_a_vector_is_not_known_rather_than_wrong() -> None:
    world = World(audit_share=1.0, identity="meaning")
    world.end(world.ask("red"), "a1")
    world.tell(Placed(b"ht", "a1", known=False))
    out = world.end(world.ask("crimson", near=0.96), "a2")
    rows = records(out) + records(world.tell(Placed(b"ht", "a2", (Likeness("b1", 100_000),))))
    assert [row.right for row in rows] == [None]


def test_a_comparison_waits_for_no_vector_that_was_never_asked_for() -> None:
    world = World(audit_share=1.0, identity="meaning")
    world.end(world.ask("blue"), "a2")
    world.tell(Placed(b"ht", "a2"))
    world.end(world.ask("red"), "a1")  # its vector is on its way
    (row,) = records(world.end(world.ask("crimson", near=0.96), "a2"))
    assert row.right is None


def test_an_answer_that_a_client_renewed_is_not_renewed_again() -> None:
    world = World(revalidate_s=5)
    world.end(world.ask("red"), "a1")
    world.now_ns = 12 * S_NS
    world.tell(Pressure(0, 10**9, 3, (Waiting("qa", 1, world.now_ns),)))
    assert only(world.ask("red"), Answer), "old; to be renewed when it is calm"
    world.now_ns = 15 * S_NS + MS_NS
    world.tell(Pressure(0, 10**9, 3, (Waiting("qa", 1, world.now_ns),)))
    world.end(world.ask("red"), "a2")
    assert world.gateway.stats().jobs.waiting == 1
    assert not only(world.tell(Pressure(0, 10**9, 3)), Submit)
    assert world.gateway.stats().jobs.dropped == 1


# ------------------------------------------------------------ replicas that hang under a job


@pytest.mark.parametrize("dies", [False, True])
def test_a_job_that_no_replica_ends_makes_room_for_the_next(dies: bool) -> None:
    world = World(audit_share=1.0)
    world.end(world.ask("red"), "a1")
    first = world.ask("crimson", near=0.96)
    world.ask("scarlet", near=0.96)
    (submit,) = only(first, Submit)
    wake_ns = world.gateway.next_wake_ns()
    assert wake_ns == world.gateway.config.classes["qa"].timeout_ms * MS_NS, "as long as one of its class"
    world.now_ns = wake_ns - 1
    assert not world.tell(Wake())
    world.now_ns = wake_ns
    out = world.tell(Wake())
    assert only(out, Abort) == [Abort(submit.sid)] and only(out, Release) == [Release(1)]
    assert [(row.request_id, row.done, row.right) for row in records(out)] == [("r1", False, None)]
    (second,) = only(out, Submit)
    assert second.rid == 2
    if dies:
        world.tell(ReplicaLost(0))
    assert not world.tell(Ended(submit.sid, "lost" if dies else "aborted")), "no news any more"
    (row,) = records(world.end(out, "a1"))
    assert (row.request_id, row.right) == ("r2", True)
    stats = world.gateway.stats()
    assert (stats.jobs.done, stats.jobs.dropped, stats.jobs.open) == (1, 1, 0)
    assert stats.fleet.breakers[0].state == "closed", "the lowest priority may starve at a good replica"


def test_who_rides_on_a_job_that_is_given_up_keeps_his_own_time() -> None:
    world = World(revalidate_s=5)
    world.end(world.ask("red", cls="tip"), "a1")
    world.now_ns = 12 * S_NS
    out = world.ask("red", cls="tip")
    (submit,) = only(out, Submit)
    world.now_ns = 16 * S_NS  # beyond the window in which the old answer serves
    assert only(world.ask("red", cls="tip"), Attach) == [Attach(2, submit.sid)]
    world.now_ns = 42 * S_NS
    out = world.tell(Wake())
    assert not only(out, Abort) and [row.kind for row in records(out)] == ["refresh"]
    world.now_ns = 46 * S_NS
    out = world.tell(Wake())
    assert [reject.code for reject in only(out, Reject)] == ["deadline_exceeded"]
    assert only(out, Abort) == [Abort(submit.sid)]


# ------------------------------------------------------------ equal texts under two hard keys


def test_two_tenants_with_equal_answers_have_groups_of_their_own() -> None:
    world = World(audit_share=1.0, identity="meaning", same_answer_cosine=0.9)
    for tenant, like in (("t", "x1"), ("u", "y1")):
        hard = b"h" + tenant.encode()
        world.end(world.ask("red", tenant=tenant), like)
        world.tell(Placed(hard, like))
        out = world.end(world.ask("blue", tenant=tenant), "same")
        assert only(out, PlaceAnswer) == [PlaceAnswer(hard, "same")], "compared under each hard key"
        world.tell(Placed(hard, "same", (Likeness(like, 950_000),)))
    for tenant, like in (("t", "x1"), ("u", "y1")):
        (row,) = records(world.end(world.ask(f"crimson {tenant}", near=0.96, tenant=tenant), "same"))
        assert (row.right, row.source) == (True, "r0" if like == "x1" else "r2")


def test_two_tenants_that_wait_for_one_texts_vector_hear_each_their_own() -> None:
    world = World(audit_share=1.0, identity="meaning", same_answer_cosine=0.9)
    for tenant, first in (("t", "x1"), ("u", "y1")):
        world.end(world.ask("red", tenant=tenant), first)
        world.tell(Placed(b"h" + tenant.encode(), first))
    for tenant in "tu":
        assert not records(world.end(world.ask("crimson", near=0.96, tenant=tenant), "new"))
    (mine,) = records(world.tell(Placed(b"ht", "new", (Likeness("x1", 950_000),))))
    (other,) = records(world.tell(Placed(b"hu", "new", (Likeness("y1", 500_000),))))
    assert [(row.request_id, row.right) for row in (mine, other)] == [("r2", True), ("r3", False)]

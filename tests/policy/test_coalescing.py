"""Questions that wait for a similar one: in flight, lost with its replica, or renewed in place of an old answer.

Run: python -m pytest tests/policy/test_coalescing.py -q
"""

from __future__ import annotations

import pytest

from engine.events import (
    Answer,
    Attach,
    Cancel,
    DropVector,
    FindSimilar,
    FirstToken,
    Invalidate,
    Neighbour,
    Pressure,
    Reject,
    ReplicaBack,
    Similar,
    StoreAnswer,
    StoreVector,
    Submit,
    TextMarks,
    Waiting,
    Wake,
)
from engine.units import MS_NS, S_NS
from tests.policy.background_world import World, lost, only

# ------------------------------------------------------------ similar questions in flight


def test_a_paraphrase_waits_for_the_question_that_is_being_computed() -> None:
    world = World(coalesce=True)
    led = world.ask("red")
    assert only(led, StoreVector) == [StoreVector(b"ht", b"red")], "it can be found from now on"
    out = world.ask("crimson", near=0.96)
    assert only(out, Attach) == [Attach(1, 0)] and not only(out, Submit)
    world.tell(FirstToken(0))
    done = world.end(led, "a1")
    mine = [a for a in only(done, Answer) if a.rid == 1]
    assert [(a.tier, a.answer_id, a.source, a.cosine_millionths) for a in mine] == [("coalesced", "a1", "r0", 960_000)]
    assert not only(world.ask("crimson", near=0.96), Submit), "and is a semantic hit afterwards"


def test_off_it_is_computed_beside_it() -> None:
    world = World()
    assert not only(world.ask("red"), StoreVector)
    assert only(world.ask("crimson", near=0.96), Submit)


def test_another_questions_failure_is_not_mine() -> None:
    world = World(coalesce=True)
    led = world.ask("red")
    world.ask("crimson", near=0.96)
    out = world.end(led, "", "failed")
    assert [reject.rid for reject in only(out, Reject)] == [0]
    assert [submit.rid for submit in only(out, Submit)] == [1], "it is computed for itself"
    assert DropVector(b"ht", b"red") in out and not only(out, StoreAnswer)


def test_a_critical_question_does_not_wait_for_a_standard_one() -> None:
    world = World(coalesce=True)
    world.ask("red")
    assert only(world.ask("crimson", near=0.96, cls="vip"), Submit)


def test_the_leaders_client_may_leave() -> None:
    world = World(coalesce=True)
    led = world.ask("red")
    world.ask("crimson", near=0.96)
    world.tell(Cancel(0))
    done = world.end(led, "a1")
    assert [a.rid for a in only(done, Answer)] == [1]


def test_an_opposite_question_in_flight_is_vetoed_like_an_answered_one() -> None:
    world = World(coalesce=True)
    world.ask("on", marks=TextMarks(poles=(5,)))
    assert only(world.ask("off", near=0.97, of="on", marks=TextMarks(poles=(-5,))), Submit)


def test_what_was_called_off_while_it_was_computed_anew_can_be_found_all_the_time() -> None:
    world = World(coalesce=True)
    world.end(world.ask("red"), "a1")
    world.now_ns = 20 * S_NS  # past its time to live, but held
    led = world.ask("red")
    assert not only(world.tell(Invalidate(answer_id="a1")), DropVector), "the new answer will lie there"
    assert only(world.ask("crimson", near=0.96), Attach)
    assert StoreVector(b"ht", b"red") in world.end(led, "a2")
    assert DropVector(b"ht", b"red") in world.tell(Invalidate(answer_id="a2")), "nobody computes it now"


# ------------------------------------------------------------ replicas that die under what others wait for


def test_who_rode_on_a_similar_question_waits_for_the_replica_like_its_leader_and_finds_it_again() -> None:
    world = World(coalesce=True)
    led = world.ask("red")
    world.ask("crimson", near=0.96)
    out = lost(world, led)
    assert not only(out, Reject) and not only(out, FindSimilar), "both wait"
    out = world.tell(ReplicaBack(0))
    assert [submit.rid for submit in only(out, Submit)] == [0]
    assert [look.rid for look in only(out, FindSimilar)] == [1]
    again = world.tell(Similar(1, (Neighbour(b"red", 960_000),)))
    assert [attach.rid for attach in only(again, Attach)] == [1] and not only(again, Submit)
    done = world.end(out, "a1")
    assert [(a.rid, a.tier) for a in only(done, Answer)] == [(0, "model"), (1, "coalesced")]


def test_it_waits_no_longer_than_a_start_makes_sense_and_for_one_death_only() -> None:
    world = World(coalesce=True)
    led = world.ask("red")
    world.ask("crimson", near=0.96)
    lost(world, led)
    world.now_ns = S_NS
    out = world.tell(Wake())
    assert [(reject.rid, reject.code) for reject in only(out, Reject)] == [(0, "replica_lost"), (1, "replica_lost")]
    world.tell(ReplicaBack(0))
    led = world.ask("blue")
    world.ask("navy", near=0.96, of="blue")
    lost(world, led)
    back = world.tell(ReplicaBack(0))
    world.tell(Similar(world.rid, (Neighbour(b"blue", 960_000),)))
    out = lost(world, back)
    assert [reject.code for reject in only(out, Reject)] == ["replica_lost"] * 2


def test_a_rider_that_finds_nothing_after_the_death_is_computed_itself() -> None:
    world = World(coalesce=True)
    led = world.ask("red")
    world.ask("crimson", near=0.96)
    world.tell(Cancel(0))
    lost(world, led)
    assert [look.rid for look in only(world.tell(ReplicaBack(0)), FindSimilar)] == [1]
    out = world.tell(Similar(1))
    assert [submit.rid for submit in only(out, Submit)] == [1]
    assert [answer.rid for answer in only(world.end(out, "a2"), Answer)] == [1]


# ------------------------------------------------------------ old answers that are just being renewed


@pytest.mark.parametrize("age_s", [11, 51], ids=["stale", "past keeping"])
def test_a_paraphrase_waits_for_the_new_answer_in_place_of_an_old_one(age_s: int) -> None:
    world = World(coalesce=True)
    world.end(world.ask("red"), "a1")
    world.now_ns = age_s * S_NS
    out = world.ask("crimson", near=0.96)
    assert not only(out, Answer), "too old"
    world.end(out, "a9")
    led = world.ask("red")
    assert only(world.ask("scarlet", near=0.96), Attach) == [Attach(3, 2)]
    done = world.end(led, "a2")
    assert [(a.rid, a.tier, a.answer_id) for a in only(done, Answer)] == [(2, "model", "a2"), (3, "coalesced", "a2")]
    assert world.gateway.stats().semantic.rides == 1


def test_who_makes_do_with_the_old_answer_waits_for_no_new_one() -> None:
    world = World(coalesce=True)
    world.end(world.ask("red"), "a1")
    world.now_ns = 12 * S_NS
    world.ask("red")
    world.tell(Pressure(0, 10**9, 3, (Waiting("qa", 1, world.now_ns - 400 * MS_NS),)))
    (answer,) = only(world.ask("crimson", near=0.96, cls="tip"), Answer)
    assert (answer.tier, answer.answer_id) == ("approximate", "a1")


def test_the_answer_that_a_job_renews_serves_similar_questions_too() -> None:
    world = World(revalidate_s=5, coalesce=True)
    world.end(world.ask("red", cls="tip"), "a1")
    world.now_ns = 12 * S_NS
    job = world.ask("red", cls="tip")
    assert only(world.ask("scarlet", near=0.96, cls="tip"), Attach), "it rides on the job"
    done = world.end(job, "a2")
    assert [(a.rid, a.tier, a.answer_id) for a in only(done, Answer)] == [(2, "coalesced", "a2")]
    (answer,) = only(world.ask("crimson", near=0.96, cls="tip"), Answer)
    assert (answer.tier, answer.answer_id, answer.age_ns) == ("semantic", "a2", 0)


def test_a_renewed_question_that_was_called_off_leaves_no_vector() -> None:
    world = World(revalidate_s=5, coalesce=True)
    world.end(world.ask("red"), "a1")
    world.now_ns = 12 * S_NS
    job = world.ask("red")
    gone = world.tell(Invalidate(tag="catalogue")) + world.end(job, "a2")
    assert only(gone, DropVector) and not only(gone, StoreVector)
    assert not only(world.ask("crimson", near=0.96), Answer)

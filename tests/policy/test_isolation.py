"""Bisection against culprits that are known: they are found, nobody else is blamed, and it takes no longer than said.

Run: python -m pytest tests/policy/test_isolation.py -q
Mutations it caught: the first half twice; a half forgotten; a pair is guilty; guilty in spite of others; a group kept
after its trial; ended ones tried.
"""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from engine.policy.isolation import Isolation


def find(sids: list[int], culprits: set[int], leaves: set[int] = frozenset()) -> tuple[list[int], int]:  # type: ignore
    """(who was found guilty, how many trials it took). ``leaves`` end as soon as the search has begun."""
    isolation = Isolation()
    running = dict.fromkeys(sids)
    found: list[int] = []

    def step(ran: list[int]) -> None:
        if not culprits.isdisjoint(ran):
            guilty = isolation.raised(ran)
            if guilty is not None:
                found.append(guilty)
                del running[guilty]
        else:
            isolation.passed(ran)
        isolation.check()

    step(list(running))
    for sid in leaves:
        running.pop(sid, None)
    trials = 0
    while isolation.active and running:
        ran = list(isolation.trial(running))
        assert set(ran) <= set(running), "nobody who has ended"
        step(ran)
        trials += 1
        assert trials <= 2 * len(sids), "it ends"
    return found, trials


@given(n=st.integers(1, 40), data=st.data())
def test_the_guilty_are_found_and_nobody_else(n: int, data: st.DataObject) -> None:
    culprits = data.draw(st.sets(st.integers(0, n - 1), max_size=5))
    found, trials = find(list(range(n)), culprits)
    assert sorted(found) == sorted(culprits)
    assert trials <= len(culprits) * 2 * (n - 1).bit_length()


@given(n=st.integers(1, 40), data=st.data())
def test_those_that_end_meanwhile_are_not_looked_for(n: int, data: st.DataObject) -> None:
    culprits = data.draw(st.sets(st.integers(0, n - 1), min_size=1, max_size=5))
    leaves = data.draw(st.sets(st.integers(0, n - 1)))
    found, _ = find(list(range(n)), culprits, leaves)
    assert set(found) - leaves == culprits - leaves


def test_when_every_step_raises_all_are_guilty_after_so_many_steps() -> None:
    for n in range(1, 40):
        found, trials = find(list(range(n)), set(range(n)))
        assert (sorted(found), trials + 1) == (list(range(n)), 2 * n - 1)


def test_one_among_sixteen() -> None:
    assert max(find(list(range(16)), {guilty})[1] for guilty in range(16)) == 8


def test_a_single_one_is_not_guilty_when_others_were_in_the_step() -> None:
    isolation = Isolation()
    assert isolation.raised([7], alone=False) is None
    assert isolation.trial({7: None, 8: None}) == [7]
    assert isolation.raised([7]) == 7
    assert not isolation.active


def test_when_all_under_suspicion_have_ended_the_search_is_over() -> None:
    isolation = Isolation()
    isolation.raised([1, 2, 3])
    assert isolation.trial([3, 4]) == [3]
    assert isolation.trial([4]) == [] and not isolation.active

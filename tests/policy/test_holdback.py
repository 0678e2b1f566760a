"""``held_back`` against the definition, token by token. Its promises on whole replicas are in ``test_admission.py``.

Mutations it caught: never; across priorities; one block too many; the last block, which is never a hit, counted; the
chain's first block compared instead of its last; an owner that is past it.
"""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from engine.events import Submit
from engine.model.blockhash import Hasher
from engine.policy.holdback import held_back
from engine.policy.sequence import Sequence

SIZE = 3
HASHER = Hasher(b"k", SIZE)
TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=30)


def sequence(tokens: list[int], priority: int, computed: int) -> Sequence:
    digests = list(HASHER.chain(HASHER.root("t", "m"), tokens))
    ask = Submit(0, 0, "t", "c", priority, 0, 1 << 60, len(tokens), 9, tuple(digests))
    return Sequence(ask, digests, "t", priority, 0, known=len(tokens), computed=computed, state="prefill")


@settings(max_examples=400, deadline=None)
@given(
    common=st.lists(st.integers(0, 1), max_size=24), mine=TOKENS, theirs=st.lists(TOKENS, min_size=1, max_size=3),
    computed=st.lists(st.integers(0, 40), min_size=3, max_size=3), hits=st.integers(0, 12),
    priorities=st.lists(st.integers(1, 2), min_size=4, max_size=4), least_tokens=st.integers(1, 12),
)
def test_held_back_is_what_it_says(
    common: list[int], mine: list[int], theirs: list[list[int]], computed: list[int], hits: int,
    priorities: list[int], least_tokens: int,
) -> None:
    tokens = common + mine
    hits = min(hits, (len(tokens) - 1) // SIZE)
    owners = [
        sequence(common + rest, priority, min(done, len(common + rest) - 1))
        for rest, priority, done in zip(theirs, priorities[1:], computed, strict=False)
    ]
    want = False
    for owner, rest in zip(owners, theirs, strict=True):
        shared = 0  # tokens that both begin with
        for one, two in zip(tokens, common + rest, strict=False):
            if one != two:
                break
            shared += 1
        could_hit = (len(tokens) - 1) // SIZE * SIZE  # one token at least is left to compute
        to_come = min(shared // SIZE * SIZE, could_hit) - hits * SIZE
        full = -(-least_tokens // SIZE) * SIZE  # in whole blocks
        same = owner.priority == priorities[0]
        want = want or (same and to_come >= full and owner.computed <= hits * SIZE)
    assert held_back(sequence(tokens, priorities[0], 0), hits, owners, SIZE, least_tokens) == want

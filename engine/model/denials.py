"""What a text denies: "not", "without", "unable to", typos of them, and the words that they speak of.

Counting them is not enough: "why isn't it verified" and "why can't it be verified" deny the same, "the bag was not in,
the rest is" and "the bag was in, the rest is not" deny as often. So each denial is tied to the words of its clause.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from engine.model.lexicon import ALL, BEFORE_VERB, DENIALS, IDLE_AFTER, IDLE_BEFORE, LINKS, NEGATIONS

STOPS = frozenset(".?!")
CLAUSE_ENDS = STOPS | frozenset((",", ";", "but", "because", "although", "though", "while", "whereas"))

class Denied(msgspec.Struct, frozen=True):
    """``denials``: places of them. ``surely``, ``maybe``: places of content words that they deny; in their clause."""

    denials: frozenset[int] = frozenset()
    surely: frozenset[int] = frozenset()
    maybe: frozenset[int] = frozenset()
    turned: frozenset[int] = frozenset()  # of those surely denied, the ones that come after their denial


NOTHING = Denied()


def denied_in(words: Sequence[str], content: Mapping[int, str]) -> Denied:
    """``words``: lower case, no apostrophes, punctuation as words of its own. ``content``: words by their place."""
    denials = [at for at in range(len(words)) if _denies(words, at)]
    if not denials:
        return NOTHING
    surely: set[int] = set()
    maybe: set[int] = set()
    turned: set[int] = set()
    for at in denials:
        begin, end = at, at + 1
        while begin and words[begin - 1] not in CLAUSE_ENDS:
            begin -= 1
        while end < len(words) and words[end] not in CLAUSE_ENDS:
            end += 1
        maybe.update(place for place in range(begin, end) if place in content and place != at)
        if words[at] in DENIALS and words[at] not in BEFORE_VERB:
            continue
        after = [place for place in range(at + 1, end) if place in content and words[place] not in LINKS]
        before = [place for place in range(begin, at) if place in content and words[place] not in LINKS]
        if after:
            surely.add(after[0])
            turned.add(after[0])
        elif before:  # "the fee not"
            surely.add(before[-1])
    return Denied(frozenset(denials), frozenset(surely), frozenset(maybe), frozenset(turned))


def _denies(words: Sequence[str], at: int) -> bool:
    word = words[at]
    if word in DENIALS or (word == "but" and at > 0 and words[at - 1] in ALL):
        return True
    if word not in NEGATIONS:
        return False
    after = words[at + 1] if at + 1 < len(words) else "."
    if word == "no" and after in STOPS:  # "no. 3", "safer, no?"; but "flowers no" denies them
        numbered = at + 2 < len(words) and words[at + 2][0].isdigit()
        if numbered or at == 0 or words[at - 1] in CLAUSE_ENDS:
            return False
    return not (after in IDLE_AFTER or (word == "not" and at > 0 and words[at - 1] in IDLE_BEFORE))

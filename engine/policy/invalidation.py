"""What was called off, and when: an answer whose computation began before that may not be kept, nor shared any more.

A price that changes while the model reads the old one would else be cached for a whole time to live. Versions make a
word that comes twice (several senders, a retry) harmless.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import NamedTuple

from engine.events import Invalidate, TagVersion
from engine.policy.tags import meant

REMEMBERED = 1000  # far more than can come while one answer is computed; older ones count as meaning everything
VERSIONED = 10_000  # tags whose version is known


class Word(NamedTuple):
    """One, with its number."""

    number: int
    what: Invalidate


class Invalidations:
    """Numbered from 1 on. Owned by one gateway."""

    def __init__(self) -> None:
        self.number = 0
        self._words: deque[Word] = deque()
        self._forgotten = 0
        self._versions: OrderedDict[tuple[str, str], int] = OrderedDict()

    def take(self, what: Invalidate) -> bool:
        """False: this version of the tag, or a newer one, was known already."""
        if what.tag and what.version and not what.answer_id:  # one answer's end is not the tag's
            key = (what.tenant, what.tag)
            if what.version <= self._versions.get(key, 0):
                return False
            self._know(key, what.version)
        self.number += 1
        if not what.answer_id:  # a text that nobody has yet cannot be meant
            self._words.append(Word(self.number, what))
            if len(self._words) > REMEMBERED:
                self._forgotten = self._words.popleft().number
        return True

    def versions(self) -> tuple[TagVersion, ...]:
        """Those that are known, the longest unchanged first."""
        return tuple(TagVersion(tenant, tag, version) for (tenant, tag), version in self._versions.items())

    def take_back(self, versions: tuple[TagVersion, ...]) -> None:
        """Known in a former life: what was called off by then has left by then."""
        for each in versions:
            key = (each.tenant, each.tag)
            if each.version > self._versions.get(key, 0):
                self._know(key, each.version)

    def _know(self, key: tuple[str, str], version: int) -> None:
        self._versions[key] = version
        self._versions.move_to_end(key)
        if len(self._versions) > VERSIONED:
            self._versions.popitem(last=False)

    def spoiled(self, since: int, tenant: str, tags: tuple[str, ...]) -> bool:
        """Whether what began when ``number`` was ``since`` has been called off."""
        if since < self._forgotten:
            return True
        for word in reversed(self._words):
            if word.number <= since:
                return False
            if meant(word.what, tenant, tags):
                return True
        return False

    def check(self) -> None:
        """Invariants."""
        numbers = [word.number for word in self._words]
        assert numbers == sorted(set(numbers)), "words: each has a number of its own, in order"
        assert len(self._words) <= REMEMBERED and len(self._versions) <= VERSIONED, "bounded memory"
        assert self._forgotten <= self.number, "nothing is forgotten before it was said"

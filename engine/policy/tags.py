"""What answers depend on: entries by tag, and which of them a word from outside means.

A tag is a name that the shop gives to something that may change: the catalogue, a product, a campaign.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Generic, TypeVar

from engine.events import Invalidate

Key = TypeVar("Key")


class TagIndex(Generic[Key]):
    """Keys by tag, in the order in which they came."""

    def __init__(self) -> None:
        self._keys: dict[str, dict[Key, None]] = {}

    def add(self, key: Key, tags: Iterable[str]) -> None:
        """It depends on these."""
        for tag in tags:
            self._keys.setdefault(tag, {})[key] = None

    def remove(self, key: Key, tags: Iterable[str]) -> None:
        """It has left; ``tags`` as they were when it came."""
        for tag in tags:
            keys = self._keys.get(tag)
            if keys is not None:
                keys.pop(key, None)
                if not keys:
                    del self._keys[tag]

    def keys(self, tag: str) -> list[Key]:
        """All that depend on it."""
        return list(self._keys.get(tag, ()))

    def check(self, tags_of: Mapping[Key, Iterable[str]]) -> None:
        """Invariants."""
        naive: dict[str, dict[Key, None]] = {}
        for key, tags in tags_of.items():
            for tag in tags:
                naive.setdefault(tag, {})[key] = None
        assert naive == self._keys, "tags: every entry stands under each of its tags, and nothing else does"


def meant(what: Invalidate, tenant: str, tags: Iterable[str], answer_id: str = "") -> bool:
    """Whether all that ``what`` says holds for this entry."""
    return (
        what.tenant in ("", tenant)
        and (not what.tag or what.tag in tags)
        and what.answer_id in ("", answer_id)
    )

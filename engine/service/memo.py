"""What was made of a body, for when the very same bytes come again from the same tenant: in a sale most do.

Decoding, the chat template, tokens and the digests of blocks cost ten times what the exact cache's own look-up costs,
and depend on nothing but the bytes and what stands in the key. The least recently asked go first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from sys import getsizeof
from typing import NamedTuple

from msgspec import Struct

from engine.events import Arrive
from engine.model.wire import Said
from engine.service.openai import Sampled

TOKEN_BYTES = 40  # of a prompt's list of integers, measured on CPython 3.11
ENTRY_BYTES = 250  # of the table, and of what the garbage collector notes of each part; measured there, too
MOST_BYTES = 16 << 20

Key = tuple[str, str, str, tuple[str, ...], bytes]  # path, tenant, class, tags, body


class Asked(NamedTuple):
    """A body that was understood: what is asked, its facts as of then, its prompt, its question."""

    ask: Sampled
    facts: Arrive
    prompt: list[int]
    question: str
    said: Said = ""  # for upstreams


class Memo:
    """Bounded by the bytes that it holds."""

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self._most_bytes, self.held_bytes = most_bytes, 0
        self._asked: OrderedDict[Key, Asked] = OrderedDict()
        self._bytes: dict[Key, int] = {}

    def __len__(self) -> int:
        return len(self._asked)

    def find(self, key: Key) -> Asked | None:
        """As it was understood before."""
        found = self._asked.get(key)
        if found is not None:
            self._asked.move_to_end(key)
        return found

    def keep(self, key: Key, asked: Asked) -> None:
        """For next time; ``key`` is new."""
        self._asked[key] = asked
        size = self._bytes[key] = bytes_of(key, asked)
        self.held_bytes += size
        while self.held_bytes > self._most_bytes:
            self.held_bytes -= self._bytes.pop(self._asked.popitem(last=False)[0])


def bytes_of(key: Key, asked: Asked) -> int:
    """What an entry takes. By its parts, not by its body: a label of one letter is an object of 50 bytes, and one
    character beyond ASCII makes all of a text two or four times as wide.
    """
    rest = (key, asked.ask, asked.facts, asked.question, asked.said)
    return ENTRY_BYTES + TOKEN_BYTES * len(asked.prompt) + sum(map(_deep_bytes, rest))


def _deep_bytes(value: object) -> int:
    parts: Iterable[object] = ()
    if isinstance(value, Struct):
        parts = (getattr(value, name) for name in value.__struct_fields__)
    elif isinstance(value, dict):
        parts = (*value.keys(), *value.values())
    elif isinstance(value, list | tuple):
        parts = value
    elif not isinstance(value, str | bytes):
        return 0  # numbers and None, mostly everybody's
    return getsizeof(value) + sum(map(_deep_bytes, parts))

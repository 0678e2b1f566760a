"""What was made of a body, for when the very same bytes come again from the same tenant: in a sale most do.

Decoding, the chat template, tokens and the digests of blocks cost ten times what the exact cache's own look-up costs,
and depend on nothing but the bytes and what stands in the key. The least recently asked go first.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

from engine.events import Arrive
from engine.model.wire import Said
from engine.service.openai import Sampled

TOKEN_BYTES = 40  # of a prompt's list of integers, measured on CPython 3.11
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
        self.held_bytes += _bytes(key, asked)
        while self.held_bytes > self._most_bytes:
            self.held_bytes -= _bytes(*self._asked.popitem(last=False))


def _bytes(key: Key, asked: Asked) -> int:
    return 2 * len(key[-1]) + TOKEN_BYTES * len(asked.prompt)  # the body once, and its texts once more in ``ask``

"""Answers that are kept, as a cache knows them, and how a gateway learns again of those of its former life.

Part of the seam: ``events.py`` names these too. Facts, never texts or vectors: the driver brings both back by itself.
``stored_ns`` is on the driver's clock; what was stored in a former life has a time before that clock's zero.
"""

from __future__ import annotations

from engine.values import Struct


class TextMarks(Struct):
    """What a question says that its vector hardly shows. Words are 4-byte digests, sorted, one after the other."""

    words: bytes = b""  # that carry meaning
    numbers: bytes = b""  # by value: numbers, dates, sizes
    names: bytes = b""  # of things: a product, a code, a brand
    negations: int = 0  # how many
    poles: tuple[int, ...] = ()  # of pairs of opposites: one side positive, the other negative


class Entry(Struct):
    """The exact cache's: an answer that was computed once, by the request ``source``, at ``stored_ns``."""

    key: bytes
    answer_id: str
    answer_bytes: int
    stored_ns: int
    source: str
    output_tokens: int
    tenant: str = ""
    tags: tuple[str, ...] = ()


class SemanticEntry(Struct):
    """An answered question: by the request ``source``, at ``stored_ns``."""

    hard_key: bytes
    text_key: bytes
    answer_id: str
    stored_ns: int
    source: str
    output_tokens: int
    tenant: str = ""
    tags: tuple[str, ...] = ()
    marks: TextMarks = TextMarks()
    asker: bytes = b""

    @property
    def key(self) -> tuple[bytes, bytes]:
        """Under which it lies."""
        return self.hard_key, self.text_key


class KeptQuestion(Struct):
    """An entry and what was found out about it since."""

    entry: SemanticEntry
    agreed: tuple[bytes, ...] = ()  # who else got an equal answer, as long as it is in quarantine
    trusted: bool = False  # it has come out of quarantine
    group: str = ""  # of the answer, where answers are compared by meaning; "" = not known


class TagVersion(Struct):
    """The last version of a tag that was heard of; "" = of all tenants."""

    tenant: str
    tag: str
    version: int


class Remember(Struct):
    """Answers of a former life, least recently used first; the driver holds their texts and vectors.

    What the gateway does not take, because it is too old or has no room, it answers with DropAnswer and DropVector.
    """

    exact: tuple[Entry, ...] = ()
    similar: tuple[KeptQuestion, ...] = ()
    versions: tuple[TagVersion, ...] = ()

"""The response caches together: the same request's answer, a similar question's answer, and who still needs which text.

One text may be referred to by entries of both caches; it is dropped when the last of them has left.
"""

from __future__ import annotations

from collections.abc import Sequence

from engine.config import GatewayConfig
from engine.events import DropAnswer, DropVector, Ended, Neighbour, StoreAnswer, StoreVector, Upkeep
from engine.policy.exact import Entry, ExactCache
from engine.policy.semantic import SemanticCache, SemanticEntry, SemanticHit
from engine.policy.trip import Trip


class Answers:
    """Exact and semantic cache of one gateway."""

    def __init__(self, config: GatewayConfig) -> None:
        self.exact = ExactCache(config.exact)
        self.semantic = SemanticCache(config.semantic)

    def same(self, now_ns: int, key: bytes, stale_ok: bool) -> Entry | None:
        """The answer to the very same request."""
        return self.exact.get(now_ns, key, stale_ok) if key else None

    def similar(
        self, now_ns: int, hard_key: bytes, neighbours: Sequence[Neighbour], relaxed: bool
    ) -> SemanticHit | None:
        """The answer to a question that means the same."""
        return self.semantic.decide(now_ns, hard_key, neighbours, relaxed)

    def keep(self, now_ns: int, trip: Trip, ended: Ended) -> list[Upkeep]:
        """A finished answer: into the caches that its class uses, and what the driver has to do for it."""
        ask = trip.ask
        out: list[Upkeep] = []
        kept = self.exact.put(
            now_ns, trip.key, ended.answer_id, ended.answer_bytes, ask.request_id, ended.output_tokens
        )
        if trip.has_vector:
            entry = SemanticEntry(
                ask.hard_key, ask.text_key, ended.answer_id, now_ns, ask.request_id, ended.output_tokens
            )
            self.semantic.put(entry, now_ns)
            out.append(StoreVector(ask.hard_key, ask.text_key))
        if kept or trip.has_vector:
            out.append(StoreAnswer(ended.answer_id, ended.sid))
        return out + self._let_go()

    def _let_go(self) -> list[Upkeep]:
        out: list[Upkeep] = []
        texts = dict.fromkeys(self.exact.drain_dropped())
        for entry in self.semantic.drain_dropped():
            texts[entry.answer_id] = None
            if not self.semantic.holds(entry.hard_key, entry.text_key):
                out.append(DropVector(entry.hard_key, entry.text_key))
        for answer_id in texts:
            if not (self.exact.refers_to(answer_id) or self.semantic.refers_to(answer_id)):
                out.append(DropAnswer(answer_id))
        return out

    def check(self) -> None:
        """Invariants."""
        self.exact.check()
        self.semantic.check()

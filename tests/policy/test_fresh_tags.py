"""Tags are the client's, and a new one makes a new hard key: what is remembered of answers stays bounded all the same.

A real gateway with ``identity = "meaning"``, the driver's real shelf of vectors, and one popular answer that is given
under ever new tags, so that it never leaves the cache as a whole.

Run: python -m pytest tests/policy/test_fresh_tags.py -q
Mutations it caught: a group, or a vector, let go of with the last hard key only; a place kept that was asked for while
its entry left; no word to the driver.
"""

from __future__ import annotations

import gc
import tracemalloc

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.cache_config import ExactConfig, SemanticConfig
from engine.config import ClassConfig, GatewayConfig, OverloadConfig, TenantConfig
from engine.events import (
    Arrive,
    DropAnswer,
    DropPlace,
    Ended,
    FindSimilar,
    GatewayEvent,
    PlaceAnswer,
    Placed,
    Similar,
    Submit,
    Wake,
)
from engine.policy.gateway import Gateway
from engine.service.similar import Done, SimilarQuestions
from engine.units import MIB_BYTES, MS_NS

MOST = 8  # entries
VECTOR = np.eye(4, dtype=np.float32)[0]


class Shelf:
    """A gateway, and its driver as far as answers are compared. ``late``: vectors come only when asked for."""

    def __init__(self) -> None:
        self.machine = Gateway(GatewayConfig(
            classes={"qa": ClassConfig("standard", caches="semantic")}, tenants={"t": TenantConfig()},
            overload=OverloadConfig(enabled=False), exact=ExactConfig(max_mib=400 / MIB_BYTES),
            semantic=SemanticConfig(identity="meaning", max_entries=MOST),
        ))
        self.similar = SimilarQuestions(None, lambda call: None, 0, self.tell, dims=4)
        self.now_ns = self.asked = 0
        self.vectors: list[Done] = []

    def tell(self, event: GatewayEvent) -> None:
        self.now_ns += 50 * MS_NS
        actions = self.machine.handle(self.now_ns, event)
        for action in actions:
            match action:
                case FindSimilar(rid=rid):
                    self.tell(Similar(rid))
                case Submit(sid=sid):
                    self.tell(Ended(sid, "stop", 5, 0, 3, answer_id=self.says, answer_bytes=30))
                case PlaceAnswer():
                    self.similar.place(action, lambda key, within_ns, done: self.vectors.append(done))
                case DropPlace():
                    self.similar.carry_out(action)
                case DropAnswer(answer_id=answer_id):
                    self.similar.drop_answer(answer_id)
        if not isinstance(event, Placed):
            self.machine.check()

    def ask(self, tag: int, says: str = "popular", late: bool = False) -> None:
        """One question, under one more tag."""
        self.says = says
        key, self.asked = b"tag %d" % tag, self.asked + 1
        name = f"r{self.asked}"
        self.tell(Arrive(self.asked, name, "t", "qa", self.now_ns, 9, 9, b"x" + name.encode(), key, b"question"))
        if not late:
            self.encode()
        while (wake_ns := self.machine.next_wake_ns()) is not None and wake_ns <= self.now_ns:
            self.tell(Wake())

    def encode(self) -> None:
        while self.vectors:
            self.vectors.pop(0)(VECTOR, "ok")

    def held(self) -> tuple[int, int]:
        """Groups, and vectors of answers."""
        return len(self.machine.answers.identities), self.similar.places


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 40), st.sampled_from(["popular", "popular", "other"]), st.booleans()),
                min_size=20, max_size=80))
def test_no_more_groups_and_vectors_than_entries(asks: list[tuple[int, str, bool]]) -> None:
    shelf = Shelf()
    for tag, says, late in asks:
        shelf.ask(tag, says, late)
        assert max(shelf.held()) <= MOST
    shelf.encode()
    kept = {(entry.hard_key, entry.answer_id) for entry in shelf.machine.answers.semantic.entries()}
    assert shelf.held() == (len(kept), len(kept)), "and of each that is kept there is one"


def test_fresh_tags_cost_no_memory() -> None:
    shelf = Shelf()
    for tag in range(300):
        shelf.ask(tag)
    gc.collect()
    tracemalloc.start()
    for tag in range(300, 3300):
        shelf.ask(tag)
    gc.collect()
    grown_bytes = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert grown_bytes < 100_000, "3,000 tags: a vector of 384 numbers each would be 4.6 MB, a group each 0.6 MB"

"""What the driver knows of answers that are compared by meaning: under each hard key its own.

Run: python -m pytest tests/service/test_similar.py -q
"""

from __future__ import annotations

import numpy as np

from engine.events import Likeness, PlaceAnswer, Placed, Similar
from engine.service.similar import Done, SimilarQuestions

VECTORS = {b"a1": np.eye(4, dtype=np.float32)[0], b"a2": np.array([0.8, 0.6, 0, 0], np.float32)}


class Desk:
    """An encoder that answers when it is told to."""

    def __init__(self) -> None:
        self.told: list[Similar | Placed] = []
        self.asked: list[tuple[bytes, Done]] = []
        self.similar = SimilarQuestions(None, lambda call: None, 0, self.told.append, dims=4)

    def place(self, hard_key: bytes, answer_id: str) -> None:
        self.similar.place(PlaceAnswer(hard_key, answer_id), lambda key, _, done: self.asked.append((key, done)))

    def encode(self) -> list[Similar | Placed]:
        for key, done in self.asked:
            done(VECTORS[key], "ok")
        self.asked.clear()
        told, self.told[:] = list(self.told), []
        return told


def test_an_equal_text_is_compared_under_each_hard_key_and_dropped_under_all() -> None:
    desk = Desk()
    desk.place(b"t", "a1")
    desk.place(b"u", "a1")
    assert desk.encode() == [Placed(b"t", "a1"), Placed(b"u", "a1")]
    desk.place(b"t", "a2")
    assert desk.encode() == [Placed(b"t", "a2", (Likeness("a1", 800_000),))]
    desk.place(b"u", "a2")
    assert desk.encode() == [Placed(b"u", "a2", (Likeness("a1", 800_000),))], "nothing of the other tenant's"
    desk.similar.drop_answer("a2")
    desk.similar.drop_answer("a1")
    for hard_key in (b"t", b"u"):
        desk.place(hard_key, "a2")
    assert desk.encode() == [Placed(b"t", "a2"), Placed(b"u", "a2")], "nothing is left"


def test_an_answer_that_was_dropped_while_it_was_encoded_is_not_kept() -> None:
    desk = Desk()
    desk.place(b"t", "a1")
    desk.similar.drop_answer("a1")
    desk.place(b"u", "a1")
    assert desk.encode() == [Placed(b"t", "a1"), Placed(b"u", "a1")]
    desk.place(b"t", "a2")
    assert desk.encode() == [Placed(b"t", "a2")]

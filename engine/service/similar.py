"""What a gateway's driver does about similar questions: look them up, keep their vectors, find them from then on.

Live and twin alike; only the way to the encoder differs, and the clock behind it. Decides nothing: which questions are
kept, and which neighbour will do, is the machine's to say.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import numpy as np

from engine.events import (
    DropPlace,
    DropVector,
    FindSimilar,
    Likeness,
    Neighbour,
    PlaceAnswer,
    Placed,
    Similar,
    StoreVector,
)
from engine.model.index import Encoding, VectorIndex
from engine.model.index_file import Packed
from engine.units import S_NS

Word = Literal["ok", "late", "failed", "unfit"]  # unfit: too long to have a vector
Done = Callable[[np.ndarray | None, Word], None]
Encode = Callable[[bytes, int, Done], Any]
"""``(text_key, within_ns, done)``: calls ``done`` once, perhaps before it returns; what it returns is for cancel."""

FRESH = 4096  # far more than questions can be under way
ANSWERS = 8  # nearest answers that are named
STORE_WITHIN_NS = 30 * S_NS  # an answered question whose vector was late is encoded once more, without hurry


class PackedVectors(NamedTuple):
    """Of answered questions, and of the answers that are compared by meaning."""

    questions: Packed
    answers: Packed


class SimilarQuestions:
    """Owned by one driver. ``tell`` gets a ``Similar`` for each ``FindSimilar``, unless ``forget`` comes before."""

    def __init__(
        self, encode: Encode | None, cancel: Callable[[Any], None], within_ns: int,
        tell: Callable[[Similar | Placed], None], dims: int, vectors: Encoding = "float32",
    ) -> None:
        """``within_ns``: for encoding, on whatever clock ``encode`` has. Without ``encode`` nothing is similar."""
        self._encode, self._cancel, self._within_ns, self._tell = encode, cancel, within_ns, tell
        self._index = VectorIndex(dims, vectors=vectors)
        self._fresh: OrderedDict[bytes, np.ndarray] = OrderedDict()  # vectors just made, until their answer is there
        self._awaited: set[tuple[bytes, bytes]] = set()  # answered, and to be found as soon as their vector is there
        self._answers = VectorIndex(dims)  # of the texts of answers, where these are compared
        self._answer_keys: dict[str, dict[bytes, None]] = {}  # answer id -> the hard keys that it was compared under
        self._looks: dict[int, Any] = {}  # rid -> its wait for the encoder

    def carry_out(self, action: FindSimilar | StoreVector | DropVector | DropPlace) -> None:
        """One of the machine's wishes."""
        match action:
            case FindSimilar():
                self._look(action)
            case StoreVector():
                self._store(action.hard_key, action.text_key)
            case DropVector():
                self._awaited.discard((action.hard_key, action.text_key))
                self._index.remove(action.hard_key, action.text_key)
            case DropPlace():
                self._drop_place(action.hard_key, action.answer_id)

    def place(self, action: PlaceAnswer, encode: Encode) -> None:
        """Compare an answer's text with the others under its hard key; ``encode`` knows it by the answer's id."""
        self._answer_keys.setdefault(action.answer_id, {})[action.hard_key] = None
        encode(
            action.answer_id.encode(), STORE_WITHIN_NS,
            lambda vector, _: self._place(action.hard_key, action.answer_id, vector),
        )

    def _place(self, hard_key: bytes, answer_id: str, vector: np.ndarray | None) -> None:
        near: list[tuple[bytes, int]] = []
        if vector is not None and hard_key in self._answer_keys.get(answer_id, {}):
            near = self._answers.search(hard_key, vector, ANSWERS)
            self._answers.add(hard_key, answer_id.encode(), vector)
        likes = tuple(Likeness(key.decode(), cosine) for key, cosine in near)
        self._tell(Placed(hard_key, answer_id, likes, vector is not None))

    def _drop_place(self, hard_key: bytes, answer_id: str) -> None:
        self._answers.remove(hard_key, answer_id.encode())
        if (keys := self._answer_keys.get(answer_id)) is not None:
            keys.pop(hard_key, None)
            if not keys:
                del self._answer_keys[answer_id]

    def drop_answer(self, answer_id: str) -> None:
        """No other answer is compared with it any more; unknown ids are no-ops."""
        for hard_key in self._answer_keys.pop(answer_id, {}):
            self._answers.remove(hard_key, answer_id.encode())

    @property
    def places(self) -> int:
        """Vectors of answers that others are compared with; one under two hard keys counts twice."""
        return len(self._answers)

    def knows(self, hard_key: bytes, text_key: bytes) -> bool:
        """Whether there is a vector under these keys, by which the question can be found."""
        return self._index.holds(hard_key, text_key)

    def pack(self, encoder: str) -> PackedVectors:
        """All vectors, copied. ``encoder``: its weights' digest."""
        return PackedVectors(self._index.pack(encoder), self._answers.pack(encoder))

    def take_back(
        self, questions: VectorIndex, answers: VectorIndex, wanted: Iterable[tuple[bytes, bytes]], texts: Iterable[str]
    ) -> None:
        """Vectors of a former life in place of all that is here; of ``wanted`` keys and answers with ``texts`` only."""
        for key in set(questions.keys()).difference(wanted):
            questions.remove(*key)
        there = {answer_id.encode() for answer_id in texts}
        for hard_key, answer_id in answers.keys():  # noqa: SIM118
            if answer_id in there:
                self._answer_keys.setdefault(answer_id.decode(), {})[hard_key] = None
            else:
                answers.remove(hard_key, answer_id)
        self._index, self._answers = questions, answers

    def forget(self, rid: int) -> None:
        """It has its answer, or is gone: nobody waits for the encoder any more. Unknown ids are no-ops."""
        if (call := self._looks.pop(rid, None)) is not None:
            self._cancel(call)

    def _look(self, ask: FindSimilar) -> None:
        if self._encode is None:
            self._tell(Similar(ask.rid, status="unfit"))
            return
        call = self._encode(ask.text_key, self._within_ns, lambda vector, word: self._found(ask, vector, word))
        if call is not None:
            self._looks[ask.rid] = call

    def _found(self, ask: FindSimilar, vector: np.ndarray | None, word: Word) -> None:
        self._looks.pop(ask.rid, None)
        if vector is None:
            self._tell(Similar(ask.rid, status=word))
            return
        self._fresh[ask.text_key] = vector
        self._fresh.move_to_end(ask.text_key)
        if len(self._fresh) > FRESH:
            self._fresh.popitem(last=False)
        near = self._index.search(ask.hard_key, vector, ask.at_most)
        self._tell(Similar(ask.rid, tuple(Neighbour(key, cosine) for key, cosine in near)))

    def _store(self, hard_key: bytes, text_key: bytes) -> None:
        """Into the index; a vector that was late is asked for again, and may take its time."""
        if (vector := self._fresh.get(text_key)) is not None:
            self._index.add(hard_key, text_key, vector)
        elif self._encode is not None:
            self._awaited.add((hard_key, text_key))
            self._encode(text_key, STORE_WITHIN_NS, lambda vector, _: self._store_late(hard_key, text_key, vector))

    def _store_late(self, hard_key: bytes, text_key: bytes, vector: np.ndarray | None) -> None:
        if (hard_key, text_key) in self._awaited:
            self._awaited.discard((hard_key, text_key))
            if vector is not None:
                self._index.add(hard_key, text_key, vector)

"""Who would be served whose answer: the corpus with its traps, and Banking77, as lookups with their neighbours.

A corpus lookup finds questions of its own traffic class only, as in the engine, where the class is in the hard key. All
questions are in the cache at once; a question never finds itself.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np

from engine.errors import UserError
from engine.events import TextMarks
from engine.model.blockhash import Hasher
from engine.model.textmarks import marks_of
from engine.policy.rules import Candidate
from engine.scenario import data_path
from sim.twin.vectors import vectors_of

NEIGHBOURS = 8  # that a rule is shown; the engine's default
HASHER = Hasher(b"quality", 16)
BLOCK_ROWS = 500
PAPER = "Casanueva et al. (2020), Efficient Intent Detection with Dual Sentence Encoders"


class Text(msgspec.Struct, frozen=True):
    """``scope``: what is shared within it only. ``answer``: equal where one answer serves both."""

    text: str
    answer: str
    scope: str = ""
    kind: str = ""  # of a trap
    question: str = ""  # of a trap: the question that it looks like; of a question: its own id, without the wording


class Lookup(msgspec.Struct, frozen=True):
    """A text that was asked, its marks, and what the cache holds nearest to it; ``own``: of a trap, its question."""

    asked: Text
    marks: TextMarks
    near: tuple[Candidate, ...]
    own: tuple[Candidate, ...] = ()


class Material(msgspec.Struct, frozen=True):
    """``traps``: every trap against all questions. ``wordings``: every question against all others of the corpus."""

    traps: list[Lookup]
    wordings: list[Lookup]


def corpus(names: frozenset[str] = frozenset()) -> Material:
    """Of ``data/corpora``. ``names``: see ``marks_of``."""
    questions = [
        Text(row["text"], row["answer_id"], row["traffic_class"], question=row["question_id"].split("-")[0])
        for row in _rows(data_path("corpora", "questions.csv"))
    ]
    traps = [
        Text(row["text"], row["answer_id"], row["traffic_class"], row["kind"], row["question_id"])
        for row in _rows(data_path("corpora", "traps.csv"))
    ]
    by_id = {
        row["question_id"]: question
        for row, question in zip(_rows(data_path("corpora", "questions.csv")), questions, strict=True)
    }
    marks, vectors = _known(questions + traps, names)

    def look(asked: Sequence[Text], own: Callable[[Text], Sequence[Text]]) -> list[Lookup]:
        found = []
        for scope in sorted({text.scope for text in asked}):
            mine = [text for text in asked if text.scope == scope]
            found += _lookups(mine, [text for text in questions if text.scope == scope], marks, vectors, own)
        return found

    return Material(look(traps, lambda trap: [by_id[trap.question]]), look(questions, lambda question: []))


def catalogue_names() -> frozenset[str]:
    """All words of the invented products' names, lower case."""
    products = [row["product"].lower() for row in _rows(data_path("corpora", "products.csv"))]
    return frozenset(word for product in products for word in product.split())


def banking77(folder: Path) -> list[Lookup]:
    """The test rows, each against all train rows. ``folder`` holds ``train.csv`` and ``test.csv``: text, category."""
    train, test = (
        [Text(row["text"], row["category"]) for row in _rows(folder / name)] for name in ("train.csv", "test.csv")
    )
    marks, vectors = _known(train + test, frozenset())
    return _lookups(test, train, marks, vectors, lambda text: [])


def _rows(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    except OSError as error:
        raise UserError(
            f"cannot read {path.name}", where=str(path), why=str(error.strerror),
            fix=f"give the folder that holds Banking77's train.csv and test.csv ({PAPER})",
        ) from None


def _known(texts: Sequence[Text], names: frozenset[str]) -> tuple[dict[str, TextMarks], Mapping[str, np.ndarray]]:
    marks = {text.text: marks_of(text.text, HASHER, names) for text in texts}
    return marks, vectors_of(marks)


def _lookups(
    asked: Sequence[Text],
    stored: Sequence[Text],
    marks: Mapping[str, TextMarks],
    vectors: Mapping[str, np.ndarray],
    own: Callable[[Text], Sequence[Text]],
) -> list[Lookup]:
    """The ``NEIGHBOURS`` nearest of ``stored``, itself left out."""
    found = []
    matrix = np.stack([vectors[text.text] for text in stored])

    def candidate(text: Text, cosine: float) -> Candidate:
        return Candidate((b"", text.text.encode()), round(cosine * 1_000_000), text.answer, marks[text.text])

    for begin in range(0, len(asked), BLOCK_ROWS):
        block = asked[begin : begin + BLOCK_ROWS]
        cosines = np.stack([vectors[text.text] for text in block]) @ matrix.T
        nearest = np.argsort(-cosines, axis=1)[:, : NEIGHBOURS + 1]
        for text, row, order in zip(block, cosines, nearest, strict=True):
            near = [candidate(stored[at], row[at]) for at in order if stored[at] is not text][:NEIGHBOURS]
            mine = [candidate(other, float(vectors[text.text] @ vectors[other.text])) for other in own(text)]
            found.append(Lookup(text, marks[text.text], tuple(near), tuple(mine)))
    return found

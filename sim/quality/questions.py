"""Questions whose right answer is known by name: Banking77's from a folder, the corpus's own and its traps.

A label is a proxy. In Banking77 the intent stands for the answer: one intent may need two answers (wrong hits are then
under-counted), and its labels have known errors (over-counted). In the own corpus the label is the answer's id; a
trap's answer is its own, so whoever serves it anything is wrong.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from hashlib import blake2b
from pathlib import Path

import msgspec
import numpy as np

from engine.errors import UserError
from engine.events import TextMarks
from engine.model.blockhash import Hasher
from engine.model.textmarks import marks_of
from engine.scenario import data_path
from sim.twin.vectors import vectors_of

HASHER = Hasher(b"quality", 16)
PAPER = "Casanueva et al. (2020), Efficient Intent Detection with Dual Sentence Encoders"

OnDone = Callable[[int, int], None]


class Questions(msgspec.Struct, frozen=True):
    """``n`` rows. ``vectors``: fp32 ``[n, 384]``, of length 1. ``scopes``: answers are shared within one only."""

    texts: tuple[str, ...]
    labels: tuple[str, ...]
    marks: tuple[TextMarks, ...]
    vectors: np.ndarray
    scopes: tuple[str, ...]
    read: np.ndarray  # bool [n]: of the half of the corpus that the authors of the word lists had read; all elsewhere

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: Sequence[int] | np.ndarray) -> Questions:
        """These rows, in this order."""
        at = [int(row) for row in rows]
        return Questions(
            tuple(self.texts[i] for i in at), tuple(self.labels[i] for i in at), tuple(self.marks[i] for i in at),
            self.vectors[at], tuple(self.scopes[i] for i in at), self.read[at],
        )  # fmt: skip

    def and_then(self, more: Questions) -> Questions:
        """These rows, then those."""
        return Questions(
            self.texts + more.texts, self.labels + more.labels, self.marks + more.marks,
            np.concatenate([self.vectors, more.vectors]), self.scopes + more.scopes,
            np.concatenate([self.read, more.read]),
        )  # fmt: skip


def banking77(folder: Path, on_done: OnDone = lambda done, of: None) -> tuple[Questions, Questions]:
    """Train and test rows, in the files' order; ``folder`` holds ``train.csv`` and ``test.csv``: text, category."""
    train, test = (_rows(folder / name, "text", "category") for name in ("train.csv", "test.csv"))
    texts = [row["text"] for row in train + test]
    both = _questions(texts, [row["category"] for row in train + test], on_done)
    return both.take(range(len(train))), both.take(range(len(train), len(texts)))


def own_corpus(on_done: OnDone = lambda done, of: None) -> tuple[Questions, Questions]:
    """``data/corpora``: all wordings of all questions, and the traps."""
    asked, traps = (
        _rows(data_path("corpora", name), "text", "answer_id", "traffic_class", "question_id")
        for name in ("questions.csv", "traps.csv")
    )
    rows = asked + traps
    both = _questions(
        [row["text"] for row in rows], [row["answer_id"] for row in rows], on_done,
        [row["traffic_class"] for row in rows], [is_read(row["question_id"]) for row in rows],
    )  # fmt: skip
    return both.take(range(len(asked))), both.take(range(len(asked), len(rows)))


def is_read(question_id: str) -> bool:
    """Whether a question, in all its wordings and with its trap, is of the half that the word lists' authors read."""
    return blake2b(question_id.split("-")[0].encode()).digest()[0] % 2 == 0


def _questions(
    texts: list[str], labels: list[str], on_done: OnDone, scopes: list[str] | None = None,
    read: list[bool] | None = None,
) -> Questions:
    """Rows whose text is too long to have a vector are left out."""
    vectors = vectors_of(texts, on_done)
    kept = [i for i, text in enumerate(texts) if text in vectors]
    marks = {text: marks_of(text, HASHER) for text in vectors}
    return Questions(
        tuple(texts[i] for i in kept),
        tuple(labels[i] for i in kept),
        tuple(marks[texts[i]] for i in kept),
        np.stack([vectors[texts[i]] for i in kept]),
        tuple(scopes[i] if scopes else "" for i in kept),
        np.array([read is None or read[i] for i in kept], bool),
    )


def _rows(path: Path, *columns: str) -> list[dict[str, str]]:
    fix = f"give the folder that holds Banking77's train.csv and test.csv ({PAPER})"
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            lacking = [column for column in columns if column not in (reader.fieldnames or ())]
            if lacking:
                raise UserError(f"{path.name} has no column {lacking[0]!r}", where=str(path), fix=fix)
            return list(reader)
    except OSError as error:
        raise UserError(f"cannot read {path.name}", where=str(path), why=str(error.strerror), fix=fix) from None

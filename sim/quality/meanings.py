"""Answers as texts, and which of them say the same: groups of near answer vectors, as with ``identity = "meaning"``.

``templated``: what a shop's canned answers with slots look like, made here by rule from the intent's name and a word
of the question: nine frames, so two answers to one intent hardly ever agree to the letter. The intent's name is in
each, so this is the easy case. ``generated``: a file of answers by a small model, the hard case.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path

import msgspec
import numpy as np

from engine.errors import UserError
from sim.quality.questions import OnDone, Questions
from sim.twin.vectors import vectors_of

OPENINGS = ("Thank you for asking about {word}.", "Happy to help with {word}!", "Sorry for the trouble with {word}.")
BODIES = (
    "For {topic}, open the app and choose {topic} under Help.",
    "You will find {topic} in the app: go to Help, then {topic}, and follow the steps.",
    "This is a case of {topic}. In the app, Help has a page on {topic} that takes you through it.",
)
TURN = "\nuser\n"  # where a small model went on to talk to itself


class Answered(msgspec.Struct):
    """A line of the file of generated answers."""

    text: str
    answer: str


def templated(questions: Questions) -> list[str]:
    """An answer for each row; the same row always gets the same."""
    return [_frame(text, label) for text, label in zip(questions.texts, questions.labels, strict=True)]


def generated(questions: Questions, path: Path) -> list[str]:
    """Those of the file (JSON lines: text, answer); rows that are not in it have the answer ""."""
    try:
        lines = path.read_bytes().splitlines()
        read = [msgspec.json.decode(line, type=Answered) for line in lines if line]
    except (OSError, msgspec.DecodeError) as error:
        raise UserError("cannot read the generated answers", where=str(path), why=str(error)) from None
    by_text = {each.text: each.answer.split(TURN)[0].strip() for each in read}
    return [by_text.get(text, "") for text in questions.texts]


def groups_of(answers: Sequence[str], same_cosine: float, on_done: OnDone, folder: Path | None = None) -> list[str]:
    """A name for each answer's group, "" for no answer. Leader clustering (Hartigan 1975), in the order given.

    The live cache groups only what it keeps, in the order of asking; here each answer is grouped once, kept or not.
    """
    vectors = vectors_of([answer for answer in answers if answer], on_done, folder)
    leaders = np.empty((len(answers), next(iter(vectors.values())).size), np.float32)
    count = 0
    known: dict[str, str] = {"": ""}
    for answer in answers:
        if answer in known or answer not in vectors:
            continue
        near = leaders[:count] @ vectors[answer]
        best = int(near.argmax()) if count else -1
        if best < 0 or near[best] < same_cosine:
            leaders[count], best, count = vectors[answer], count, count + 1
        known[answer] = f"g{best}"
    return [known.get(answer, "") for answer in answers]


def _frame(text: str, label: str) -> str:
    topic = label.replace("_", " ").lower()
    word = max(text.lower().replace("?", " ").split(), key=len, default="this")
    pick = blake2b(text.encode()).digest()
    body = BODIES[pick[1] % len(BODIES)].format(topic=topic)
    return f"{OPENINGS[pick[0] % len(OPENINGS)].format(word=word)} {body}"

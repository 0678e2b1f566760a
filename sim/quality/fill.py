"""A stream of labelled questions through a rule's own object: what is served, and what of it is wrong.

Filling from empty is what a launch looks like: every miss becomes an entry. Against a full cache nothing is inserted;
that flatters loose rules, since early entries capture all that is near them (``sim/quality/README.md``). A served
question is not stored, as in the engine; one that was computed is, also where the rule had only wanted to compare.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import msgspec
import numpy as np

from engine.policy.rules import DRAWS, Candidate, Lesson, Rule
from sim.quality.neighbours import Neighbours, Present
from sim.quality.questions import Questions

NEIGHBOURS = 8  # that a rule is shown; the engine's default

Rows: TypeAlias = Sequence[int] | np.ndarray
OnAsked = Callable[[int, int], None]


class Outcomes(msgspec.Struct, frozen=True):
    """Of each request, in the order of asking: bool ``[n]``. ``explored``: computed because the rule wished to compare.
    ``audited``: served, and computed as well."""

    served: np.ndarray
    wrong: np.ndarray  # served, and another label's
    explored: np.ndarray
    audited: np.ndarray


class Replay:
    """Questions with their neighbours; the same for any number of rules and orders."""

    def __init__(self, questions: Questions, answers: Sequence[str] | None = None) -> None:
        """``answers``: what a rule sees as a row's answer, "" = not known; its label by default."""
        self.questions = questions
        self.neighbours = Neighbours(questions)
        self._labels = {label: i for i, label in enumerate(dict.fromkeys(questions.labels))}
        self.label_of = [self._labels[label] for label in questions.labels]
        self.show_answers(answers if answers is not None else questions.labels)

    def show_answers(self, answers: Sequence[str]) -> None:
        """From now on, a rule sees these as the rows' answers."""
        self.answers = list(answers)
        self._keys = [(b"", i.to_bytes(4, "big")) for i in range(len(self.questions))]

    def near(self, row: int, present: Present) -> tuple[list[Candidate], list[int]]:
        """What a rule is shown, and the candidates' rows."""
        rows, cosines = self.neighbours.nearest(row, present, NEIGHBOURS)
        marks = self.questions.marks
        near = [
            Candidate(self._keys[at], cosine, self.answers[at], marks[at])
            for at, cosine in zip(rows, cosines, strict=True)
        ]
        return near, rows

    def fill(
        self, rule: Rule, order: Rows, stored: Rows = (), insert: bool = True,
        audit_share: float = 0.0, seed: int = 0, relaxed: bool = False, on_asked: OnAsked = lambda done, of: None,
        store_right: bool = True,
    ) -> Outcomes:
        """Ask the rows of ``order``. ``stored``: rows that are in the cache before. ``seed``: of audits and draws.
        ``store_right``: False leaves out what was compared and found to be answered already, as vCache does."""
        present = Present(len(self.questions))
        for row in stored:
            present.insert(int(row))
        rng = np.random.default_rng(seed)
        draws = rng.integers(0, DRAWS, len(order)).tolist()
        audits = (rng.random(len(order)) < audit_share).tolist()
        served, wrong, explored, audited = (np.zeros(len(order), bool) for _ in range(4))
        for at, asked in enumerate(order):
            row = int(asked)
            near, rows = self.near(row, present)
            said = rule.judge(self.questions.marks[row], near, relaxed, draws[at])
            if said.serve is not None:
                right = self.label_of[rows[said.serve]] == self.label_of[row]
                served[at], wrong[at] = True, not right
                if audits[at]:
                    audited[at] = True
                    chosen = near[said.serve]
                    rule.learn(Lesson(chosen.key, chosen.cosine_millionths, right, True, said.approximate))
            else:
                right = False
                if said.compare is not None:
                    explored[at] = True
                    chosen = near[said.compare]
                    right = self.label_of[rows[said.compare]] == self.label_of[row]
                    rule.learn(Lesson(chosen.key, chosen.cosine_millionths, right, False))
                if insert and (store_right or not right):
                    present.insert(row)
            if at % 500 == 0:
                on_asked(at, len(order))
        return Outcomes(served, wrong, explored, audited)

"""A replica's journal as steps: what ran when, of which shape, for how long. For utilisation and cost errors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec

from engine.events import Plan, RunStep, StepDone, StepShape
from engine.ledger.journal import open_journal
from engine.model.stepcost import StepCost


class LoggedStep(msgspec.Struct, frozen=True, gc=False):
    """One ``RunStep`` that was done."""

    at_ns: int
    ns: int
    steps: int
    shape: StepShape


def logged_steps(journal: Path) -> Iterator[LoggedStep]:
    """All steps of a replica's journal, in order."""
    planned: tuple[int, StepShape] | None = None
    for entry in open_journal(journal).entries():
        if isinstance(entry.event, Plan):
            planned = next(((entry.at_ns, a.shape) for a in entry.actions if isinstance(a, RunStep)), None)
        elif isinstance(entry.event, StepDone) and planned is not None:
            yield LoggedStep(planned[0], entry.at_ns - planned[0], entry.event.steps, planned[1])
            planned = None


def predicted_ns(cost: StepCost, step: LoggedStep) -> int:
    """What the cost model says of it."""
    return sum(cost.ns(step.shape, later) for later in range(step.steps))

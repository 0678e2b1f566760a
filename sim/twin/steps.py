"""A replica's journal as steps: what ran when, of which shape, for how long; and how well costs are known there."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from statistics import median

import msgspec

from engine.events import Plan, RunStep, StepDone, StepShape
from engine.ledger.journal import open_journal
from sim.twin.cost import Calibration


class LoggedStep(msgspec.Struct, frozen=True, gc=False):
    """One ``RunStep`` that was done."""

    at_ns: int
    ns: int
    steps: int
    shape: StepShape
    forward_ns: int = 0  # of ``ns``, in the model; 0 where the runner timed nothing: fake, twin, older journals
    sample_ns: int = 0  # of ``ns``, from logits to tokens


def replica_journals(folder: Path) -> list[Path]:
    """Of all replicas of a run, and of all their lives."""
    return sorted((folder / "journal").glob("replica-*.ndjson"))


def logged_steps(journal: Path) -> Iterator[LoggedStep]:
    """All steps of a replica's journal, in order."""
    planned: tuple[int, StepShape] | None = None
    for entry in open_journal(journal).entries():
        if isinstance(entry.event, Plan):
            planned = next(((entry.at_ns, a.shape) for a in entry.actions if isinstance(a, RunStep)), None)
        elif isinstance(entry.event, StepDone) and planned is not None:
            done = entry.event
            yield LoggedStep(
                planned[0], entry.at_ns - planned[0], done.steps, planned[1], done.forward_ns, done.sample_ns
            )
            planned = None


def shapes(step: LoggedStep) -> Iterator[StepShape]:
    """Each step of a run of them: from one to the next, every decode row has grown by a token."""
    first = step.shape
    for later in range(step.steps):
        yield msgspec.structs.replace(first, decode_kv_tokens=first.decode_kv_tokens + later * first.decode_rows)


def outside_share(calibration: Calibration, *journals: Path) -> tuple[float, int]:
    """(share of the steps that lie outside of what was measured, number of steps)."""
    steps = chain.from_iterable(map(logged_steps, journals))
    outside = [calibration.outside(shape) for step in steps for shape in shapes(step)]
    return sum(outside) / max(1, len(outside)), len(outside)


def outside_words(calibration: Calibration, *journals: Path) -> str:
    """The same, for people."""
    share, count = outside_share(calibration, *journals)
    return f"{share:.1%} of {count:,} twin steps lie outside of the calibrated range"


class CostError(msgspec.Struct, frozen=True):
    """Predicted against measured time of a journal's steps, relative; and what the measured time went into."""

    steps: int
    median: float  # of the absolute errors
    total: float  # of the sums
    forward: float = 0.0  # share of the measured time in the model; 0 where no runner timed it
    sampling: float = 0.0

    def __str__(self) -> str:
        words = f"median {self.median:.1%}, total {self.total:+.1%} ({self.steps:,} runs of steps)"
        parts = f"; of the time {self.forward:.1%} in the model, {self.sampling:.1%} sampling"
        return words + parts if self.forward else words


def cost_error(calibration: Calibration, *journals: Path) -> CostError:
    """How well the costs fit what live replicas did; what lies between its steps is left out."""
    cost = calibration.cost
    steps = [step for step in chain.from_iterable(map(logged_steps, journals)) if step.ns > 0]
    if not steps:
        return CostError(0, 0.0, 0.0)
    said = [sum(map(cost.ns, shapes(step))) for step in steps]
    took = sum(step.ns for step in steps)
    return CostError(
        len(steps), median(abs(ns / step.ns - 1) for ns, step in zip(said, steps, strict=True)), sum(said) / took - 1,
        sum(step.forward_ns for step in steps) / took, sum(step.sample_ns for step in steps) / took,
    )

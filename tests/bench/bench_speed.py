"""Decode and prefill tokens a second of SmolLM2 against other engines, and against the bare matrix products of a step.

128-token prompts, 64 new tokens, greedy, no early stop, batch 1, 8, 16, 32, two threads; fp32 but for xllamacpp, which
reads the Q4_1 file. All in one run: for each batch size the contenders take turns, in rounds that begin with another
one each time, so that a busy machine hits all alike. Each gets the same tokens, other ones in each round.

The table goes to stderr: medians over the rounds, the best round in brackets. ``make bench-peers`` makes the peers'
environments and runs this; without them it runs with those that are here, and says which are not.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from statistics import median
from typing import NamedTuple

from engine.model.folder import prepare
from tests.bench.contender import FLOOR, OTHERS, OURS, Contender, Process, Timing
from tests.bench.figure import Figure
from tests.bench.peers.line import Job
from tests.bench.prompts import cut_prompts

BATCHES, PROMPT_TOKENS, NEW_TOKENS, ROUNDS = (1, 8, 16, 32), 128, 64, 2
WARM_UP = (1, 8)  # batch sizes; kernels, allocators, servers


class Row(NamedTuple):
    """A contender at a batch size: one timing a round, in the order of the rounds."""

    batch: int
    timings: list[Timing]

    @property
    def step_ms(self) -> float:
        """Of all steps of all rounds, the middle one."""
        return median(step for timing in self.timings for step in timing.steps_ms)

    @property
    def decode_tps(self) -> float:
        """From the middle step: what a neighbour on the machine took is left out for all alike."""
        return self.batch * 1e3 / self.step_ms

    @property
    def prefill_tps(self) -> float:
        """All prompts' tokens over the time until all had their first."""
        return self.batch * PROMPT_TOKENS / median(timing.prefill_s for timing in self.timings)

    @property
    def best_decode_tps(self) -> float:
        """The best round's."""
        return self.batch * 1e3 / min(timing.step_ms for timing in self.timings)

    @property
    def best_prefill_tps(self) -> float:
        """The best round's."""
        return self.batch * PROMPT_TOKENS / min(timing.prefill_s for timing in self.timings)


def bench(device: str = "cpu") -> list[Figure]:
    """Our tokens/s over each other contender's, batch by batch; our step over the floor where there is one."""
    loads = [os.getloadavg()[0]]
    processes = dict(_start(device))
    try:
        rows = dict(_measure(processes, loads))
    finally:
        for process in processes.values():
            process.close()
    _table(rows, loads)
    return list(_figures(rows))


def _start(device: str) -> Iterator[tuple[Contender, Process]]:
    folder = prepare("smollm2", lambda line: None)
    for contender in (FLOOR, OURS, *OTHERS):
        if device not in contender.devices:
            continue
        if not contender.python.exists():
            _say(f"{contender.name} is not here: make bench-peers brings it")
            continue
        _say(f"starting {contender.name}")
        try:
            yield contender, Process(contender, folder, device)
        except RuntimeError as error:
            if contender in (FLOOR, OURS):
                raise
            _say(f"it is left out: {error}")


def _measure(processes: dict[Contender, Process], loads: list[float]) -> Iterator[tuple[tuple[Contender, int], Row]]:
    prompts = cut_prompts(prepare("smollm2", lambda line: None), PROMPT_TOKENS)
    for batch in WARM_UP:
        for process in processes.values():
            process.ask(Job(prompts[-batch:], 3))
    order = list(processes)
    for batch in BATCHES:
        rows = {contender: Row(batch, []) for contender in order}
        for number in range(ROUNDS):
            job = Job(prompts[number * batch : (number + 1) * batch], NEW_TOKENS)
            for contender in order[number % len(order) :] + order[: number % len(order)]:
                rows[contender].timings.append(processes[contender].ask(job))
            loads.append(os.getloadavg()[0])
            _say(f"batch {batch}, round {number + 1} of {ROUNDS}, load average {loads[-1]:.1f}")
        yield from (((contender, batch), row) for contender, row in rows.items())


def _table(rows: dict[tuple[Contender, int], Row], loads: list[float]) -> None:
    """One line a contender and batch size."""
    _say(f"SmolLM2-135M, {PROMPT_TOKENS}-token prompts, {NEW_TOKENS} new, 2 threads, median of {ROUNDS} rounds (best); "
         f"load average {min(loads):.1f} to {max(loads):.1f}")
    _say(f"{'contender':<28}{'batch':>6}{'decode tok/s':>16}{'prefill tok/s':>16}{'step ms':>9}{'ours / it':>11}"
         f"{'prefill':>9}{'/ floor':>9}")
    for (contender, batch), row in rows.items():
        ours, floor = rows[OURS, batch], rows.get((FLOOR, batch))
        of_floor = f"{row.step_ms / floor.step_ms:.2f}" if floor else ""
        _say(f"{contender.name:<28}{batch:>6}{f'{row.decode_tps:.0f} ({row.best_decode_tps:.0f})':>16}"
             f"{f'{row.prefill_tps:.0f} ({row.best_prefill_tps:.0f})':>16}{row.step_ms:>9.1f}"
             f"{ours.decode_tps / row.decode_tps:>11.2f}{ours.prefill_tps / row.prefill_tps:>9.2f}{of_floor:>9}")


def _figures(rows: dict[tuple[Contender, int], Row]) -> Iterator[Figure]:
    for (contender, batch), row in rows.items():
        ours = rows[OURS, batch]
        if contender == FLOOR:
            yield Figure(ours.step_ms, f"ms a decode step, batch {batch}", "packed matrix products alone", row.step_ms)
        elif contender != OURS:
            yield Figure(ours.decode_tps, f"decode tokens/s, batch {batch}", contender.name, row.decode_tps)
            yield Figure(ours.prefill_tps, f"prefill tokens/s, batch {batch}", contender.name, row.prefill_tps)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)

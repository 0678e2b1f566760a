"""A step's policy time with 200 requests waiting: fair between twelve tenants, against first come first served.

Both in one run, in turn, through the whole replica machine: settle the last step, end what is done, take in as many
new ones, plan. Prompts are short, so that nearly every step takes somebody in: the waiting room's worst case.
"""

from __future__ import annotations

import time

from engine.config import BatcherConfig, FairnessConfig, PrefixConfig, ReplicaConfig
from engine.events import Plan, RunStep, SeqEnd, StepDone, Submit
from engine.policy.replica import Replica

WAITING, TENANTS, OUTPUTS, STEPS, ROUNDS = 200, 12, 8, 2_000, 5


def bench() -> tuple[float, str, str, float]:
    """(fair, unit, baseline, first come first served)."""
    best = {True: float("inf"), False: float("inf")}
    for _ in range(ROUNDS):
        for enabled in best:
            best[enabled] = min(best[enabled], _step_us(enabled))
    return best[True], f"us per step, {WAITING} waiting", "fairness.enabled = false", best[False]


def _step_us(enabled: bool) -> float:
    replica = Replica(
        ReplicaConfig(
            batcher=BatcherConfig(step_tokens=128, slots=16), prefix=PrefixConfig(blocks=512),
            fairness=FairnessConfig(enabled=enabled), weights={f"tenant-{n}": 1.0 + n % 3 for n in range(TENANTS)},
        )
    )
    left: dict[int, int] = {}  # outputs to come, of those that run
    sid = 0
    began = time.process_time()
    for number in range(STEPS):
        if number == STEPS // 10:  # full and in its stride
            began = time.process_time()
        while len(replica.batcher.sequences) - len(left) < WAITING:
            tenant = f"tenant-{sid * 7 % TENANTS}"
            replica.handle(number, Submit(sid, sid, tenant, "help", 1, number, 1 << 60, 20, OUTPUTS))
            sid += 1
        for action in replica.handle(number, Plan()):
            if isinstance(action, RunStep):
                left.update((start.sid, OUTPUTS) for start in action.start)
        done = _run(left)
        replica.handle(number, StepDone(1, ended=tuple(SeqEnd(row, "length") for row in done)))
    return (time.process_time() - began) / (STEPS - STEPS // 10) * 1e6


def _run(left: dict[int, int]) -> list[int]:
    for row in left:
        left[row] -= 1
    done = [row for row, tokens in left.items() if not tokens]
    for row in done:
        del left[row]
    return done

"""A live sale, and before it critical work's questions one after another, by one user with nobody else there.

The promise of "zero degradation" is the same tokens and hardly more waiting, so it needs both: each answer alone and
the same question's answer in the crowd. Alone they are asked of an engine of their own: the sale must not find their
blocks in its prefix cache. After the sale the engine is left running until its level is 0.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import TypeAlias

import httpx

from engine.scenario import Resolved
from sim import sale
from sim.desk.held import ALONE
from sim.live import LiveEngine, live_engine
from sim.loadgen import one_by_one
from sim.twin.workload import Request

Texts: TypeAlias = tuple[dict[str, str], dict[str, str]]  # by request id of the sale: alone, and in the crowd
CALM_WITHIN_S = 30.0
LOOK_EVERY_S = 0.25
LEVEL_ZERO = "\ndoorbuster:overload_level 0.0\n"


def sale_between(
    resolved: Resolved, sets: tuple[str, ...], requests: list[Request], duration_s: float, seed: int, folder: Path
) -> Texts:
    """The sale into ``folder``; the texts of its critical requests."""
    critical = [r for r in requests if r.traffic_class == next(iter(resolved.scenario.classes))]
    with live_engine(resolved, sets, folder / ALONE) as engine:
        alone = asyncio.run(one_by_one(engine.url, engine.keys, critical))
    _, seen = sale.live_sale(resolved, sets, requests, duration_s, seed, folder, lambda done: None, after=until_calm)
    wanted = {r.request_id for r in critical}
    return (
        {each.request_id: each.text for each in alone if each.text},
        {each.request_id: each.text for each in seen if each.request_id in wanted and each.text},
    )


def until_calm(engine: LiveEngine) -> None:
    """Until the overload level is 0, or half a minute long: then the records say that it never was."""
    end = time.monotonic() + CALM_WITHIN_S
    while time.monotonic() < end and LEVEL_ZERO not in httpx.get(f"{engine.url}/metrics", trust_env=False).text:
        time.sleep(LOOK_EVERY_S)

"""The event loop that serves: uvloop's where it is installed, else asyncio's own. Nothing else depends on which."""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import Coroutine
from typing import Any, Literal, TypeVar

T = TypeVar("T")
LoopName = Literal["uvloop", "asyncio"]


def best_loop() -> LoopName:
    """What is there. uvloop has no build for Windows, and not at once for a new Python."""
    return "uvloop" if importlib.util.find_spec("uvloop") else "asyncio"


def run(work: Coroutine[Any, Any, T], loop: LoopName | None = None) -> T:
    """``asyncio.run``, on that loop; None = the best that is there."""
    factory = None
    if (loop or best_loop()) == "uvloop":
        import uvloop

        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(work)

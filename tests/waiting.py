"""Waiting for what another process does: it sends no event, so its state is looked at until it is there, or overdue."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
DEADLINE_S, LOOK_S = 30.0, 0.01


def until(true: Callable[[], T], what: str, deadline_s: float = DEADLINE_S) -> T:
    """The first value of ``true`` that is one; a failure that names ``what`` when it is overdue."""
    overdue_s = time.monotonic() + deadline_s
    while not (value := true()):
        assert time.monotonic() < overdue_s, f"never: {what}"
        time.sleep(LOOK_S)
    return value

"""How much a part of the engine holds on to: everything that can be reached from it, counted."""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from pathlib import Path

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def rss_mb(pid: int | str = "self") -> float:
    """Resident memory of a process, from /proc."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE_BYTES / 2**20


def held(root: object, but: Iterable[object] = ()) -> Counter[str]:
    """Objects that are reached from ``root`` through containers and the engine's own objects, by type. Not ``but``."""
    seen, todo, found = {id(one) for one in but}, [root], Counter[str]()
    while todo:
        one = todo.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        found[type(one).__name__] += 1
        todo += _inside(one)
    return found


def _inside(one: object) -> Iterator[object]:
    if isinstance(one, dict):
        yield from one.keys()
        yield from one.values()
    elif isinstance(one, list | tuple | set | frozenset | deque):
        yield from one
    elif type(one).__module__.startswith("engine."):
        slots = (name for kind in type(one).__mro__ for name in getattr(kind, "__slots__", ()))
        yield from (getattr(one, name) for name in (*getattr(one, "__dict__", ()), *slots) if hasattr(one, name))

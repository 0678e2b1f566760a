"""Open-loop load from a process of its own: the engine under test must not wait for its client's interpreter."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor

from sim.loadgen import Seen, play
from sim.twin.workload import Request

Playing = Callable[[list[Request]], "Future[list[Seen]]"]


def play_all(url: str, keys: dict[str, str], requests: list[Request]) -> list[Seen]:
    """In the other process."""
    return asyncio.run(play(url, keys, requests))


@contextlib.contextmanager
def player(url: str, keys: dict[str, str]) -> Iterator[Playing]:
    """``play(requests)`` begins at once; its result is what the client saw, in the order of the requests."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        yield lambda requests: pool.submit(play_all, url, keys, requests)

"""Engines for this folder's tests: one that many share and nobody hurts, and as many of their own as tests need."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest

from tests.service.harness import Engine, start

Starter = Callable[..., Engine]


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """Answers at once. Exact answers are kept: ask what no other test asks."""
    with start(tmp_path_factory.mktemp("shared")) as engine:
        yield engine


@pytest.fixture
def started(tmp_path: object, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Starter]:
    """``started(cost, section=...)``: an engine of this test alone, stopped after it."""
    with contextlib.ExitStack() as stack:
        yield lambda *args, **changes: stack.enter_context(start(tmp_path_factory.mktemp("own"), *args, **changes))

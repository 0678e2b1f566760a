"""Real files whose ``sync`` waits at a gate: a slow disk that a test holds in its hand."""

from __future__ import annotations

import threading

from engine.ledger.files import OsFiles

PATIENCE_S = 30.0  # a test that hangs fails by this


class GatedFiles(OsFiles):
    """``shut`` the gate and the next sync waits there until it is opened; ``reached`` says that one does."""

    def __init__(self) -> None:
        self._open, self._reached = threading.Event(), threading.Event()
        self._open.set()
        self.syncs = 0

    def shut(self) -> None:
        self._reached.clear()
        self._open.clear()

    def open(self) -> None:
        self._open.set()

    def reached(self) -> None:
        assert self._reached.wait(PATIENCE_S), "no sync came"

    def sync(self, handle: int) -> None:
        self.syncs += 1
        if not self._open.is_set():
            self._reached.set()
            assert self._open.wait(PATIENCE_S), "the gate was never opened"
        super().sync(handle)

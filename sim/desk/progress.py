"""Progress in one line: ``sweep 120/400 runs  31/s  9 s left  budget 28 %``.

Three faces: a terminal gets one line rewritten in place, a notebook one text output updated in place (no widgets), a
pipe a line at each tenth of the way. All talk goes to stderr; results own stdout.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import IO, Any, Literal, Self

Face = Literal["terminal", "notebook", "pipe"]
EVERY_S = 0.1  # a terminal that is rewritten more often only flickers


class Progress:
    """``with Progress("sweep", 400, "runs", budget_s=60) as p: ... p.step()``."""

    def __init__(
        self, what: str, total: int, unit: str = "", budget_s: float | None = None, stream: IO[str] | None = None,
        clock: Callable[[], float] = time.monotonic, face: Face | None = None,
    ) -> None:
        self.what, self.total, self.unit, self.budget_s = what, total, unit, budget_s
        self.done = 0
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._began = self._shown_at = clock()
        self._tenths = -1
        self._handle: Any = None
        self.face: Face = face or _face(self._stream)
        self._width = 0

    def step(self, n: int = 1) -> None:
        """``n`` more are done."""
        self.update(self.done + n)

    def update(self, done: int) -> None:
        """``done`` in all are done; says so when it is time to."""
        self.done = done
        tenths = 10 if self.total <= 0 else min(10, 10 * done // self.total)
        now = self._clock()
        if self.face == "pipe":
            if tenths > self._tenths:
                self._show(now)
        elif now - self._shown_at >= EVERY_S or done >= self.total:
            self._show(now)
        self._tenths = tenths

    def line(self, now: float | None = None) -> str:
        """What is shown, as of now."""
        took = (self._clock() if now is None else now) - self._began
        parts = [f"{self.what} {self.done}/{self.total} {self.unit}".rstrip()]
        if self.done and took > 0:
            rate = self.done / took
            parts.append(f"{rate:.0f}/s" if rate >= 10 else f"{rate:.2g}/s")
            parts.append(f"{_span(max(0, self.total - self.done) / rate)} left")
        if self.budget_s:
            parts.append(f"budget {100 * took / self.budget_s:.0f} %")
        return "  ".join(parts)

    def close(self) -> None:
        """The last word; more than once is fine."""
        if self.face == "terminal" and self._width:
            self._show(self._clock())
            self._stream.write("\n")
            self._stream.flush()
            self._width = 0
        elif self.face == "notebook" and self._handle is not None:
            self._show(self._clock())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _show(self, now: float) -> None:
        self._shown_at = now
        text = self.line(now)
        if self.face == "notebook":
            self._display(text)
            return
        if self.face == "terminal":
            self._stream.write("\r" + text.ljust(self._width))
            self._width = len(text)
        else:
            self._stream.write(text + "\n")
        self._stream.flush()

    def _display(self, text: str) -> None:
        from IPython import display as ipython

        content = {"text/plain": text}
        if self._handle is None:
            show: Any = ipython.display
            self._handle = show(content, raw=True, display_id=True)
        else:
            self._handle.update(content, raw=True)


def _face(stream: IO[str]) -> Face:
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    if shell is not None and hasattr(shell, "kernel"):
        return "notebook"
    return "terminal" if stream.isatty() else "pipe"


def _span(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 100 else f"{minutes / 60:.1f} h"

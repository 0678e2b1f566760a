"""Stop strings: where a text that comes in pieces must end, and what may be sent before that is known.

A stop string may begin in one token and end in another, so the end of the text that could still become one is held
back. Which string cuts follows from the text alone, however it was cut into pieces: the one that is complete first,
and of those complete at the same character the longest. Knows no tokens.
"""

from __future__ import annotations

MAX_STOPS = 4
MAX_STOP_CHARS = 256  # each is compared with the text's end at every token


class StopStrings:
    """The stop strings of one answer. ``hit`` once one was complete: there is no text after it."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops, self._held = stops, ""
        self.hit = False

    def push(self, text: str) -> str:
        """More text; what is certain to stand before any stop string. "" after a hit."""
        if self.hit or not self._stops:
            return "" if self.hit else text
        text = self._held + text
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.hit, self._held = True, ""
            return text[: min(found)[1]]
        kept = len(text) - max(_beginning(text, stop) for stop in self._stops)
        self._held = text[kept:]
        return text[:kept]

    def flush(self) -> str:
        """No more text will come: what was held back stands as it is."""
        text, self._held = self._held, ""
        return text


def cut(text: str, stops: tuple[str, ...]) -> str:
    """A whole text up to its first stop string."""
    matcher = StopStrings(stops)
    return matcher.push(text) + matcher.flush()


def _beginning(text: str, stop: str) -> int:
    """Characters at the end of ``text`` that are the beginning of ``stop``, at most."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)

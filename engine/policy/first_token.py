"""How long an upstream takes to the first token when it has nothing else to do: the least that was ever seen of late.

Two lower bounds, the higher counts: the shortest time of all, and the shortest per prompt token times the prompt. What
a request waits beyond that, it waits for others. The least of this minute and of the last one in which anything was
seen: a server that was restarted on a slower machine is learnt anew, and a minute of overload does not make overload
normal. Method: the no-load round trip of Vegas, corrected for the prompt's length; total latency would measure how long
answers are.
"""

from __future__ import annotations

from engine.units import S_NS

MEMORY_NS = 60 * S_NS
PICO = 1000  # times per token are kept in thousandths of a nanosecond


class FirstTokens:
    """Owned by a Lane."""

    def __init__(self) -> None:
        self._least: list[tuple[int, int] | None] = [None, None]  # (ns, ps a token) of the last minute and of this one
        self._since_ns = 0

    def add(self, now_ns: int, took_ns: int, prompt_tokens: int) -> None:
        """A first token came ``took_ns`` after the request was sent."""
        if now_ns - self._since_ns >= MEMORY_NS:
            self._least, self._since_ns = [self._least[1], None], now_ns
        seen = took_ns, took_ns * PICO // max(1, prompt_tokens)
        last = self._least[1]
        self._least[1] = seen if last is None else (min(last[0], seen[0]), min(last[1], seen[1]))

    def least_ns(self, prompt_tokens: int) -> int | None:
        """From sending a request to its first token at the earliest; None while nothing is known."""
        known = [least for least in self._least if least is not None]
        if not known:
            return None
        return max(min(ns for ns, _ in known), min(ps for _, ps in known) * prompt_tokens // PICO)

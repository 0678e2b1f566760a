"""Requests for soaks: common openings, tails that nobody had before, three classes and tenants, some with pins."""

from __future__ import annotations

import random
from collections import Counter

from engine.events import Ended, Submit
from engine.model.blockhash import Hasher
from engine.model.stepping import SamplingParams
from engine.model.wire import Output, Work
from engine.units import S_NS
from tests.model.hand import prompt_of

TENANTS = ("shop", "bank", "press")


class Visitors:
    """Seeded. ``live``: whose end has not been heard; ``ends``: by reason."""

    def __init__(self, hasher: Hasher, most_tokens: int, longest_tail: int) -> None:
        self.hasher, self.most_tokens, self.longest_tail = hasher, most_tokens, longest_tail
        self.rng, self.sid = random.Random(3), 0
        self.live: set[int] = set()
        self.ends: Counter[str] = Counter()
        self.openings = [prompt_of(900 + n, length) for n, length in enumerate((32, 50, 64))]

    def ask(self, now_ns: int) -> Work:
        """The next one."""
        tail = prompt_of(10_000 + self.sid, self.rng.randint(1, self.longest_tail))
        return self.ask_exactly(now_ns, self.rng.choice(self.openings) + tail, self.rng.randint(1, self.most_tokens))

    def ask_exactly(self, now_ns: int, prompt: list[int], max_tokens: int) -> Work:
        rng, sid, tenant = self.rng, self.sid, self.rng.choice(TENANTS)
        self.sid += 1
        self.live.add(sid)
        priority = rng.choice((0, 1, 1, 2))
        submit = Submit(
            sid=sid, rid=sid, tenant=tenant, traffic_class=("fraud", "chat", "mail")[priority], priority=priority,
            sent_ns=now_ns, start_by_ns=now_ns + 60 * S_NS, prompt_tokens=len(prompt), max_tokens=max_tokens,
            blocks=self.hasher.chain(self.hasher.root(tenant, "soak"), prompt), pinned_blocks=2 * (priority == 0),
        )  # fmt: skip
        return Work(submit, prompt, SamplingParams(temperature=rng.choice((0.0, 0.7)), seed=sid))

    def anyone(self) -> int:
        """One who is still there."""
        return self.rng.choice(sorted(self.live))

    def hear(self, output: Output | None) -> None:
        for event in output.events if output else ():
            if isinstance(event, Ended):
                self.live.remove(event.sid)
                self.ends[event.reason] += 1

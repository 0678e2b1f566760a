"""``Reserve`` against a reference that keeps nothing but the sequences that run, and counts from them each time.

Mutations it caught: what is owed not lowered at growth, or at an end; the last output needs a block; rounded down; the
share never jumps, never decays, or falls below its least; the victims' part kept.
"""

from __future__ import annotations

from fractions import Fraction
from math import ceil, floor

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.config import BatcherConfig, PrefixConfig
from engine.events import Submit
from engine.policy.reserve import ONE, Reserve
from engine.policy.sequence import Sequence

SIZE, BLOCKS = 4, 100


def sequence(sid: int, prompt: int, outputs: int, max_tokens: int, priority: int) -> Sequence:
    ask = Submit(sid, sid, "t", "c", priority, 0, 1 << 60, prompt, max_tokens)
    return Sequence(ask, [], "t", priority, 0, known=prompt + outputs)


class ReserveMachine(RuleBasedStateMachine):
    @initialize(
        reserve=st.sampled_from(["full", "ratio", "ratio", "none"]), start=st.integers(0, 10), least=st.integers(0, 10),
        decay=st.integers(1, 50), jump=st.integers(0, 10), watermark=st.integers(0, 100), reserved=st.integers(0, 9),
    )
    def begin(self, reserve: str, start: int, least: int, decay: int, jump: int, watermark: int, reserved: int) -> None:
        self.kind, self.least, self.jump = reserve, Fraction(least, 10), Fraction(jump, 10)
        self.decay, self.watermark, self.reserved = decay, floor(BLOCKS * (watermark / 100)), reserved
        self.share = {"full": Fraction(1), "none": Fraction(0), "ratio": Fraction(start, 10)}[reserve]
        self.ours = Reserve(
            BatcherConfig(
                reserve=reserve, reserve_start=start / 10, reserve_least=least / 10, reserve_decay_steps=decay,
                reserve_jump=jump / 10, watermark=watermark / 100, reserved_blocks=reserved,
            ),
            PrefixConfig(blocks=BLOCKS, block_tokens=SIZE),
        )
        self.running: dict[int, Sequence] = {}
        self.sid = 0

    def to_come(self, seq: Sequence, blocks: int) -> int:
        """Token by token: blocks that its outputs to come touch, beyond the ones it has. The last leaves no KV."""
        tokens = range(seq.ask.prompt_tokens + seq.ask.max_tokens - 1)
        return len({position // SIZE for position in tokens} - set(range(blocks)))

    @rule(prompt=st.integers(1, 30), outputs=st.integers(0, 8), more=st.integers(1, 40), priority=st.integers(0, 2))
    def enter(self, prompt: int, outputs: int, more: int, priority: int) -> None:
        seq = sequence(self.sid, prompt, outputs, outputs + more, priority)
        self.sid += 1
        for victims in ([], [*self.running.values()][::2]):
            beside = len(self.running) - len(victims)
            stay = [s for s in self.running.values() if s not in victims]
            owed = sum(self.to_come(s, len(s.table)) for s in stay) + self.to_come(seq, ceil(seq.known / SIZE))
            want = ceil(owed * Fraction(self.ours.share, ONE))
            if priority:
                want += max(self.reserved, self.watermark if beside else 0)
            assert self.ours.kept(seq, beside, without=victims) == want
        seq.table = list(range(ceil(seq.known / SIZE)))
        self.running[seq.ask.sid] = seq
        self.ours.entered(seq)

    @precondition(lambda self: any(s.owes for s in self.running.values()))
    @rule(every=st.integers(1, 3))
    def grow(self, every: int) -> None:
        rows = [s for s in self.running.values() if self.to_come(s, len(s.table))][::every]
        for seq in rows:
            seq.table.append(0)
        self.ours.grew(rows)

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 99))
    def leave(self, which: int) -> None:
        sid = [*self.running][which % len(self.running)]
        self.ours.left(self.running.pop(sid))

    @rule(steps=st.integers(1, 20))
    def went_well(self, steps: int) -> None:
        self.ours.went_well(steps)
        if self.kind == "ratio":
            for _ in range(steps):
                self.share = max(min(self.share, self.least), self.share - Fraction(1, self.decay))

    @rule()
    def ran_short(self) -> None:
        self.ours.ran_short()
        if self.kind == "ratio":
            self.share += (1 - self.share) * self.jump

    @invariant()
    def agrees(self) -> None:
        if hasattr(self, "ours"):
            self.ours.check(self.running.values(), BLOCKS * 100)
            assert self.ours.owed == sum(self.to_come(s, len(s.table)) for s in self.running.values())
            assert abs(Fraction(self.ours.share, ONE) - self.share) < Fraction(1, 1000), "a share, but for rounding"


ReserveMachine.TestCase.settings = settings(max_examples=120, stateful_step_count=30, deadline=None)
TestReserve = ReserveMachine.TestCase

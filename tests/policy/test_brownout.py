"""From level 1 on a class may have its answers cut at ``brownout_max_tokens``: what is computed then, and never later.

A whole Gateway against a model that knows how much each question has to say: whoever met level 0 gets all of that, from
wherever it comes, and nobody less than the cap.

Run: python -m pytest tests/policy/test_brownout.py -q
Mutations it caught: a critical class cut; the level of now in place of the one met; what was cut kept, in either cache;
a full answer thrown away because a cap stood by; a full request aboard of a capped flight, of the same or of a similar
question; one that might ride on a full flight computed beside it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.cache_config import SemanticConfig
from engine.config import ClassConfig, GatewayConfig, OverloadConfig
from engine.errors import UserError
from engine.events import (
    Answer,
    Arrive,
    Attach,
    DropVector,
    Ended,
    FindSimilar,
    FirstToken,
    GatewayEvent,
    Neighbour,
    Pressure,
    Similar,
    StoreAnswer,
    StoreVector,
    Submit,
    Waiting,
    Wake,
)
from engine.policy.gateway import Gateway
from engine.scenario import load
from engine.units import MS_NS

CAP = 5
CLASSES = {
    "chat": ClassConfig("standard", slo_ttft_ms=1000, brownout_max_tokens=CAP),
    "tips": ClassConfig("sheddable", slo_ttft_ms=1000, brownout_max_tokens=CAP, caches="semantic"),
    "help": ClassConfig("standard", slo_ttft_ms=1000),
    "fraud": ClassConfig("critical", slo_ttft_ms=1000, brownout_max_tokens=CAP),  # no scenario has that: see below
}
OVERLOAD = OverloadConfig(brownout_share=0.2, degraded_share=0.9, shed_share=0.95)


@dataclass
class World:
    """``says[question]`` tokens has each question's answer, were it let finish."""

    says: list[int]
    now_ns: int = 0
    rids: int = 0
    asked: dict[int, tuple[Arrive, int]] = field(default_factory=dict)  # and the level that it met
    flying: dict[int, Submit] = field(default_factory=dict)
    rides: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.machine = Gateway(GatewayConfig(
            classes=CLASSES, tenants={}, overload=OVERLOAD, semantic=SemanticConfig(coalesce=True),
        ))

    def tell(self, event: GatewayEvent) -> list:
        actions = self.machine.handle(self.now_ns, event)
        self.machine.check()
        for action in actions:
            match action:
                case Submit(sid=sid, rid=rid):
                    self.flying[sid], self.rides[rid] = action, sid
                    ask, level = self.asked[rid]
                    capped = level and ask.traffic_class in ("chat", "tips")
                    assert action.max_tokens == (min(ask.max_tokens, CAP) if capped else ask.max_tokens)
                case Attach(sid=sid, rid=rid):
                    self.rides[rid] = sid
                case Answer(rid=rid, tier=tier, answer_id=answer_id, level=told):
                    ask, level = self.asked[rid]
                    assert told == level, "the client is told the level that it met"
                    question, _, tokens = answer_id.partition(":")
                    full = min(self.says[int(question)], ask.max_tokens)
                    capped = level and ask.traffic_class in ("chat", "tips") and tier in ("model", "coalesced")
                    assert min(full, CAP) <= int(tokens) <= full if capped else int(tokens) == full
        return actions

    def level(self, busy: bool) -> None:
        age_ns = 300 * MS_NS
        if busy:
            self.now_ns += age_ns
            self.tell(Pressure(0, max(self.flying, default=-1), 1, waiting=(Waiting("chat", 1, self.now_ns - age_ns),)))
            assert self.machine.stats().level == 1
            return
        self.tell(Pressure(0, max(self.flying, default=-1), 1))
        while self.machine.stats().level:
            self.now_ns += 250 * MS_NS
            self.tell(Wake())

    def ask(self, name: str, question: int, most: int, text: bytes = b"") -> list:
        key = f"{name} {question} {most}".encode()
        ask = Arrive(self.rids, f"r{self.rids}", "t", name, self.now_ns, 9, most, key, b"h %d" % most, text)
        self.asked[self.rids] = ask, self.machine.stats().level
        self.rids += 1
        return self.tell(ask)

    def end(self, sid: int) -> list:
        submit = self.flying.pop(sid)
        question = int(self.asked[submit.rid][0].exact_key.split()[1])
        tokens = min(self.says[question], submit.max_tokens)
        reason = "stop" if self.says[question] < submit.max_tokens else "length"
        self.tell(FirstToken(sid))
        return self.tell(Ended(sid, reason, 9, 0, tokens, answer_id=f"{question}:{tokens}", answer_bytes=tokens))


STEPS = st.one_of(
    st.tuples(st.just("ask"), st.sampled_from(list(CLASSES)), st.integers(0, 2), st.sampled_from([3, 5, 9])),
    st.tuples(st.just("level"), st.booleans()),
    st.tuples(st.just("end"), st.integers(0, 20)),
)


@given(st.lists(st.integers(1, 10), min_size=3, max_size=3), st.lists(STEPS, max_size=50))
@settings(max_examples=300, deadline=None)
def test_who_met_level_0_gets_all_of_the_answer_and_nobody_less_than_the_cap(says: list[int], steps: list) -> None:
    world = World(says)
    for step in steps:
        match step:
            case ("ask", name, question, most):
                world.ask(name, question, most)
            case ("level", busy):
                world.level(busy)
            case ("end", which):
                if world.flying:
                    world.end(list(world.flying)[which % len(world.flying)])
    for sid in list(world.flying):
        world.end(sid)
    assert not world.machine.stats().in_flight


def sent(actions: list) -> int:
    [submit] = [action for action in actions if isinstance(action, Submit)]
    return submit.sid


def test_what_was_cut_short_is_kept_for_nobody_and_what_was_whole_for_all() -> None:
    world = World([8, 4])
    world.level(busy=True)
    cut, whole = sent(world.ask("chat", 0, 9)), sent(world.ask("chat", 1, 9))
    assert not any(isinstance(a, StoreAnswer) for a in world.end(cut))
    assert any(isinstance(a, StoreAnswer) for a in world.end(whole)), "it had no more to say"
    assert world.machine.stats().exact.entries == 1
    world.level(busy=False)
    assert not any(isinstance(a, Submit) for a in world.ask("chat", 1, 9))
    assert world.flying[sent(world.ask("chat", 0, 9))].max_tokens == 9


def test_nobody_who_met_level_0_rides_on_what_will_be_cut_short() -> None:
    """And who met level 1 rides on what is there: it costs nothing."""
    world = World([8])
    full = sent(world.ask("chat", 0, 9))
    world.level(busy=True)
    assert [a.sid for a in world.ask("chat", 0, 9) if isinstance(a, Attach)] == [full]
    world.end(full)
    world = World([8])
    world.level(busy=True)
    cut = sent(world.ask("chat", 0, 9))
    assert [a.sid for a in world.ask("chat", 0, 9) if isinstance(a, Attach)] == [cut]
    world.level(busy=False)
    full = sent(world.ask("chat", 0, 9))
    assert [a.sid for a in world.ask("chat", 0, 9) if isinstance(a, Attach)] == [full], "the longer one is found"
    world.end(cut)
    assert [a.sid for a in world.ask("chat", 0, 9) if isinstance(a, Attach)] == [full], "and stays so"
    world.end(full)
    assert world.machine.stats().exact.entries == 1


@pytest.mark.parametrize("busy", [False, True])
def test_the_level_that_counts_is_the_one_that_the_client_is_told(busy: bool) -> None:
    """It may have moved while the encoder was asked."""
    world = World([8])
    world.level(busy)
    world.ask("tips", 0, 9, b"red")
    world.level(not busy)
    submitted = world.flying[sent(world.tell(Similar(0)))]
    assert submitted.max_tokens == (CAP if busy else 9)
    assert [a.level for a in world.end(submitted.sid) if isinstance(a, Answer)] == [int(busy)]


@pytest.mark.parametrize("calm", [False, True])
def test_similar_questions_are_no_way_round_it(calm: bool) -> None:
    world = World([8, 8])
    world.level(busy=True)
    assert [type(a) for a in world.ask("tips", 0, 9, b"red")] == [FindSimilar]
    led = world.tell(Similar(0))
    assert any(isinstance(a, StoreVector) for a in led), "it can be found"
    if calm:
        world.level(busy=False)
    world.ask("tips", 1, 9, b"crimson")
    out = world.tell(Similar(1, (Neighbour(b"red", 970_000),)))
    assert any(isinstance(a, Submit) for a in out) == calm and any(isinstance(a, Attach) for a in out) != calm
    ended = world.end(sent(led))
    assert any(isinstance(a, DropVector) and a.text_key == b"red" for a in ended), "found no more, as it was not kept"
    assert world.machine.stats().semantic.entries == 0


def test_a_critical_class_may_not_have_a_cap() -> None:
    assert load("flash-sale", ("classes.checkout_help.brownout_max_tokens=12",)).scenario.classes["checkout_help"]
    with pytest.raises(UserError, match="never cut short") as told:
        load("flash-sale", ("classes.payment_fraud.brownout_max_tokens=12",))
    assert "payment_fraud.brownout_max_tokens" in told.value.what and told.value.fix

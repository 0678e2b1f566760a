"""The semantic cache against a naive reference, and what the gateway makes of a hit.

Run: python -m pytest tests/policy/test_semantic.py -q
Mutations it caught: relaxed rule for everybody; strict cosine with > for >=; age counted from the last hit; a text
dropped while the other cache needs it; a vector kept for an entry that left; a late answer stored under a vector that
never was; hard keys mixed up.
"""

from __future__ import annotations

import random

import pytest

from engine.config import (
    BreakerConfig,
    ClassConfig,
    ExactConfig,
    GatewayConfig,
    OverloadConfig,
    SemanticConfig,
    TenantConfig,
)
from engine.events import (
    Answer,
    Arrive,
    Cancel,
    DropAnswer,
    DropVector,
    Ended,
    FindSimilar,
    GatewayAction,
    Neighbour,
    Pressure,
    Similar,
    StoreAnswer,
    StoreVector,
    Submit,
    Waiting,
)
from engine.policy.gateway import Gateway
from engine.policy.semantic import SemanticCache, SemanticEntry
from engine.units import MS_NS, S_NS

CONFIG = SemanticConfig(cosine=0.95, approximate_cosine=0.85, ttl_s=2, stale_s=4, max_entries=5)


@pytest.mark.parametrize("seed", range(8))
def test_against_a_list(seed: int) -> None:
    r = random.Random(seed)
    cache, mine, now_ns = SemanticCache(CONFIG), [], 0  # mine: least recently used first
    for number in range(1500):
        now_ns += r.choice([0, 1, S_NS // 3, S_NS])
        hard, text = r.choice([b"h1", b"h2"]), bytes([r.randrange(9)])
        if r.random() < 0.4:
            entry = SemanticEntry(hard, text, f"a{r.randrange(6)}", now_ns, f"r{number}", 3)
            mine = [e for e in mine if (e.hard_key, e.text_key) != (hard, text)] + [entry]
            for _ in range(2):
                if now_ns - mine[0].stored_ns > 6 * S_NS:
                    mine.pop(0)
            mine = mine[-5:]
            cache.put(entry, now_ns)
            cache.drain_dropped()
        else:
            cosines = [r.choice([949_999, 950_000, 850_000, 849_999]) for _ in range(3)]
            near = [Neighbour(bytes([r.randrange(9)]), cosine) for cosine in cosines]
            near.sort(key=lambda n: -n.cosine_millionths)
            relaxed = r.random() < 0.5
            want = None
            for n in near:
                entry = next((e for e in mine if (e.hard_key, e.text_key) == (hard, n.text_key)), None)
                if entry is None:
                    continue
                age, cosine = now_ns - entry.stored_ns, n.cosine_millionths
                strict = cosine >= 950_000 and age <= 2 * S_NS
                if strict or (relaxed and cosine >= 850_000 and age <= 6 * S_NS):
                    want = (entry, cosine, not strict)
                    mine.remove(entry)
                    mine.append(entry)
                    break
            ask = Arrive(number, f"r{number}", "t", "qa", now_ns, 5, 4, hard_key=hard)
            hit = cache.decide(now_ns, ask, near, relaxed).hit
            assert (hit and (hit.entry, hit.cosine_millionths, hit.approximate)) == want
        cache.check()


class World:
    """One gateway, spoken to by hand."""

    def __init__(self) -> None:
        cls = {"caches": "semantic", "slo_ttft_ms": 1000}
        self.gateway = Gateway(
            GatewayConfig(
                classes={"qa": ClassConfig("standard", **cls), "reco": ClassConfig("sheddable", **cls)},
                tenants={"t": TenantConfig()}, exact=ExactConfig(ttl_s=2, stale_s=4, max_mib=0.0001), semantic=CONFIG,
                overload=OverloadConfig(window_ms=250),
                encoder_breaker=BreakerConfig(
                    window="count", window_size=4, minimum_calls=4, slow_share=0.5, open_ms=500
                ),
            )
        )
        self.now_ns, self.rid = 0, -1

    def tell(self, event: object) -> list[GatewayAction]:
        out = self.gateway.handle(self.now_ns, event)  # type: ignore[arg-type]
        self.gateway.check()
        return out

    def ask(self, text: str, cls: str = "qa", hard: bytes = b"h") -> list[GatewayAction]:
        self.rid += 1
        key = f"{cls}{text}".encode()
        return self.tell(
            Arrive(self.rid, f"r{self.rid}", "t", cls, self.now_ns, 5, 4, key, hard, text.encode(), (b"x",))
        )

    def similar(self, *near: tuple[str, float], status: str = "ok") -> list[GatewayAction]:
        found = tuple(Neighbour(text.encode(), round(cosine * 1e6)) for text, cosine in near)
        return self.tell(Similar(self.rid, found, status))  # type: ignore[arg-type]

    def learn(self, text: str, answer_id: str, cls: str = "qa") -> list[GatewayAction]:
        """Asked, computed, stored."""
        self.ask(text, cls)
        (submit,) = (a for a in self.similar() if isinstance(a, Submit))
        return self.tell(Ended(submit.sid, "stop", 5, 0, 3, answer_id=answer_id, answer_bytes=30))


def kinds(actions: list[GatewayAction], *wanted: type) -> list[GatewayAction]:
    return [a for a in actions if isinstance(a, wanted)]


def test_a_near_question_is_answered_and_says_whose_answer_it_is() -> None:
    world = World()
    stored = world.learn("is it blue", "a1")
    assert kinds(stored, StoreAnswer, StoreVector) == [StoreVector(b"h", b"is it blue"), StoreAnswer("a1", 0)]
    world.now_ns = S_NS
    assert kinds(world.ask("blue, is it?"), FindSimilar) == [FindSimilar(1, b"h", b"blue, is it?", 8)]
    (answer,) = kinds(world.similar(("is it blue", 0.96)), Answer)
    assert answer == Answer(1, "semantic", "a1", 0, S_NS, "r0", 960_000)
    world.ask("is it red")
    assert kinds(world.similar(("is it blue", 0.949)), Submit), "not near enough: the model's turn"


def test_another_context_is_another_world() -> None:
    world = World()
    world.learn("is it blue", "a1")
    world.ask("blue, is it?", hard=b"other")
    assert kinds(world.similar(("is it blue", 1.0)), Submit)


def test_only_a_sheddable_class_under_pressure_takes_approximations() -> None:
    world = World()
    world.learn("gift for dad", "a1", cls="reco")
    world.ask("dad gift", cls="reco")
    assert kinds(world.similar(("gift for dad", 0.9)), Submit)
    world.now_ns = S_NS
    world.tell(Pressure(0, 9, 1, (Waiting("qa", 1, world.now_ns - 250 * MS_NS),)))
    assert world.gateway.overload.level == 1
    world.ask("present for dad", cls="reco")
    (answer,) = kinds(world.similar(("gift for dad", 0.9)), Answer)
    assert (answer.tier, answer.cosine_millionths) == ("approximate", 900_000)
    world.ask("is it blue at all")
    assert kinds(world.similar(("gift for dad", 0.9)), Submit), "a standard class waits for its own answer"


def test_a_text_is_dropped_when_the_last_of_both_caches_has_let_go() -> None:
    world = World()  # the exact cache holds three answers of 30 bytes, the semantic one five entries
    dropped: list[str] = []
    vectors: list[bytes] = []
    for number in range(9):
        for action in world.learn(f"q{number}", f"a{number}"):
            if isinstance(action, DropAnswer):
                dropped.append(action.answer_id)
            if isinstance(action, DropVector):
                vectors.append(action.text_key)
    assert dropped == ["a0", "a1", "a2", "a3"], "the semantic cache still needs a4 to a8"
    assert vectors == [b"q0", b"q1", b"q2", b"q3"]


@pytest.mark.parametrize("status", ["late", "failed"])
def test_an_encoder_that_is_late_or_fails_opens_the_breaker(status: str) -> None:
    """What was late has a vector by and by, and is stored for those who ask next; what failed has none."""
    world = World()
    for number in range(4):
        world.ask(f"q{number}")
        (submit,) = kinds(world.similar(status=status), Submit)
        done = world.tell(Ended(submit.sid, "stop", 5, 0, 3, answer_id=f"a{number}", answer_bytes=30))
        assert bool(kinds(done, StoreVector)) == (status == "late")
    actions = world.ask("q9")
    assert kinds(actions, Submit) and not kinds(actions, FindSimilar), "open: nobody waits for the encoder"
    world.now_ns = S_NS
    assert kinds(world.ask("q10", "reco"), FindSimilar), "half-open: a probe"


def test_a_cancelled_look_gives_its_permit_back() -> None:
    world = World()
    world.ask("q")
    world.tell(Cancel(0))
    assert world.gateway.similar.encoder.stats().open_permits == 0
    assert not world.similar(), "an answer to nobody is no news"

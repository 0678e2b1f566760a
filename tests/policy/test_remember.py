"""A gateway that is told what another one kept decides as that one would have; and lets go of what it does not take.

Run: python -m pytest tests/policy/test_remember.py -q
Mutations it caught: no age looked at; an older one in place of a younger; vectors or texts not let go of; versions
forgotten, or set back; what was called off since the start taken; quarantine or groups forgotten; trust lost, or given
without a quarantine; the order turned round; questions taken without a semantic cache.
"""

from __future__ import annotations

import random
from collections import Counter

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from engine.config import ClassConfig, ExactConfig, GatewayConfig, OverloadConfig, SemanticConfig, TenantConfig
from engine.events import (
    Answer,
    Arrive,
    DropAnswer,
    DropVector,
    Ended,
    Entry,
    FindSimilar,
    GatewayAction,
    GatewayEvent,
    Invalidate,
    KeptQuestion,
    Likeness,
    Neighbour,
    PlaceAnswer,
    Placed,
    Record,
    Remember,
    SemanticEntry,
    Similar,
    StoreAnswer,
    StoreVector,
    Submit,
    TagVersion,
)
from engine.policy.gateway import Gateway
from engine.units import MIB_BYTES, S_NS

TTL_NS, KEEP_NS = 2 * S_NS, 6 * S_NS
AWAY_NS = 1000 * S_NS  # one clock shows so much less than the other


def config(**semantic: object) -> GatewayConfig:
    cls = {"caches": "semantic", "slo_ttft_ms": 1000}
    return GatewayConfig(
        classes={"qa": ClassConfig("standard", **cls), "reco": ClassConfig("sheddable", **cls, depends_on=("stock",))},
        tenants={"t": TenantConfig(), "u": TenantConfig()}, overload=OverloadConfig(enabled=False),
        exact=ExactConfig(ttl_s=2, stale_s=4, max_mib=150 / MIB_BYTES),
        semantic=SemanticConfig(ttl_s=2, stale_s=4, max_entries=8, **semantic),  # type: ignore[arg-type]
    )


class Life:
    """One gateway and its driver's shelves. ``late_ns``: what its clock shows less than the world's."""

    def __init__(self, config: GatewayConfig, late_ns: int = 0) -> None:
        self.machine, self.late_ns = Gateway(config), late_ns
        self.texts: set[str] = set()
        self.vectors: set[tuple[bytes, bytes]] = set()

    def tell(self, now_ns: int, event: GatewayEvent) -> list[GatewayAction]:
        actions = self.machine.handle(now_ns - self.late_ns, event)
        self.machine.check()
        for action in actions:
            match action:
                case StoreAnswer(answer_id=answer_id):
                    self.texts.add(answer_id)
                case DropAnswer(answer_id=answer_id):
                    self.texts.remove(answer_id)  # KeyError: dropped twice, or never stored
                case StoreVector(hard_key=hard, text_key=text):
                    self.vectors.add((hard, text))
                case DropVector(hard_key=hard, text_key=text):
                    self.vectors.remove((hard, text))
        return actions

    def remember(self, now_ns: int, what: Remember) -> list[GatewayAction]:
        self.texts |= {e.answer_id for e in what.exact} | {kept.entry.answer_id for kept in what.similar}
        self.vectors |= {kept.entry.key for kept in what.similar}
        raw = msgspec.json.encode(what)
        assert msgspec.json.decode(raw, type=GatewayEvent) == what, "a journal holds it as it is"
        return self.tell(now_ns, what)

    def shelves_hold_what_is_kept(self, now_ns: int = 0) -> None:
        """A text that a look-up found too old lies there until the next answer comes: here, with a word on nothing."""
        self.tell(now_ns, Invalidate(tag="nothing"))
        kept = self.machine.answers.kept()
        assert self.vectors == {each.entry.key for each in kept.similar}
        assert self.texts == {e.answer_id for e in kept.exact} | {each.entry.answer_id for each in kept.similar}


def shifted(what: Remember, by_ns: int) -> Remember:
    return Remember(
        tuple(replace(e, stored_ns=e.stored_ns + by_ns) for e in what.exact),
        tuple(replace(k, entry=replace(k.entry, stored_ns=k.entry.stored_ns + by_ns)) for k in what.similar),
        what.versions,
    )


def seen(actions: list[GatewayAction]) -> Counter[object]:
    """What the world sees of it; numbers of submissions are each gateway's own, and lists of leavings have no order."""
    out: list[object] = []
    for action in actions:
        match action:
            case Submit(rid=rid):
                out.append(("submit", rid))
            case StoreAnswer(answer_id=answer_id):
                out.append(("store", answer_id))
            case Record():
                continue  # made of the same facts, on another clock
            case _:
                out.append(action)
    return Counter(map(repr, out))


class World:
    """Two lives side by side: all that is said to one is said to the other."""

    def __init__(self, seed: int, config: GatewayConfig) -> None:
        self.r, self.config = random.Random(seed), config
        self.lives = [Life(config)]
        self.now_ns, self.rid, self.version = AWAY_NS, 0, 0
        self.tiers: Counter[str] = Counter()

    def tell(self, event: GatewayEvent) -> list[GatewayAction]:
        told = [life.tell(self.now_ns, self._on(life, event)) for life in self.lives]
        for life in self.lives:
            life.shelves_hold_what_is_kept(self.now_ns)
        if len(told) > 1:
            assert seen(told[0]) == seen(told[1])
        self.count(told[0])
        self.last = told
        return told[0]

    def count(self, out: list[GatewayAction]) -> None:
        self.tiers.update(action.tier for action in out if isinstance(action, Answer))

    def _on(self, life: Life, event: GatewayEvent) -> GatewayEvent:
        if isinstance(event, Arrive):
            return replace(event, arrived_ns=event.arrived_ns - life.late_ns)
        return event

    def turn(self) -> None:
        r = self.r
        self.now_ns += r.choice([0, S_NS // 5, S_NS // 2, S_NS])
        if r.random() < 0.12:
            self.version += r.random() < 0.6
            tag, tenant = r.choice(["stock", "catalogue", "x"]), r.choice(["", "t"])
            kept = self.lives[0].machine.answers.kept().exact
            one = Invalidate(answer_id=r.choice(kept).answer_id) if kept else Invalidate(tenant="u")
            self.tell(r.choice([Invalidate(tenant, tag=tag, version=self.version), Invalidate(tag=tag), one]))
            return
        self.rid += 1
        text = bytes([r.randrange(12)])
        hard, cls, tenant = r.choice([b"h1", b"h2"]), r.choice(["qa", "reco"]), r.choice(["t", "u"])
        ask = Arrive(
            self.rid, f"r{self.rid}", tenant, cls, self.now_ns, 5, 4, hard + text, hard, text, (b"x",),
            asker=r.choice([b"", b"a", b"b", b"c"]), tags=r.choice([(), ("x",)]),
        )
        out = self.tell(ask)
        if any(isinstance(action, FindSimilar) for action in out):
            others = r.sample(range(12), 3)
            cosines = sorted((r.choice([990_000, 951_000, 900_000, 860_000]) for _ in others), reverse=True)
            near = tuple(Neighbour(bytes([n]), cosine) for n, cosine in zip(others, cosines, strict=True))
            out = self.tell(Similar(self.rid, near, r.choice(["ok", "ok", "ok", "unfit"])))
        self.compute(out)

    def compute(self, out: list[GatewayAction]) -> None:
        sids = [[a.sid for a in told if isinstance(a, Submit)] for told in self.last]
        if not sids[0]:
            return
        answer_id = f"a{self.r.randrange(7)}"
        told = [
            life.tell(self.now_ns, Ended(mine[0], "stop", 5, 0, 3, answer_id=answer_id, answer_bytes=30))
            for life, mine in zip(self.lives, sids, strict=True)
        ]
        if len(told) > 1:
            assert seen(told[0]) == seen(told[1])
        self.count(told[0])
        for action in told[0]:
            if isinstance(action, PlaceAnswer) and self.r.random() < 0.8:
                kept = [each.entry.answer_id for each in self.lives[0].machine.answers.kept().similar]
                near = [Likeness(self.r.choice(kept), self.r.choice([970_000, 940_000])) for _ in range(2)]
                near.sort(key=lambda like: -like.cosine_millionths)
                self.tell(Placed(action.hard_key, action.answer_id, tuple(near)))

    def be_born_again(self) -> None:
        """The second life begins, on a clock of its own, with what the first one has kept."""
        life = Life(self.config, AWAY_NS + 7 * S_NS)
        kept = self.lives[0].machine.answers.kept()
        out = life.remember(self.now_ns, shifted(kept, -life.late_ns))
        asks = {a.answer_id for a in out if isinstance(a, PlaceAnswer)}
        nameless = {k.entry.answer_id for k in kept.similar if not k.group}
        assert asks == (nameless if self.config.semantic.identity == "meaning" else set())
        assert not any(isinstance(action, DropAnswer | DropVector) for action in out)
        self.lives.append(life)

    def holds_what_is_too_old(self) -> bool:
        """It takes up room in the first life, and would not come into the second."""
        kept = self.lives[0].machine.answers.kept()
        entries = [*kept.exact, *(each.entry for each in kept.similar)]
        return any(self.now_ns - entry.stored_ns > KEEP_NS for entry in entries)


@pytest.mark.parametrize("rule", ["fixed", "calibrated"])
@pytest.mark.parametrize("identity", ["text", "meaning", "unknown"])
@pytest.mark.parametrize("quarantine", [0, 2])
@pytest.mark.parametrize("seed", range(4))
def test_it_decides_as_the_one_that_was_never_stopped(rule: str, identity: str, quarantine: int, seed: int) -> None:
    world = World(seed, config(rule=rule, identity=identity, quarantine=quarantine, cosine=0.95))
    for _ in range(120):
        world.turn()
    while world.holds_what_is_too_old():
        world.turn()
    before = world.lives[0].machine.answers.kept()
    assert before.exact and before.similar and before.versions
    world.be_born_again()
    world.tiers.clear()
    for _ in range(120):
        world.turn()
    assert world.tiers["exact"] > 5 and world.tiers["model"] > 5
    assert quarantine or identity == "unknown" or rule == "calibrated" or world.tiers["semantic"] > 3
    kept, again = (life.machine.answers.kept() for life in world.lives)
    assert shifted(again, world.lives[1].late_ns) == kept


def naive(entries: list, room: int, size_of: object, now_ns: int) -> list:
    """What is taken: first come, first to go when there is no room."""
    taken: list = []
    for entry, stored_ns in entries:
        if now_ns - stored_ns <= KEEP_NS and entry not in taken:
            taken.append(entry)
            while sum(size_of(e) for e in taken) > room:  # type: ignore[operator]
                taken.pop(0)
    return taken


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_what_is_too_old_or_has_no_room_is_let_go(data: st.DataObject) -> None:
    draw, now_ns = data.draw, 3 * S_NS
    ages = st.sampled_from([0, TTL_NS, KEEP_NS, KEEP_NS + 1, 100 * KEEP_NS])
    ids = st.sampled_from("abcdef")
    exact = tuple(
        Entry(bytes([key]), draw(ids), 50, now_ns - draw(ages), "r", 1)
        for key in draw(st.lists(st.integers(0, 9), unique=True))
    )
    similar = tuple(
        KeptQuestion(SemanticEntry(b"h", bytes([key]), draw(ids), now_ns - draw(ages), "r", 1))
        for key in draw(st.lists(st.integers(0, 15), unique=True))
    )
    life = Life(config(quarantine=draw(st.sampled_from([0, 1]))))
    life.remember(now_ns, Remember(exact, similar))
    life.shelves_hold_what_is_kept()
    kept = life.machine.answers.kept()
    assert list(kept.exact) == naive([(e, e.stored_ns) for e in exact], 3, lambda _: 1, now_ns)
    want = naive([(k.entry, k.entry.stored_ns) for k in similar], 8, lambda _: 1, now_ns)
    assert [k.entry for k in kept.similar] == want


def test_what_is_there_already_is_younger() -> None:
    life = Life(config())
    old = Entry(b"k", "old", 9, -S_NS, "r", 1)
    question = KeptQuestion(SemanticEntry(b"h", b"q", "old", -S_NS, "r", 1))
    life.remember(0, Remember((replace(old, answer_id="new", stored_ns=0),), (replace_answer(question, "new"),)))
    life.remember(1, Remember((old,), (question,)))
    life.texts |= {"new"}
    assert [e.answer_id for e in life.machine.answers.exact.entries()] == ["new"]
    assert life.texts == {"new"}


def replace_answer(kept: KeptQuestion, answer_id: str) -> KeptQuestion:
    return replace(kept, entry=replace(kept.entry, answer_id=answer_id))


def test_versions_come_first_and_never_go_back() -> None:
    life = Life(config())
    life.tell(0, Invalidate(tag="x", version=9))
    entry = Entry(b"k", "a", 9, -S_NS, "r", 1, "t", ("x",))
    other = Entry(b"l", "b", 9, -S_NS, "r", 1, "t", ("y",))
    life.remember(0, Remember((entry, other), (), (TagVersion("", "x", 7), TagVersion("", "y", 3))))
    assert life.texts == {"b"}, "what was called off since the start is not taken back"
    assert life.machine.answers.kept().versions == (TagVersion("", "x", 9), TagVersion("", "y", 3))
    assert life.tell(0, Invalidate(tag="y", version=3)) == [] and life.texts == {"b"}
    life.tell(0, Invalidate(tag="y", version=4))
    assert life.texts == set()


def test_without_a_semantic_cache_the_questions_are_let_go() -> None:
    life = Life(config(enabled=False))
    life.remember(0, Remember((), (KeptQuestion(SemanticEntry(b"h", b"q", "a", 0, "r", 1)),)))
    assert not life.texts and not life.vectors


def test_nobody_comes_out_of_quarantine_by_a_restart() -> None:
    """Kept without a quarantine, nobody is known to have agreed; what has come out of one stays out."""
    entry = SemanticEntry(b"h", b"q", "a", 0, "r", 1, asker=b"me")
    for kept, inside in ((KeptQuestion(entry), 1), (KeptQuestion(entry, (b"x",)), 1),
                         (KeptQuestion(entry, (b"x", b"y")), 0), (KeptQuestion(entry, trusted=True), 0)):
        life = Life(config(quarantine=2))
        life.remember(0, Remember((), (kept,)))
        assert life.machine.stats().semantic.quarantined == inside


@pytest.mark.parametrize("quarantine", [0, 1])
def test_what_is_kept_says_who_has_come_out_of_quarantine(quarantine: int) -> None:
    """Without one nobody has: the next life may have one."""
    semantic = Gateway(config(quarantine=quarantine)).answers.semantic
    entry = SemanticEntry(b"h", b"q", "a", 0, "r", 1, asker=b"me")
    semantic.put(entry, 0)
    assert semantic.kept() == [KeptQuestion(entry)]
    semantic.learn(entry, None, True, b"you")
    assert semantic.kept() == [KeptQuestion(entry, trusted=bool(quarantine))]

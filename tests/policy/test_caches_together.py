"""Coalescing, audits, refreshes, quarantine, what is called off, and replicas that hang and die: all at once, for long.

A plain driver carries out what the gateway says and keeps its own books: who was promised what, which texts and vectors
are held, what may not be served any more. It knows nothing of how the gateway decides.

Mutations it caught: the flight of a job that is given up not aborted; its seat kept; a vector dropped with its old text
while the new one is on its way; one kept for nobody; one of those who wait for a replica forgotten; an answer's vector
or group kept under a hard key that needs it no more, because another one does.

Run: python -m pytest tests/policy/test_caches_together.py -q
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass

import pytest

from engine.cache_config import ExactConfig, SemanticConfig
from engine.config import BreakerConfig, ClassConfig, GatewayConfig, OverloadConfig, TenantConfig
from engine.events import (
    Abort,
    Answer,
    Arrive,
    Attach,
    BackgroundRecord,
    Cancel,
    Drain,
    DropAnswer,
    DropPlace,
    DropVector,
    Ended,
    EndReason,
    FindSimilar,
    FirstToken,
    GatewayEvent,
    Hold,
    Invalidate,
    Likeness,
    Neighbour,
    PlaceAnswer,
    Placed,
    Pressure,
    Record,
    Reject,
    Release,
    ReplicaBack,
    ReplicaLost,
    RequestRecord,
    Similar,
    StoreAnswer,
    StoreVector,
    Submit,
    Waiting,
    Wake,
)
from engine.policy.flights import BACKGROUND
from engine.policy.gateway import Gateway
from engine.units import MS_NS, S_NS
from tests.policy.worlds import digest_of, replayed_elsewhere

STEPS = 15_000
REPLICAS = 2
SHOP = {"caches": "semantic", "slo_ttft_ms": 3_000, "timeout_ms": 2_000}


def config(rule: str, identity: str, quarantine: int) -> GatewayConfig:
    return GatewayConfig(
        replicas=REPLICAS,
        classes={
            "qa": ClassConfig("standard", **SHOP),  # type: ignore[arg-type]
            "tip": ClassConfig("sheddable", **SHOP),  # type: ignore[arg-type]
            "pay": ClassConfig("critical", caches="none", slo_ttft_ms=3_000, timeout_ms=2_000),
        },
        tenants={"t": TenantConfig(), "u": TenantConfig()},
        exact=ExactConfig(ttl_s=2, stale_s=4, revalidate_s=1, max_mib=400 / (1 << 20)),
        semantic=SemanticConfig(
            ttl_s=2, stale_s=4, max_entries=30, coalesce=True, audit_share=0.3, same_answer_cosine=0.9,
            rule=rule, identity=identity, quarantine=quarantine,  # type: ignore[arg-type]
        ),
        overload=OverloadConfig(window_ms=250, hold_ms=200),
        breaker=BreakerConfig(window="count", window_size=10, minimum_calls=8, open_ms=500),
    )


@dataclass(eq=False)
class Flying:
    """A submission at a replica."""

    submit: Submit
    asked: int  # meaning of its question
    since: int  # what was called off by then
    aborted: bool = False


class Shop:
    """Clients, encoder, replicas and texts of one gateway. ``seen`` counts what came to pass."""

    def __init__(self, config: GatewayConfig, seed: int) -> None:
        self.r, self.config, self.machine = random.Random(seed), config, Gateway(config)
        self.now_ns = 0
        self.journal: list[tuple[int, GatewayEvent, list]] = []  # type: ignore[type-arg]
        self.asks: dict[int, Arrive] = {}
        self.meaning: dict[int, int] = {}
        self.open: dict[int, None] = {}  # promised an answer
        self.rows: Counter[str] = Counter()
        self.held: dict[int, None] = {}
        self.looks: dict[int, FindSimilar] = {}
        self.places: list[PlaceAnswer] = []
        self.flying: dict[int, Flying] = {}
        self.rides: dict[int, int] = {}  # rid -> sid
        self.texts: dict[str, int] = {}  # answer id -> what was called off by the time its flight began
        self.made: dict[str, int] = {}  # request id -> the same, of the last answer of it that was stored
        self.vectors: dict[tuple[bytes, bytes], None] = {}
        self.wanted: dict[tuple[bytes, str], None] = {}  # to be compared with others, or being so
        self.placed: dict[bytes, dict[str, None]] = {}
        self.off: dict[str, int] = {"t": 0, "u": 0}  # tenant -> number of the last word that called off its answers
        self.words = 0
        self.down: dict[int, None] = {}
        self.hung: dict[int, None] = {}
        self.seen: Counter[str] = Counter()

    # ------------------------------------------------------------ the gateway's wishes

    def tell(self, event: GatewayEvent) -> None:
        actions = self.machine.handle(self.now_ns, event)
        self.journal.append((self.now_ns, event, actions))
        self.machine.check()
        for action in actions:
            self.carry_out(action)
        self.books(swept=any(isinstance(action, StoreAnswer) for action in actions))

    def carry_out(self, action: object) -> None:
        match action:
            case FindSimilar(rid=rid):
                assert rid in self.open, "only who waits for an answer looks for similar ones"
                self.seen["looked again"] += rid in self.looks or rid in self.rides
                self.looks[rid] = action
            case Submit(sid=sid, rid=rid):
                job = action.traffic_class == BACKGROUND
                assert rid in (self.held if job else self.open), "computed: for who waits, or for a job that holds it"
                assert action.replica not in self.down, "a replica that is away is asked nothing"
                self.flying[sid] = Flying(action, self.meaning[rid], self.words)
                if not job:
                    self.rides[rid] = sid
                self.seen["jobs" if job else "led"] += 1
                alive = [f for f in self.flying.values() if f.submit.traffic_class == BACKGROUND and not f.aborted]
                assert len(alive) <= 1 + self.seen["rode on a job"], "one job at once"
            case Attach(sid=sid, rid=rid):
                flight = self.flying[sid]
                assert rid in self.open and not flight.aborted, "nobody gets aboard of what was called back"
                mine, its = self.asks[rid], self.asks[flight.submit.rid]
                assert mine.tenant == its.tenant, "tenants share nothing"
                assert flight.since >= self.off[mine.tenant], "nobody new waits for what was called off"
                self.seen["rode on a job"] += flight.submit.traffic_class == BACKGROUND
                self.seen["rode" if mine.exact_key == its.exact_key else "rode on a similar question"] += 1
                self.rides[rid] = sid
            case Abort(sid=sid):
                self.flying[sid].aborted = True
                self.seen["jobs given up"] += self.flying[sid].submit.traffic_class == BACKGROUND
            case Answer(rid=rid):
                self.answered(action)
                self.done(rid)
            case Reject(rid=rid, code=code):
                self.seen[code] += 1
                self.done(rid)
            case Hold(rid=rid):
                assert rid in self.open and rid not in self.held, "held before the driver lets go of it, once"
                self.held[rid] = None
            case Release(rid=rid):
                del self.held[rid]
            case StoreAnswer(answer_id=answer_id, sid=sid):
                flight = self.ended_flight
                assert flight.submit.sid == sid, "a text is kept when it is whole"
                self.texts[answer_id] = flight.since
                self.made[self.asks[flight.submit.rid].request_id] = flight.since
            case DropAnswer(answer_id=answer_id):
                del self.texts[answer_id]
            case StoreVector():
                self.vectors[action.hard_key, action.text_key] = None
            case DropVector():
                self.vectors.pop((action.hard_key, action.text_key), None)
            case PlaceAnswer():
                self.places.append(action)
                self.wanted[action.hard_key, action.answer_id] = None
            case DropPlace():
                self.wanted.pop((action.hard_key, action.answer_id), None)
                self.placed.get(action.hard_key, {}).pop(action.answer_id, None)
            case Record(record=RequestRecord() as row):
                self.rows[row.request_id] += 1
            case Record(record=BackgroundRecord() as row):
                self.seen["jobs recorded"] += 1
                self.seen[f"{row.kind} {'done' if row.done else 'let go'}"] += 1
                self.seen[f"audit {row.right}"] += row.kind == "audit" and row.done

    def answered(self, answer: Answer) -> None:
        ask = self.asks[answer.rid]
        self.seen[answer.tier] += 1
        if answer.tier in ("exact", "semantic", "approximate"):
            assert answer.answer_id in self.texts, "what is served from a cache is there"
            assert answer.source.startswith(ask.tenant), "tenants share nothing"
            assert self.made[answer.source] >= self.off[ask.tenant], "what was called off serves nobody"
            assert answer.age_ns <= 6 * S_NS, "nor what is too old for all"
        if answer.tier == "coalesced":
            assert answer.source.startswith(ask.tenant), "tenants share nothing"

    def done(self, rid: int) -> None:
        del self.open[rid]
        self.looks.pop(rid, None)

    def books(self, swept: bool) -> None:
        """``swept``: what nobody needs any more has been let go of by now; an old answer is else noticed later."""
        answers, flights = self.machine.answers, self.machine.flights
        for entry in answers.semantic.entries():
            assert entry.key in self.vectors and entry.answer_id in self.texts, "an entry can be found and served"
        for key in self.vectors:
            assert answers.semantic.holds(*key) or any(f.question == key for f in flights.open()), "none in vain"
        for hard_key, answer_id in self.wanted:
            assert answers.semantic.refers_to(answer_id, hard_key), "compared under no hard key for nobody"
        for answer_id in self.texts if swept else ():
            needed = answers.exact.refers_to(answer_id) or answers.semantic.refers_to(answer_id)
            assert needed, "no text for nobody"
        stats = self.machine.stats()
        assert self.seen["jobs recorded"] <= stats.jobs.offered, "a job ends once"
        assert stats.in_flight >= len(self.open), "who waits is on the way"

    # ------------------------------------------------------------ what happens

    def arrive(self) -> None:
        r, rid = self.r, len(self.asks)
        tenant, name, meaning = r.choice("tu"), r.choice(["qa", "tip", "tip", "pay"]), r.randrange(6)
        text = f"m{meaning}.{r.randrange(3)}".encode()
        ask = Arrive(
            rid, f"{tenant}{rid}", tenant, name, self.now_ns, 5, 4, f"{tenant}{name}".encode() + text,
            b"h" + tenant.encode(), text, draw=r.randrange(1 << 62), asker=r.choice([b"", b"ann", b"bob", b"cyd"]),
        )
        self.asks[rid], self.meaning[rid], self.open[rid] = ask, meaning, None
        self.tell(ask)

    def look_up(self) -> None:
        rid = self.r.choice([*self.looks])
        look = self.looks.pop(rid)
        if self.r.random() < 0.05:
            return self.tell(Similar(rid, status=self.r.choice(["late", "failed"])))
        near = []
        for hard_key, text in self.vectors:
            if hard_key == look.hard_key and text != look.text_key:
                apart = abs(int(text[1:2]) - self.meaning[rid])
                near.append(Neighbour(text, (970_000, 880_000)[apart] if apart < 2 else 300_000))
        near.sort(key=lambda n: (-n.cosine_millionths, n.text_key))
        return self.tell(Similar(rid, tuple(near[: look.at_most])))

    def place(self) -> None:
        action = self.places.pop(self.r.randrange(len(self.places)))
        if self.r.random() < 0.1:
            return self.tell(Placed(action.hard_key, action.answer_id, known=False))
        there = self.placed.setdefault(action.hard_key, {})
        same = [a for a in there if a[:2] == action.answer_id[:2]]
        if (action.hard_key, action.answer_id) in self.wanted:
            there[action.answer_id] = None
        return self.tell(Placed(action.hard_key, action.answer_id, tuple(Likeness(a, 950_000) for a in same[:8])))

    def end(self, sid: int, reason: EndReason) -> None:
        flight = self.ended_flight = self.flying.pop(sid)
        good = reason in ("stop", "length")
        words = "" if self.r.random() < 0.7 else f"-{self.r.randrange(3)}"  # equal to the letter, or only in meaning
        says = f"a{flight.asked if self.r.random() < 0.9 else 9}{words}"
        self.tell(Ended(sid, reason, 5, 0, 3, answer_id=says if good else "", answer_bytes=20 if good else 0))

    def replica_turn(self) -> None:
        sids = [sid for sid, flight in self.flying.items() if flight.submit.replica not in self.hung]
        if not sids:
            return
        sid = self.r.choice(sids)
        if self.flying[sid].aborted:
            self.end(sid, "aborted")
        elif self.r.random() < 0.3:
            self.tell(FirstToken(sid))
        else:
            self.end(sid, self.r.choices(["stop", "length", "failed", "deadline"], [20, 2, 1, 1])[0])  # type: ignore

    def lose(self, replica: int) -> None:
        self.seen["deaths"] += 1
        self.down[replica] = None
        self.hung.pop(replica, None)
        self.tell(ReplicaLost(replica))
        for sid in [sid for sid, flight in self.flying.items() if flight.submit.replica == replica]:
            self.end(sid, "lost")

    def invalidate(self) -> None:
        tenant = self.r.choice(["t", "u", ""])
        self.words += 1
        for name in self.off:
            if tenant in ("", name):
                self.off[name] = self.words
        self.tell(Invalidate(tenant=tenant))

    def time_passes(self, ns: int) -> None:
        until, wakes = self.now_ns + ns, 0
        while (wake_ns := self.machine.next_wake_ns()) is not None and wake_ns <= until:
            self.now_ns = max(self.now_ns, wake_ns)
            self.tell(Wake())
            wakes += 1
            assert wakes < 1_000, "a wake changes something: it never spins"
        self.now_ns = until

    def step(self, arrivals: float) -> None:
        r, chance = self.r, self.r.random()
        up = [n for n in range(REPLICAS) if n not in self.down]
        if r.random() < arrivals:
            self.arrive()
        elif chance < 0.35:
            self.replica_turn()
        elif chance < 0.55:
            if self.looks:
                self.look_up()
        elif chance < 0.62:
            if self.places:
                self.place()
        elif chance < 0.64:
            if self.open:
                self.cancel(r.choice([*self.open]))
        elif chance < 0.80:
            age_ms = 900 if r.random() < 0.02 else 0
            waiting = (Waiting("qa", 1, self.now_ns - age_ms * MS_NS),) if age_ms else ()
            for replica in up:
                self.tell(Pressure(replica, 1 << 60, 1, waiting))
        elif chance < 0.805:
            self.invalidate()
        elif chance < 0.808:
            for replica in r.sample(up, r.randrange(len(up) + 1)):
                self.lose(replica)
        elif chance < 0.810:
            self.hung[r.randrange(REPLICAS)] = None
        elif chance < 0.812:
            for replica in [*self.hung]:
                self.lose(replica)
        elif chance < 0.84:
            if self.down:
                replica = r.choice([*self.down])
                del self.down[replica]
                self.tell(ReplicaBack(replica))
        else:
            self.time_passes(r.choice([1, 20, 50, 100]) * MS_NS)

    def cancel(self, rid: int) -> None:
        del self.open[rid]
        self.looks.pop(rid, None)
        self.tell(Cancel(rid))

    def finish(self) -> None:
        """The doors are shut; all that was promised comes."""
        self.tell(Drain())
        for replica in [*self.hung]:
            self.lose(replica)
        while self.flying or self.looks or self.places:
            if self.looks:
                self.look_up()
            elif self.places:
                self.place()
            else:
                self.replica_turn()
        self.time_passes(10 * S_NS)
        stats = self.machine.stats()
        assert not self.open and not self.held and not stats.in_flight, "nobody is left behind"
        assert self.rows == Counter(ask.request_id for ask in self.asks.values()), "one row for each"
        jobs = stats.jobs
        assert not jobs.waiting and not jobs.open, "no job is left"
        assert jobs.offered == jobs.done + jobs.dropped == self.seen["jobs recorded"], "each job has one end"


CASES = [("fixed", "text", 0), ("adaptive", "meaning", 0), ("conformal", "unknown", 0), ("fixed", "meaning", 2)]


@pytest.mark.parametrize("seed", range(2))
def test_all_at_once(seed: int) -> None:
    seen: Counter[str] = Counter()
    for rule, identity, quarantine in CASES:
        shop = Shop(config(rule, identity, quarantine), seed)
        for number in range(STEPS):
            shop.step(arrivals=(0.03, 0.2, 0.4)[number // 200 % 3])
        shop.finish()
        assert replay(shop) == [actions for *_, actions in shop.journal], "the same events, the same actions"
        seen += shop.seen
    for event in (
        "exact", "semantic", "approximate", "model", "coalesced", "rode", "rode on a similar question", "looked again",
        "deaths", "replica_lost", "deadline_exceeded", "jobs", "jobs given up", "audit done", "audit let go",
        "audit True", "audit False", "audit None", "refresh done", "refresh let go",
    ):
        assert seen[event] >= 5, f"the trace has been through it: {event}"
    assert seen["rode on a job"], "the trace has been through it"


def replay(shop: Shop) -> list[list]:  # type: ignore[type-arg]
    machine = Gateway(shop.config)
    return [machine.handle(now_ns, event) for now_ns, event, _ in shop.journal]


def test_the_same_whatever_the_hash_seed() -> None:
    shop = Shop(config("adaptive", "meaning", 0), 7)
    for _ in range(800):
        shop.step(arrivals=0.3)
    assert replayed_elsewhere(Gateway, shop.config, shop.journal, 3) == digest_of(shop.journal)

"""The lane against lists that are sorted anew each time, and what follows for an upstream that says no.

invariant: mutation that it caught
- window: one place too many; the reserve given to others; a place not given back; given back twice
- order: sheddable before standard; one priority passes another that has no place; a refused one at the end of its line
- fairness: no charge; charged again when sent again; answers free; known though fairness is off
- deadline: a nanosecond early; not for who was put back; for who runs
- refusals: the limit not lowered; lowered to the window; never grown; no pause; a pause that an answer does not end;
  refused twice and put back again; refused alone and put back; a good answer that does not end the row
- pressure: what runs counted at once; never counted; counted after its first token; oldest of those that have gone;
  told though nothing changed; tokens of those that were heard
- wake: none for a late first token, for a pause, for a deadline
- first tokens: the last instead of the least; per token ignored; a minute of overload becomes normal
- ends: two; none for who is recalled; "lost" for who is recalled; computed though nothing was heard
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.config import FairnessConfig, LaneConfig
from engine.events import Abort, Drain, Ended, FirstToken, Pressure, Submit, Waiting, Wake
from engine.lane_events import Dispatch, Done, DoneReason, Heard, LaneAction, LaneEvent, Recall
from engine.policy.lane import Lane
from engine.policy.places import PAUSE_MAX_NS, PAUSE_NS, Places
from engine.units import MS_NS, S_NS
from tests.policy.test_fairness import NaiveTokens

TENANTS = ["half", "double", "other"]
WEIGHTS = {"half": 0.5, "double": 2.0}
CLASSES = ["fraud", "chat", "offers"]
GOOD = ("stop", "length")


@dataclass
class Asked:
    submit: Submit
    tenant: str
    runs: bool = False
    first_ns: int | None = None
    since_ns: int = 0
    late_ns: int | None = None
    heard: bool = False
    recalled: bool = False
    refused: bool = False
    counted: bool = False  # by the tokens' rule as waiting


class World:
    """What the lane must say, from lists."""

    def __init__(self, config: LaneConfig) -> None:
        self.lane, self.config = Lane(config), config
        self.now_ns = 0
        self.open: dict[int, Asked] = {}
        self.naive = [NaiveTokens(config.weights) for _ in CLASSES]
        self.limit = config.window - config.reserved
        self.row = self.good = 0
        self.resume_ns = 0
        self.first_tokens: list[tuple[int, int, int]] = []  # when, how long, of how many prompt tokens
        self.told: Pressure | None = None
        self.draining = False
        self.sid = self.acked = -1

    def tell(self, event: LaneEvent, expected: list[LaneAction]) -> None:
        """Hand it in; ``expected``: what it says of the event itself."""
        late = [a for a in self.open.values() if not a.runs and a.submit.start_by_ns < self.now_ns]
        for asked in sorted(late, key=lambda a: (a.submit.start_by_ns, a.submit.sid)):
            expected.append(self.end(asked, "deadline"))
        while (asked := self.next()) is not None:
            expected.append(self.start(asked))
        pressure = self.pressure()
        if pressure != self.told:
            self.told = pressure
            expected.append(pressure)
        assert self.lane.handle(self.now_ns, event) == expected
        self.lane.check()

    # ------------------------------------------------------------ rules

    def next(self) -> Asked | None:
        waiting = [a for a in self.open.values() if not a.runs]
        if not waiting or self.now_ns < self.resume_ns:
            return None
        priority = min(a.submit.priority for a in waiting)
        runs = [a for a in self.open.values() if a.runs]
        others = sum(a.submit.priority > 0 for a in runs)
        if len(runs) >= self.config.window or (priority and others >= self.limit):
            return None
        tenant = self.naive[priority].pick()
        ours = [a for a in waiting if a.submit.priority == priority and a.tenant == tenant]
        return min(ours, key=lambda a: (a.submit.sent_ns, a.submit.sid))

    def start(self, asked: Asked) -> Dispatch:
        ask, naive = asked.submit, self.naive[asked.submit.priority]
        naive.hold(asked.tenant)
        naive.dequeue(asked.tenant)
        if asked.first_ns is None:
            asked.first_ns = self.now_ns
            naive.charge(asked.tenant, ask.prompt_tokens * self.config.fairness.prompt_token_weight)
        asked.runs, asked.since_ns = True, self.now_ns
        least_ns = self.least_ns(ask.prompt_tokens)
        asked.late_ns = None if least_ns is None else self.now_ns + least_ns
        return Dispatch(ask.sid)

    def least_ns(self, prompt_tokens: int) -> int | None:
        """Of the minute in which it was last asked to learn, and of the one before."""
        if not self.first_tokens:
            return None
        minutes: list[list[tuple[int, int]]] = [[], []]
        since = 0
        for at_ns, took_ns, tokens in self.first_tokens:
            if at_ns - since >= 60 * S_NS:
                minutes, since = [minutes[1], []], at_ns
            minutes[1].append((took_ns, took_ns * 1000 // max(1, tokens)))
        both = minutes[0] + minutes[1]
        return max(min(ns for ns, _ in both), min(ps for _, ps in both) * prompt_tokens // 1000)

    def end(self, asked: Asked, reason: str, done: Done | None = None) -> Ended:
        ask, naive = asked.submit, self.naive[asked.submit.priority]
        outputs, cached = (done.output_tokens, min(done.cached_tokens, ask.prompt_tokens)) if done else (0, 0)
        naive.charge(asked.tenant, outputs * self.config.fairness.output_token_weight)
        if asked.runs:
            naive.let_go(asked.tenant)
        else:
            naive.dequeue(asked.tenant)
        del self.open[ask.sid]
        computed = max(1, ask.prompt_tokens - cached) if asked.heard else 0
        queue_ns = 0 if asked.first_ns is None else asked.first_ns - ask.sent_ns
        return Ended(ask.sid, reason, computed, cached, outputs, queue_ns)  # type: ignore[arg-type]

    def hear(self, asked: Asked, cached: int = 0) -> list[LaneAction]:
        if asked.heard:
            return []
        asked.heard = True
        assert asked.first_ns is not None
        self.first_tokens.append((self.now_ns, self.now_ns - asked.since_ns, asked.submit.prompt_tokens))
        return [FirstToken(asked.submit.sid, asked.first_ns - asked.submit.sent_ns, cached)]

    def pressure(self) -> Pressure:
        waits: dict[str, list[int]] = {}
        for asked in self.open.values():
            if not asked.runs:
                waits.setdefault(asked.submit.traffic_class, []).append(asked.submit.sent_ns)
            elif not asked.heard and asked.late_ns is not None and asked.late_ns <= self.now_ns:
                waits.setdefault(asked.submit.traffic_class, []).append(asked.late_ns)
        unheard = [a.submit.prompt_tokens for a in self.open.values() if not a.heard]
        running = sum(a.runs for a in self.open.values())
        waiting = tuple(Waiting(name, len(since), min(since)) for name, since in sorted(waits.items()))
        return Pressure(
            self.config.index, self.acked, running, waiting, sum(unheard), closed_until_ns=self.resume_ns
        )

    # ------------------------------------------------------------ events

    def submit(self, priority: int, tenant: str, tokens: int, ago_ns: int, within_ns: int) -> None:
        self.sid += 1
        ask = Submit(
            self.sid, self.sid, tenant, CLASSES[priority], priority, self.now_ns - min(ago_ns, self.now_ns),
            self.now_ns + within_ns, tokens, 9,
        )
        self.acked = self.sid
        if self.draining:
            self.tell(ask, [Ended(self.sid, "draining")])
            return
        name = tenant if self.config.fairness.enabled else ""
        self.open[self.sid] = Asked(ask, name)
        self.naive[priority].enqueue(name)
        self.tell(ask, [])

    def abort(self, sid: int) -> None:
        asked = self.open.get(sid)
        if asked is None or asked.recalled:
            self.tell(Abort(sid), [])
        elif not asked.runs:
            self.tell(Abort(sid), [self.end(asked, "aborted")])
        else:
            asked.recalled = True
            self.tell(Abort(sid), [Recall(sid)])

    def heard(self, sid: int) -> None:
        self.tell(Heard(sid), self.hear(self.open[sid]))

    def done(self, sid: int, reason: DoneReason, outputs: int = 0, cached: int = 0, retry_ns: int = 0) -> None:
        asked = self.open[sid]
        done = Done(sid, reason, outputs, cached, retry_ns)
        said: list[LaneAction] = []
        others = sum(a.runs and a.submit.priority > 0 for a in self.open.values()) - (asked.submit.priority > 0)
        if reason in GOOD:
            self.resume_ns = self.row = 0
            self.good += 1
            if self.good >= self.limit and self.limit < self.config.window - self.config.reserved:
                self.limit, self.good = self.limit + 1, 0
            said += self.hear(asked, cached)
        if reason == "busy":
            self.limit, self.good = max(1, min(self.limit, others)), 0
            self.resume_ns = self.now_ns + min(PAUSE_MAX_NS, max(retry_ns, PAUSE_NS * 2 ** min(6, self.row)))
            self.row += 1
            others_run = sum(a.runs for a in self.open.values()) > 1
            if others_run and not (asked.refused or asked.recalled):
                asked.refused, asked.runs, asked.late_ns = True, False, None
                self.naive[asked.submit.priority].let_go(asked.tenant)
                self.naive[asked.submit.priority].enqueue(asked.tenant)
                self.tell(done, said)
                return
        said.append(self.end(asked, "aborted" if asked.recalled and reason not in GOOD else reason, done))
        self.tell(done, said)


REASONS: list[DoneReason] = ["stop", "length", "stop", "length", "failed", "lost", "busy", "busy", "refused", "aborted"]


class LaneMachine(RuleBasedStateMachine):
    """Any order of events that a driver can bring."""

    world: World

    @initialize(window=st.integers(1, 5), reserved=st.integers(0, 2), fair=st.booleans())
    def start(self, window: int, reserved: int, fair: bool) -> None:
        fairness = FairnessConfig(enabled=fair)
        self.world = World(LaneConfig(window + reserved, reserved, fairness, WEIGHTS, index=3))
        self.world.tell(Wake(), [])

    @rule(
        priority=st.integers(0, 2), tenant=st.sampled_from(TENANTS), tokens=st.integers(1, 300),
        ago_ns=st.sampled_from([0, 0, 5]), within_ns=st.sampled_from([0, 50 * MS_NS, S_NS, 60 * S_NS]),
    )
    def submit(self, priority: int, tenant: str, tokens: int, ago_ns: int, within_ns: int) -> None:
        self.world.submit(priority, tenant, tokens, ago_ns, within_ns)

    @rule(wait_ns=st.sampled_from([0, 1, 49 * MS_NS, 100 * MS_NS, 2 * S_NS, 30 * S_NS, 200 * S_NS]))
    def time(self, wait_ns: int) -> None:
        """Goes by; on its way the lane is woken as it asked to be."""
        world = self.world
        until = world.now_ns + wait_ns
        while (at := world.lane.next_wake_ns()) is not None and at <= until:
            assert at > world.now_ns, "wake: never for what is over"
            world.now_ns = at
            world.tell(Wake(), [])
        world.now_ns = until
        before = world.told
        world.tell(Wake(), [])
        assert world.told == before, "wake: nothing changes by itself unless it was asked for"

    @rule(back=st.integers(-1, 8))
    def abort(self, back: int) -> None:
        self.world.abort(self.world.sid - back)

    @precondition(lambda self: any(a.runs for a in self.world.open.values()))
    @rule(
        pick=st.integers(0, 9), over=st.booleans(), reason=st.sampled_from(REASONS), outputs=st.integers(0, 40),
        cached=st.sampled_from([0, 0, 16, 1000]), retry_ns=st.sampled_from([0, 0, S_NS, 99 * S_NS]),
    )
    def upstream(
        self, pick: int, over: bool, reason: DoneReason, outputs: int, cached: int, retry_ns: int
    ) -> None:
        runs = [sid for sid, asked in self.world.open.items() if asked.runs]
        sid = runs[pick % len(runs)]
        if not over:
            self.world.heard(sid)
        elif reason == "busy" and self.world.open[sid].heard:
            self.world.done(sid, "failed", outputs)  # who has begun is not refused
        else:
            self.world.done(sid, reason, outputs, cached, retry_ns)

    @rule()
    @precondition(lambda self: self.world.sid > 12)
    def drain(self) -> None:
        self.world.draining = True
        self.world.tell(Drain(), [])

    @invariant()
    def counters(self) -> None:
        if not hasattr(self, "world"):
            return
        world = self.world
        for naive, queue in zip(world.naive, world.lane._queues, strict=True):
            floor = naive.floor
            for name, tenant in naive.tenants.items():
                start = tenant.counter if tenant.waiting else max(tenant.counter, floor)
                assert queue.tokens.counter(name) == start
        stats = world.lane.stats()
        runs = sum(a.runs for a in world.open.values())
        assert (stats.running, stats.waiting, stats.limit) == (runs, len(world.open) - runs, world.limit)


LaneMachine.TestCase.settings = settings(max_examples=250, stateful_step_count=60, deadline=None)
TestLane = LaneMachine.TestCase


def dispatched(actions: list[LaneAction]) -> list[int]:
    return [action.sid for action in actions if isinstance(action, Dispatch)]


def ask(sid: int, priority: int = 1, tenant: str = "t", tokens: int = 100, sent_ns: int = 0) -> Submit:
    return Submit(sid, sid, tenant, CLASSES[priority], priority, sent_ns, sent_ns + 60 * S_NS, tokens, 9)


def test_a_full_window_of_others_leaves_critical_its_places() -> None:
    machine = Lane(LaneConfig(window=4, reserved=1))
    sent = [dispatched(machine.handle(0, ask(sid))) for sid in range(6)]
    assert sent == [[0], [1], [2], [], [], []]
    assert dispatched(machine.handle(0, ask(6, priority=0))) == [6]
    assert dispatched(machine.handle(0, ask(7, priority=0))) == []
    assert dispatched(machine.handle(1, Done(0, "stop"))) == [7], "critical first, whoever came first"
    assert dispatched(machine.handle(2, Done(6, "stop"))) == [3], "standard had taken two of its three places"
    assert dispatched(machine.handle(3, Done(7, "stop"))) == [], "the reserve is not for standard"
    assert dispatched(machine.handle(4, Done(1, "stop"))) == [4]


def test_a_heavy_tenant_does_not_keep_a_light_one_waiting() -> None:
    machine = Lane(LaneConfig(window=2, reserved=0))
    for sid in range(20):
        machine.handle(0, ask(sid, tenant="heavy"))
    machine.handle(1, ask(20, tenant="light"))
    assert dispatched(machine.handle(2, Done(0, "stop", 9))) == [20]


def test_an_upstream_that_takes_three_gets_three_and_is_asked_again_later() -> None:
    """429 from the fourth on: nobody fails, the line here grows, and the limit finds what fits."""
    machine, taken, now_ns, failed = Lane(LaneConfig(window=8, reserved=0)), [0], 0, Counter[str]()
    busiest: list[int] = []
    due: list[LaneAction] = [action for sid in range(60) for action in machine.handle(0, ask(sid))]
    running: list[int] = []
    for _ in range(2000):
        for sid in dispatched(due):
            taken[0] += 1
            if len(running) >= 3:
                due = [*due, *machine.handle(now_ns, Done(sid, "busy"))]
            else:
                running.append(sid)
        busiest.append(len(running))
        failed.update(a.reason for a in due if isinstance(a, Ended))
        now_ns += 10 * MS_NS
        due = []
        if running and now_ns % (50 * MS_NS) == 0:
            due += machine.handle(now_ns, Done(running.pop(0), "stop", 5))
        if (at := machine.next_wake_ns()) is not None and at <= now_ns:
            due += machine.handle(now_ns, Wake())
        machine.check()
    assert max(busiest) == 3
    assert failed["stop"] == 60 - failed["busy"] and failed["busy"] <= 8, "refused twice is rare"
    assert taken[0] < 60 + 40, "an upstream that says no is not hammered"


def test_a_first_token_that_is_late_is_waiting_in_somebody_elses_queue() -> None:
    machine = Lane(LaneConfig(window=4, reserved=0))
    machine.handle(0, ask(0, tokens=100))
    machine.handle(200 * MS_NS, Heard(0))
    _, said = machine.handle(S_NS, ask(1, tokens=100, sent_ns=S_NS))
    assert isinstance(said, Pressure) and not said.waiting, "within its time"
    assert machine.next_wake_ns() == S_NS + 200 * MS_NS
    [said] = machine.handle(S_NS + 200 * MS_NS, Wake())
    assert isinstance(said, Pressure) and said.waiting == (Waiting("chat", 1, S_NS + 200 * MS_NS),)
    *_, said = machine.handle(2 * S_NS, Heard(1))
    assert isinstance(said, Pressure) and not said.waiting and not said.queued_tokens
    machine.handle(3 * S_NS, ask(2, tokens=300, sent_ns=3 * S_NS))
    assert machine.next_wake_ns() == 3 * S_NS + 600 * MS_NS, "a longer prompt may take longer"


def test_a_minute_of_overload_is_not_what_is_normal() -> None:
    machine = Lane(LaneConfig(window=4, reserved=0))
    for sid, (at_s, took_ms) in enumerate([(0, 100), (61, 2000), (100, 2000), (119, 2000)]):
        machine.handle(at_s * S_NS, ask(sid, sent_ns=at_s * S_NS))
        machine.handle(at_s * S_NS + took_ms * MS_NS, Heard(sid))
        machine.handle(at_s * S_NS + took_ms * MS_NS, Done(sid, "stop"))
    assert machine.first_tokens.least_ns(100) == 100 * MS_NS
    machine.handle(200 * S_NS, ask(9, sent_ns=200 * S_NS))
    machine.handle(201 * S_NS, Heard(9))
    assert machine.first_tokens.least_ns(100) == 1000 * MS_NS, "another minute on, it is forgotten"


def test_pauses_grow_until_an_answer_comes() -> None:
    places, now_ns, pauses = Places(4, 0), 0, []
    for _ in range(9):
        places.refused(now_ns, 0)
        assert places.resume_ns is not None and not places.free(places.resume_ns - 1, 0)
        pauses.append(places.resume_ns - now_ns)
        now_ns = places.resume_ns
        assert places.free(now_ns, 0)
    assert pauses[:3] == [PAUSE_NS, 2 * PAUSE_NS, 4 * PAUSE_NS] and pauses[-1] == PAUSE_MAX_NS
    places.refused(now_ns, 3 * S_NS)
    places.answered()
    assert places.free(now_ns, 0), "an answer: a place has come free"
    places.refused(now_ns, 0)
    assert places.resume_ns == now_ns + PAUSE_NS

"""Predicted times to first token: the gateway's sum against a list of everything, the pace against all steps.

Mutations it caught: lower priorities counted ahead; unseen ones not counted, or counted still when acknowledged; a lost
replica's word believed; steps that took all there was counted for the pace; critical work refused; the worst replica;
the time on the way to the gateway not counted.
"""

from __future__ import annotations

from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.config import ClassConfig, GatewayConfig, OverloadConfig, RouterConfig
from engine.events import Arrive, Ended, FirstToken, Pressure, Record, Reject, RequestRecord, Submit
from engine.policy.fleet import Fleet
from engine.policy.forecast import Forecast
from engine.policy.gateway import Gateway
from engine.policy.pace import MEMORY_NS, Pace
from engine.units import MS_NS, S_NS
from tests.policy.test_backlog import World


class ForecastMachine(RuleBasedStateMachine):
    """Submissions leave, replicas speak late."""

    def __init__(self) -> None:
        super().__init__()
        self.forecast = Forecast(2)
        self.sent: list[tuple[int, int, int]] = []  # replica, priority, tokens; by sid
        self.gone: set[int] = set()
        self.words: list[Pressure] = []

    @rule(replica=st.integers(0, 1), priority=st.integers(0, 2), tokens=st.integers(1, 300))
    def submit(self, replica: int, priority: int, tokens: int) -> None:
        self.forecast.sent(len(self.sent), replica, priority, tokens)
        self.sent.append((replica, priority, tokens))

    @precondition(lambda self: self.sent)
    @rule(back=st.integers(0, 5))
    def start_or_end(self, back: int) -> None:
        sid = max(0, len(self.sent) - 1 - back)
        self.gone.add(sid)
        self.forecast.forget(sid, self.sent[sid][0])

    @rule(
        replica=st.integers(0, 1), behind=st.integers(0, 4), tps=st.sampled_from([0, 1, 333, 5000]),
        backlog=st.tuples(*[st.integers(0, 900)] * 3),
    )
    def speak(self, replica: int, behind: int, tps: int, backlog: tuple[int, ...]) -> None:
        acked = len(self.sent) - 1 - behind
        self.gone |= {sid for sid, (where, *_) in enumerate(self.sent) if where == replica and sid <= acked}
        self.words.append(Pressure(replica, acked, 0, backlog_tokens=backlog, prefill_tps=tps))
        self.forecast.hear(self.words[-1])

    @rule(replica=st.integers(0, 1))
    def die(self, replica: int) -> None:
        self.words.append(Pressure(replica, -1, 0, backlog_tokens=(0, 0, 0)))
        self.forecast.lose(replica)

    @invariant()
    def same(self) -> None:
        self.forecast.check()
        for replica in (0, 1):
            word = ([w for w in self.words if w.replica == replica] or [Pressure(replica, -1, 0)])[-1]
            for priority in range(3):
                ahead = sum(word.backlog_tokens[: priority + 1])
                ahead += sum(
                    tokens for sid, (where, which, tokens) in enumerate(self.sent)
                    if where == replica and which <= priority and sid not in self.gone
                )
                want = (ahead + 7) * S_NS // word.prefill_tps if word.prefill_tps else None
                assert self.forecast.ttft_ns(replica, priority, 7) == want


ForecastMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
TestForecast = ForecastMachine.TestCase


@settings(max_examples=300, deadline=None)
@given(steps=st.lists(
    st.tuples(st.integers(0, 512), st.integers(MS_NS, 2 * S_NS), st.booleans()), min_size=1, max_size=60
))
def test_the_pace_is_that_of_recent_full_steps(steps: list[tuple[int, int, bool]]) -> None:
    def tps(counted: list[tuple[int, int]]) -> float:
        weight, tokens_sum, ns_sum = 1.0, 0.0, 0.0
        for tokens, ns in reversed(counted):  # each fades by what came after it
            tokens_sum, ns_sum = tokens_sum + weight * tokens, ns_sum + weight * ns
            weight *= MEMORY_NS / (MEMORY_NS + ns)
        return tokens_sum / ns_sum * S_NS if ns_sum else 0.0

    pace = Pace()
    counted: list[tuple[int, int]] = []
    for tokens, ns, full in steps:
        known, this = tps(counted), tokens / ns * S_NS
        assume(full or not known or abs(this - known) > 1 + known / 50)  # nearer than both sides round
        if full or 0 < known < this:
            counted.append((tokens, ns))
        pace.add(tokens, ns, full)
    if not sum(tokens for tokens, _ in counted):
        counted = [(tokens, ns) for tokens, ns, _ in steps if tokens]
    want = tps(counted)
    assert abs(pace.tps() - want) <= 1 + want / 100


def test_a_lone_request_does_not_teach_that_the_replica_is_slow() -> None:
    """A step of 2 tokens takes nearly as long as one of 12."""
    world = World(step_tokens=12)
    for n in range(20):
        world.submit([n, n, n, n], answer=1)
        world.turn(80 * MS_NS)
    calm = world.machine.pace.tps()
    assert calm in (49, 50), "rounded down"
    for n in range(40):
        world.submit([100 + n] * 6, answer=1)
    while world.turn(100 * MS_NS):
        pass
    assert world.machine.pace.tps() in (119, 120), "12 tokens in 100 ms"


def test_full_slots_slow_the_pace_though_no_prompt_runs() -> None:
    world = World(slots=1, step_tokens=12)
    for n in range(30):
        world.submit([n] * 4, answer=5)
    while world.turn(100 * MS_NS):
        pass
    assert world.machine.pace.tps() in range(7, 10), "4 tokens in 5 steps of 100 ms: 8 a second, not 40"


CLASSES = {
    "fraud": ClassConfig("critical", slo_ttft_ms=1000, caches="none"),
    "chat": ClassConfig("standard", slo_ttft_ms=3000, caches="none"),
    "tips": ClassConfig("sheddable", slo_ttft_ms=1500, caches="none"),
}


def gateway(predictive: bool = True, signal: bool = False) -> Gateway:
    overload = OverloadConfig(predictive=predictive, predicted_signal=signal)
    return Gateway(GatewayConfig(classes=CLASSES, tenants={}, overload=overload, router=RouterConfig(affinity=False)))


def arrive(machine: Gateway, rid: int, name: str, now_ns: int = 0, prompt: int = 100) -> object:
    """What becomes of it at once."""
    ask = Arrive(rid, f"r{rid}", "shop", name, now_ns, prompt, 10)
    return next(a for a in machine.handle(now_ns, ask) if isinstance(a, Submit | Reject))


def test_what_is_predicted_too_late_is_told_at_once_and_when_to_come_again() -> None:
    machine = gateway()
    machine.handle(0, Pressure(0, -1, 9, queued_tokens=9000, backlog_tokens=(100, 900, 5000), prefill_tps=400))
    first = arrive(machine, 0, "chat")
    assert isinstance(first, Submit), "1,100 tokens at 400 a second: 2.75 s"
    second = arrive(machine, 1, "chat")
    assert isinstance(second, Submit), "3 s: just in time"
    third = arrive(machine, 2, "chat", prompt=500)
    assert third == Reject(2, "overloaded", 0, 1250 * MS_NS), "4.25 s; in 1.25 s it would be in time"
    assert isinstance(arrive(machine, 3, "tips"), Reject), "behind all others"
    assert isinstance(arrive(machine, 4, "fraud"), Submit), "ahead of most, and never refused for a guess"
    assert machine.stats().fleet.forecast.refused == 2
    machine.handle(0, Pressure(0, 99, 9, backlog_tokens=(9999, 0, 0), prefill_tps=400))
    assert isinstance(arrive(machine, 5, "fraud"), Submit)
    machine.check()


def test_nothing_is_refused_when_nothing_is_known_or_it_is_off() -> None:
    for machine, tps in ((gateway(), 0), (gateway(predictive=False), 10)):
        machine.handle(0, Pressure(0, -1, 9, backlog_tokens=(0, 90_000, 0), prefill_tps=tps))
        assert isinstance(arrive(machine, 0, "chat"), Submit)


def test_time_on_the_way_to_the_gateway_counts() -> None:
    machine = gateway()
    machine.handle(0, Pressure(0, -1, 9, backlog_tokens=(0, 900, 0), prefill_tps=400))
    ask = Arrive(0, "r", "shop", "chat", 0, 100, 10)
    assert any(isinstance(a, Reject) for a in machine.handle(600 * MS_NS, ask)), "2.5 s, and 0.6 s are gone"


def test_the_record_has_what_was_predicted_beside_what_came() -> None:
    machine = gateway()
    machine.handle(0, Pressure(0, -1, 9, backlog_tokens=(0, 300, 0), prefill_tps=400))
    machine.handle(5, Arrive(0, "r", "shop", "chat", 0, 100, 10))
    machine.handle(2 * S_NS, FirstToken(0))
    rows = [a.record for a in machine.handle(3 * S_NS, Ended(0, "length")) if isinstance(a, Record)]
    row = next(r for r in rows if isinstance(r, RequestRecord))
    assert (row.predicted_ttft_ns, row.ttft_ns) == (S_NS + 5, 2 * S_NS)


def test_a_prediction_moves_the_level_of_a_class_that_waits_and_of_no_other() -> None:
    for signal, level in ((False, 0), (True, 2)):
        machine = gateway(predictive=False, signal=signal)
        assert isinstance(arrive(machine, 0, "chat"), Submit)
        machine.handle(S_NS // 10, Pressure(0, -1, 9, backlog_tokens=(0, 800, 0), prefill_tps=400))
        assert machine.stats().level == level, "2.25 s of 3, with its own unseen tokens"
    machine = gateway(predictive=False, signal=True)
    machine.handle(0, Pressure(0, -1, 9, backlog_tokens=(0, 800, 0), prefill_tps=400))
    assert machine.stats().level == 0, "nobody waits"


def test_the_best_replica_counts_and_a_dead_one_does_not() -> None:
    config = GatewayConfig(
        classes=CLASSES, tenants={}, replicas=2, overload=OverloadConfig(predictive=True, predicted_signal=True)
    )
    fleet = Fleet(config)
    fleet.hear(Pressure(0, -1, 0, backlog_tokens=(0, 800, 0), prefill_tps=400))
    fleet.hear(Pressure(1, -1, 0, backlog_tokens=(0, 200, 0), prefill_tps=400))
    assert fleet.predicted_ns()["chat"] == S_NS // 2
    fleet.lose(1)
    assert fleet.predicted_ns()["chat"] == 2 * S_NS


def test_an_idle_replica_is_asked_however_slow_it_is_thought_to_be() -> None:
    """Were all refused, no step would ever teach it a better pace."""
    fleet = Fleet(GatewayConfig(classes=CLASSES, tenants={}, overload=OverloadConfig(predictive=True)))
    name, cls = next((name, cls) for name, cls in CLASSES.items() if cls.priority)
    ask = Arrive(1, "r1", "t", name, 0, prompt_tokens=500, max_tokens=4)
    fleet.hear(Pressure(0, -1, running=0, backlog_tokens=(0, 0, 0), prefill_tps=1))
    assert fleet.late_ns(0, ask, cls) == 0
    fleet.hear(Pressure(0, -1, running=1, backlog_tokens=(0, 900, 0), prefill_tps=1))
    assert (fleet.late_ns(0, ask, cls) > 0) == (cls.priority >= 1)

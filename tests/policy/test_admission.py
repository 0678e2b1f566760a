"""Which share of the work is let in under overload, and who.

invariant: mutation that it caught
- one queue is cut for once: ages counted whoever was let in before the cut; sheddable work cut, a new beginning for all
- lowest first: standard's share cut by sheddable work; sheddable let in below one; critical given a lot
- a closed loop: growth while somebody waits long; no doubling when idle; a queue that will be late not cut again;
  cut by a fixed share whatever the model had time for; critical work taken for standard; told from one request
- lots: by draw for named users; never moved; off but cutting
"""

from __future__ import annotations

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config import ClassConfig, OverloadConfig
from engine.events import Arrive
from engine.policy.admission import ALL, STANDARD, Admission, lot
from engine.units import MS_NS, S_NS

CONFIG = OverloadConfig()
WINDOW_NS = CONFIG.window_ns
CLASSES = {
    "reco": ClassConfig(criticality="sheddable", slo_ttft_ms=1500),
    "chat": ClassConfig(criticality="standard", slo_ttft_ms=3000),
    "fraud": ClassConfig(criticality="critical", slo_ttft_ms=1000),
}
AGES = st.dictionaries(st.sampled_from([*CLASSES, "unknown"]), st.integers(-S_NS, 5 * S_NS), max_size=4)
MOVES = st.lists(st.tuples(st.integers(0, 2 * S_NS), AGES), max_size=60)


def ask(draw: int, asker: bytes = b"") -> Arrive:
    return Arrive(0, "r", "t", "chat", 0, 10, 10, draw=draw, asker=asker)


def in_(admission: Admission, priority: int, now_ns: int = 0, of: int = 2000) -> float:
    """Share of many that are let in."""
    return sum(admission.admits(ask(draw * 104_729), priority, now_ns) for draw in range(of)) / of


@settings(max_examples=300, deadline=None)
@given(moves=MOVES)
def test_what_holds_after_any_history(moves: list[tuple[int, dict[str, int]]]) -> None:
    admission, now_ns = Admission(CONFIG, CLASSES), 0
    for step_ns, ages_ns in moves:
        now_ns, before = now_ns + step_ns, admission.share
        admission.observe(now_ns, {name: now_ns - age_ns for name, age_ns in ages_ns.items()})
        admission.check()
        parts = {name: ages_ns[name] / (cls.slo_ttft_ms * MS_NS) for name, cls in CLASSES.items() if name in ages_ns}
        firm = max(parts.get("chat", 0), parts.get("fraud", 0))
        weak = parts.get("reco", 0)
        if admission.share < before:
            assert firm >= CONFIG.shed_share or weak >= CONFIG.degraded_share, "nothing is cut for nothing"
            assert admission.share >= STANDARD or firm >= CONFIG.shed_share, "lowest first"
            cut = admission.share
            admission.observe(now_ns, {name: now_ns - age_ns for name, age_ns in ages_ns.items() if age_ns > 0})
            assert admission.share == cut, "who was let in before is no evidence against the new share"
        admitted = [in_(admission, priority, of=200) for priority in (0, 1, 2)]
        assert admitted[0] == 1.0 and admitted == sorted(admitted, reverse=True)
        assert admitted[2] == 0 or admitted[1] == 1, "no sheddable work while standard work is kept out"


def test_waiting_sheddable_work_keeps_only_itself_out() -> None:
    admission = Admission(CONFIG, CLASSES)
    for i in range(100):
        now_ns = i * WINDOW_NS
        admission.observe(now_ns, {"reco": now_ns - 500 * MS_NS})  # every third look, some of them came since the cut
    assert admission.share < STANDARD * 1.05 and admission.level == 2
    assert in_(admission, 1) == 1 and in_(admission, 2) <= 0.05


def test_a_cut_of_sheddable_work_says_nothing_of_standard_work_that_waited_before_it() -> None:
    admission = Admission(CONFIG, CLASSES)
    for ms in (400, 800, 1199):  # some recommendation waits long, again and again
        admission.observe(ms * MS_NS, {"reco": (ms - 400) * MS_NS, "chat": 0})
    assert STANDARD < admission.share < ALL
    admission.observe(1200 * MS_NS, {"chat": 0})
    assert admission.share == STANDARD, "standard work was there all the time"


def test_standard_work_that_waits_cuts_sheddable_work_first_and_then_itself() -> None:
    admission = Admission(CONFIG, CLASSES)
    shares = [admission.share]
    for i in range(4):
        now_ns = i * 2 * S_NS
        admission.observe(now_ns, {"chat": now_ns - 1200 * MS_NS})
        shares.append(admission.share)
    assert shares == [ALL, STANDARD, 940_000, 883_600, 830_584]
    assert admission.level == 3


def test_hardly_anything_let_in_is_an_emergency() -> None:
    admission = Admission(CONFIG, CLASSES)
    for i in range(100):
        now_ns = i * 2 * S_NS
        admission.observe(now_ns, {"fraud": now_ns - 900 * MS_NS})
    assert admission.level == 4 and in_(admission, 1) <= 0.05 and in_(admission, 0) == 1


def test_when_nobody_waits_all_are_let_in_again_within_four_seconds() -> None:
    admission = Admission(CONFIG, CLASSES)
    for i in range(60):
        admission.observe(i * 2 * S_NS, {"chat": i * 2 * S_NS - 1200 * MS_NS})
    now_ns, shares = 120 * S_NS, [admission.share]
    assert admission.share < 50_000
    while admission.share < ALL:
        admission.observe(now_ns, {})
        shares.append(admission.share)
        now_ns += WINDOW_NS
    assert now_ns <= 124 * S_NS
    assert shares[2] - shares[1] <= 20_000, "slowly at first: the queue may only have run empty"


def test_while_somebody_waits_moderately_nothing_moves_and_while_shortly_it_grows_slowly() -> None:
    admission = Admission(CONFIG, CLASSES)
    for i in range(10):
        admission.observe(i * 2 * S_NS, {"chat": i * 2 * S_NS - 1200 * MS_NS})
    held, now_ns = admission.share, 20 * S_NS
    for _ in range(40):
        now_ns += WINDOW_NS
        admission.observe(now_ns, {"chat": now_ns - 900 * MS_NS})
    assert admission.share == held
    for _ in range(41):
        now_ns += WINDOW_NS
        admission.observe(now_ns, {"chat": now_ns - 300 * MS_NS})
    assert 2.0 * held <= admission.share <= 2.4 * held, "a fiftieth a window"


def test_four_times_the_capacity_leaves_the_server_busy_and_the_queue_short() -> None:
    """A server that takes 100 ms a request, 40 requests a second of one standard class, for a minute."""
    admission = Admission(CONFIG, CLASSES)
    queue: list[int] = []
    waits, busy_ns, free_ns = [], 0, 0
    for i in range(60 * 40):
        now_ns = i * 25 * MS_NS
        while queue and free_ns <= now_ns:
            sent_ns = queue.pop(0)
            waits.append((now_ns, (max(free_ns, sent_ns) - sent_ns) / MS_NS))
            free_ns, busy_ns = max(free_ns, sent_ns) + 100 * MS_NS, busy_ns + 100 * MS_NS
            admission.started()
        admission.observe(now_ns, {"chat": queue[0]} if queue else {})
        if admission.admits(ask(i * 7919), 1, now_ns):
            queue.append(now_ns)
            admission.sent(1)
    late = sum(wait > 3000 for at_ns, wait in waits if at_ns > 20 * S_NS)  # it came all at once: first that must go
    assert busy_ns / (60 * S_NS) >= 0.9
    assert late == 0


def test_lots_are_uniform_and_a_named_user_keeps_his_for_minutes_but_not_for_good() -> None:
    lots = sorted(lot(ask(draw * 104_729), 0) for draw in range(10_000))
    assert all(abs(each - i * 100) < 20_000 for i, each in enumerate(lots)), "within two hundredths: uniform"
    users = [bytes([n % 256, n // 256] * 8) for n in range(1000)]
    first = [lot(ask(1, user), 0) for user in users]
    assert first == [lot(ask(2, user), 299 * S_NS) for user in users], "his, whatever he asks"
    assert sum(a != b for a, b in zip(first, (lot(ask(1, user), 301 * S_NS) for user in users), strict=True)) == 1000
    assert 400 < sum(each < 500_000 for each in first) < 600


def test_off_or_all_or_nothing_lets_everybody_in() -> None:
    for change in ({"enabled": False}, {"graded": False}):
        admission = Admission(msgspec.structs.replace(CONFIG, **change), CLASSES)
        for i in range(20):
            admission.observe(i * S_NS, {"chat": -900 * S_NS})
        assert admission.share == ALL and admission.level == 0
        admission.check()


def test_a_cut_leaves_what_the_model_had_time_for_beside_critical_work() -> None:
    for started, share in ((60, 400_000), (100, 800_000), (20, 0)):
        admission = Admission(CONFIG, CLASSES)
        admission.observe(0, {"chat": -1200 * MS_NS})
        assert admission.share == STANDARD
        for _ in range(100):
            admission.sent(1)
        for _ in range(20):
            admission.sent(0)
        for _ in range(started):
            admission.started()
        admission.observe(MS_NS, {"chat": 1})  # let in since the cut, and not old enough yet
        assert admission.share == STANDARD
        admission.observe(1300 * MS_NS, {"chat": 1})
        assert abs(admission.share - share) < 5_000, "of 100 sent, those begun less the 20 critical ones"


def test_of_a_few_requests_nothing_can_be_told_but_that_they_wait() -> None:
    admission = Admission(CONFIG, CLASSES)
    admission.observe(0, {"chat": -1200 * MS_NS})
    for _ in range(7):
        admission.sent(1)
    admission.observe(1300 * MS_NS, {"chat": 1})
    assert admission.share == STANDARD - STANDARD * 6 // 100

"""The fair queue against the paper's own pseudocode: Algorithm 2 of Sheng et al., "Fairness in Serving Large Language
Models" (OSDI 2024), written down line by line over a list and a dict that forget nothing.

No package has VTC: S-LoRA, where the authors' code lives, is an empty name among the packages, and ``ns.py`` has WFQ
and DRR, which know a packet's length beforehand and order by it. ``test_fairness.py`` has a reference for single
calls; here the whole loop runs, arrivals against steps, and at every admission ours must be an argmin of the paper's
counters. Where several are least the paper leaves the choice open, and follows ours.

Mutations caught: no lift; a lift to the greatest; lifted at every request; nothing charged; outputs free; charges after
the last one left lost; weights upside down; younger requests of a client first; clients by turn; old counters believed;
newcomers behind everybody.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction

from hypothesis import given, settings
from hypothesis import strategies as st

from engine.policy.fairness import UNIT, FairQueue

W_P, W_Q = 1, 2
WEIGHTS = {"a": 1.0, "b": 0.5, "c": 4.0, "d": 1.0}  # their inverses are whole in UNIT
KV_TOKENS, LONGEST = 60, 20


@dataclass(eq=False)
class Request:
    client: str
    input_length: int
    output_length: int
    key: int = 0
    decoded: int = 0

    @property
    def tokens(self) -> int:
        """What it may hold of the memory."""
        return self.input_length + self.output_length


@dataclass
class Algorithm2:
    """Names as in the paper. ``w`` divides, as in its section on weights."""

    w: dict[str, float]
    c: dict[str, Fraction] = field(default_factory=dict)
    q: list[Request] = field(default_factory=list)
    batch: list[Request] = field(default_factory=list)
    last_client_left_q: str = ""

    def clients(self) -> set[str]:
        return {r.client for r in self.q}

    def arrive(self, r: Request) -> None:
        """The monitoring stream."""
        u = r.client
        self.c.setdefault(u, Fraction(0))
        if u not in self.clients():
            if not self.q:
                if self.last_client_left_q:
                    self.c[u] = max(self.c[u], self.c[self.last_client_left_q])
            else:
                self.c[u] = max(self.c[u], min(self.c[i] for i in self.clients()))
        self.q.append(r)

    def argmin(self) -> set[str]:
        least = min(self.c[i] for i in self.clients())
        return {i for i in self.clients() if self.c[i] == least}

    def fits(self, r: Request) -> bool:
        return sum(other.tokens for other in self.batch) + r.tokens <= KV_TOKENS

    def admit(self, k: str) -> Request:
        """Takes in the earliest request of client k."""
        r = next(r for r in self.q if r.client == k)
        self.c[k] += Fraction(W_P * r.input_length) / Fraction(self.w[k])
        self.q.remove(r)
        self.batch.append(r)
        if k not in self.clients():
            self.last_client_left_q = k
        return r

    def decode(self) -> list[Request]:
        """A step of the whole batch; who has finished."""
        for r in self.batch:
            self.c[r.client] += Fraction(W_Q) / Fraction(self.w[r.client])
            r.decoded += 1
        finished = [r for r in self.batch if r.decoded == r.output_length]
        self.batch = [r for r in self.batch if r not in finished]
        return finished


class Pair:
    """The paper's loop, and ours beside it."""

    def __init__(self, weights: dict[str, float]) -> None:
        self.paper, self.queue, self.keys = Algorithm2(weights), FairQueue(weights), 0

    def arrive(self, client: str, input_length: int, output_length: int) -> None:
        self.keys += 1
        self.paper.arrive(Request(client, input_length, output_length, self.keys))
        self.queue.push(client, self.keys, (0, self.keys))

    def step(self) -> None:
        paper, queue = self.paper, self.queue
        while paper.q:
            key = queue.head()
            head = next(r for r in paper.q if r.key == key)
            assert head.client in paper.argmin(), "the client with the least counter"
            if not paper.fits(head):
                break
            assert paper.admit(head.client) is head, "its earliest request"
            assert queue.pop() == head.key
            queue.charge(head.key, W_P * head.input_length)
        assert paper.q or queue.head() is None
        for r in paper.batch:
            queue.charge(r.key, W_Q)
        for r in paper.decode():
            queue.remove(r.key)
        queue.check()
        for client in paper.clients():
            assert queue.tokens.counter(client) == paper.c[client] * UNIT


CLIENTS = st.sampled_from(list(WEIGHTS))
REQUESTS = st.lists(st.tuples(CLIENTS, st.integers(1, LONGEST), st.integers(1, LONGEST)), max_size=6)


@settings(max_examples=150, deadline=None)
@given(trace=st.lists(st.tuples(REQUESTS, st.integers(1, 12)), min_size=5, max_size=30))
def test_whom_it_takes_in_is_the_papers_choice(trace: list[tuple[list[tuple[str, int, int]], int]]) -> None:
    pair = Pair(WEIGHTS)
    for requests, steps in trace:
        for request in requests:
            pair.arrive(*request)
        for _ in range(steps):
            pair.step()
    while pair.paper.q or pair.paper.batch:
        pair.step()
    assert pair.queue.tokens.stats().tenants <= len(WEIGHTS)


@settings(max_examples=100, deadline=None)
@given(trace=st.lists(st.tuples(REQUESTS, st.integers(1, 4)), min_size=5, max_size=40))
def test_the_counters_of_those_who_wait_stay_within_the_papers_bound(
    trace: list[tuple[list[tuple[str, int, int]], int]],
) -> None:
    """Its Lemma 4.3, of which the bounds on service and on waiting follow: at most max(w_p L, w_q M) apart."""
    pair = Pair(dict.fromkeys(WEIGHTS, 1.0))
    bound = max(W_P * LONGEST, W_Q * KV_TOKENS)
    for requests, steps in trace:
        for request in requests:
            pair.arrive(*request)
        for _ in range(steps):
            pair.step()
            waiting = [pair.queue.tokens.counter(client) for client in pair.paper.clients()]
            assert not waiting or max(waiting) - min(waiting) <= bound * UNIT

"""Whose turn it is among the tenants of one priority: the one that has been served least.

``VirtualTokens`` counts what every tenant has been served, divided by its weight. Whoever comes back after a pause is
lifted to the least counter of those who wait: a pause saves nothing up. Two tenants that always wait stay within
``2 max(w_p L, w_q M)`` weighted tokens of each other, L being the longest prompt and M the KV tokens. ``FairQueue`` is
the waiting room on top. Method: VTC (OSDI'24), with the paper's lift to the last who left when nobody waits, and heaps.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush, heapreplace

from engine.values import Struct

UNIT = 1_000_000_000  # a weighted token of a tenant with weight 1: integers, so nothing drifts
Rank = tuple[int, ...]


@dataclass(slots=True, eq=False)
class _Tenant:
    """``turn`` breaks ties, being unique: who has waited without a break for longer. In each heap once at most."""

    name: str
    price: int  # of a weighted token
    counter: int
    turn: int
    waiting: int = 0
    running: int = 0
    entered: bool = False  # has an entry among those who wait; its numbers may be old, hence too small
    idles: bool = False  # has one among those who may be forgotten


class TokenStats(Struct):
    """Tenants remembered, those that wait, and the least counter: whoever comes is lifted to it."""

    tenants: int
    waiting: int
    floor: int


class VirtualTokens:
    """Counters of all tenants that wait, run, or are ahead of those who wait; the others are forgotten."""

    def __init__(self, weights: dict[str, float]) -> None:
        assert all(weight > 0 for weight in weights.values()), "weights: positive"
        self._prices = {name: max(1, round(UNIT / weight)) for name, weight in weights.items()}
        self._tenants: dict[str, _Tenant] = {}
        self._queue: list[tuple[int, int, _Tenant]] = []  # heap of (counter, turn, tenant); old entries are renewed
        self._idle: list[tuple[int, int, _Tenant]] = []  # the same, of those that may be forgotten one day
        self._floor = 0  # while nobody waits: where those who waited last have come to
        self._last = ""  # who left last
        self._turn = self._waiting = 0

    def enqueue(self, tenant: str) -> None:
        """One more request of it waits."""
        who = self._know(tenant)
        if not who.waiting:
            who.counter = max(who.counter, self.floor)
            self._turn += 1
            who.turn = self._turn
            self._waiting += 1
            if not who.entered:
                who.entered = True
                heappush(self._queue, (who.counter, who.turn, who))
        who.waiting += 1
        self._forget()

    def dequeue(self, tenant: str) -> None:
        """One fewer: it runs, or has gone."""
        who = self._tenants[tenant]
        assert who.waiting, "dequeue: only who waits can leave"
        if who.waiting == 1 == self._waiting:
            self._floor, self._last = who.counter, tenant
        who.waiting -= 1
        if not who.waiting:
            self._waiting -= 1
            if len(self._queue) > 2 * self._waiting + 8:
                self._tidy()
        self._forget(who)

    def hold(self, tenant: str) -> None:
        """A request of it runs: charges will come, so it is not forgotten until as many ``let_go``."""
        self._know(tenant).running += 1

    def let_go(self, tenant: str) -> None:
        """One has run to its end."""
        who = self._tenants[tenant]
        assert who.running, "let go: only who is held"
        who.running -= 1
        self._forget(who)

    def charge(self, tenant: str, tokens_weighted: int) -> None:
        """So much service: prompt tokens on admission and decoded ones later, each times what such a token costs."""
        assert tokens_weighted >= 0, "charge: service is not taken back"
        who = self._tenants.get(tenant) or self._know(tenant)
        who.counter += tokens_weighted * who.price
        if not self._waiting and tenant == self._last:
            self._floor = max(self._floor, who.counter)
        if self._idle or not (who.waiting or who.running):  # else nobody can have become forgettable
            self._forget(who)

    def pick(self) -> str | None:
        """Who is next: the least counter among those who wait."""
        who = self._front()
        return None if who is None else who.name

    @property
    def floor(self) -> int:
        """The least counter among those who wait, or of the last who did. It never falls."""
        who = self._front()
        return self._floor if who is None else who.counter

    def counter(self, tenant: str) -> int:
        """What it would start from: in units of ``UNIT`` weighted tokens at weight 1."""
        who = self._tenants.get(tenant)
        return self.floor if who is None else who.counter if who.waiting else max(who.counter, self.floor)

    def stats(self) -> TokenStats:
        """A snapshot."""
        return TokenStats(len(self._tenants), self._waiting, self.floor)

    def check(self) -> None:
        """Invariants."""
        waiting = [who for who in self._tenants.values() if who.waiting]
        assert len(waiting) == self._waiting, "waiting: counted"
        front = min(waiting, key=lambda who: (who.counter, who.turn), default=None)
        assert self._front() is front, "pick: the least counter, then the longest wait"
        assert front is None or front.counter >= self._floor, "floor: never falls"
        for who in self._tenants.values():
            assert who.waiting or who.running or who.counter > self.floor, f"memory: nothing to remember of {who.name}"
        for heap, flag in ((self._queue, "entered"), (self._idle, "idles")):
            held = {id(who) for *_, who in heap}
            assert len(held) == len(heap), "heaps: nobody twice"
            for counter, turn, who in heap:
                assert (counter, turn) <= (who.counter, who.turn), "heaps: an old entry is too small, never too large"
            assert all((id(who) in held) == getattr(who, flag) for who in self._tenants.values()), f"heaps: {flag}"
        assert len(self._queue) <= 2 * self._waiting + 8, "memory: no more old entries than new ones"

    def _know(self, tenant: str) -> _Tenant:
        who = self._tenants.get(tenant)
        if who is None:
            self._turn += 1
            who = self._tenants[tenant] = _Tenant(tenant, self._prices.get(tenant, UNIT), self.floor, self._turn)
        return who

    def _front(self) -> _Tenant | None:
        queue = self._queue
        while queue:
            counter, turn, who = queue[0]
            if not who.waiting:
                who.entered = False
                heappop(queue)
            elif (counter, turn) != (who.counter, who.turn):
                heapreplace(queue, (who.counter, who.turn, who))
            else:
                return who
        return None

    def _tidy(self) -> None:
        for *_, who in self._queue:
            who.entered = who.waiting > 0
        self._queue = [(who.counter, who.turn, who) for *_, who in self._queue if who.waiting]
        heapify(self._queue)

    def _forget(self, who: _Tenant | None = None) -> None:
        """Who neither waits nor runs is forgotten once the floor has reached it: it would be lifted to it anyway."""
        if who is not None and not (who.waiting or who.running or who.idles):
            who.idles = True
            heappush(self._idle, (who.counter, who.turn, who))
        idle = self._idle
        if not idle:
            return  # as nearly always: the floor need not be looked for
        floor = self.floor
        while idle and idle[0][0] <= floor:
            who = idle[0][2]
            if who.waiting or who.running:
                who.idles = False
                heappop(idle)
            elif who.counter > floor:
                heapreplace(idle, (who.counter, who.turn, who))
            else:
                heappop(idle)
                del self._tenants[who.name]


@dataclass(slots=True, eq=False)
class _Item:
    key: int
    tenant: str
    turn: int  # breaks ties between ranks: kept when it is put back
    waiting: bool = False


@dataclass(slots=True, eq=False)
class _Line:
    heap: list[tuple[Rank, int, _Item]] = field(default_factory=list)  # of (rank, turn, item); removed ones are skipped
    waiting: int = 0


class FairQueue:
    """The waiting room of one priority: by rank inside a tenant, by virtual tokens between tenants.

    A key stays known from ``push`` to ``remove``. ``pop`` means that it runs now, and another ``push`` that it was put
    back to its old place. If the head does not fit, nobody else may go instead, or the bound is lost.
    """

    def __init__(self, weights: dict[str, float]) -> None:
        self.tokens = VirtualTokens(weights)
        self._items: dict[int, _Item] = {}  # by key: those that wait and those that run
        self._lines: dict[str, _Line] = {}  # by tenant: those that wait
        self.waiting = 0  # keys
        self._turn = 0

    def push(self, tenant: str, key: int, item_rank: Rank) -> None:
        """It waits; smaller ranks go first, then who came first. A key that runs is put back."""
        item = self._items.get(key)
        if item is None:
            self._turn += 1
            item = self._items[key] = _Item(key, tenant, self._turn)
        else:
            assert (item.tenant, item.waiting) == (tenant, False), "push: nobody waits twice, or for another tenant"
            self.tokens.let_go(tenant)
        item.waiting = True
        line = self._lines.setdefault(tenant, _Line())
        heappush(line.heap, (item_rank, item.turn, item))
        line.waiting += 1
        self.waiting += 1
        self.tokens.enqueue(tenant)

    def head(self) -> int | None:
        """Who is next."""
        tenant = self.tokens.pick()
        if tenant is None:
            return None
        heap = self._lines[tenant].heap
        while not heap[0][2].waiting:
            heappop(heap)
        return heap[0][2].key

    def pop(self) -> int | None:
        """The head runs from now on."""
        key = self.head()
        if key is not None:
            item = self._items[key]
            heappop(self._lines[item.tenant].heap)
            self.tokens.hold(item.tenant)
            self._leave(item)
        return key

    def charge(self, key: int, tokens_weighted: int) -> None:
        """It has been served so much more; said before it is removed."""
        self.tokens.charge(self._items[key].tenant, tokens_weighted)

    def remove(self, key: int) -> None:
        """It has ended, waiting or running; a key that nobody knows is a no-op."""
        item = self._items.pop(key, None)
        if item is None:
            return
        if item.waiting:
            self._leave(item)
        else:
            self.tokens.let_go(item.tenant)

    def waits(self) -> dict[int, bool]:
        """Every key that is known, and whether it waits; what is not waiting runs."""
        return {key: item.waiting for key, item in self._items.items()}

    def check(self) -> None:
        """Invariants."""
        self.tokens.check()
        lines: dict[str, int] = {}
        for item in self._items.values():
            if item.waiting:
                lines[item.tenant] = lines.get(item.tenant, 0) + 1
        assert lines == {name: line.waiting for name, line in self._lines.items()}, "lines: exactly those that wait"
        assert self.waiting == sum(lines.values()), "waiting: counted"
        for name, line in self._lines.items():
            here = [item.key for *_, item in line.heap if item.waiting]
            assert len(here) == line.waiting and all(self._items[key].tenant == name for key in here), "line: each once"
            assert len(line.heap) <= 2 * line.waiting + 8, "memory: few entries of those that were removed"

    def _leave(self, item: _Item) -> None:
        line = self._lines[item.tenant]
        item.waiting = False
        line.waiting -= 1
        self.waiting -= 1
        self.tokens.dequeue(item.tenant)
        if not line.waiting:
            del self._lines[item.tenant]
        elif len(line.heap) > 2 * line.waiting + 8:
            line.heap = [entry for entry in line.heap if entry[2].waiting]
            heapify(line.heap)

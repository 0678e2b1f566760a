"""The replica's world with many tenants: who is taken in follows from the paper's rule over lists that forget nobody.

``ReplicaWorld`` expects strict age over all, which is what one tenant gets. Here a tenant's counter is known from the
prompts and outputs that the runner saw, never from the batcher's books.
"""

from __future__ import annotations

from itertools import pairwise

from engine.config import ReplicaConfig
from engine.events import PRIORITY, RunStep, SeqEnd
from tests.policy.test_fairness import NaiveTokens
from tests.policy.worlds import NEVER_NS, Asked, ReplicaWorld


class FairWorld(ReplicaWorld):
    """``charged``: what each (priority, tenant) was served, in weighted tokens, by the runner's account."""

    def __init__(self, config: ReplicaConfig) -> None:
        super().__init__(config)
        self.naive = [NaiveTokens(config.weights) for _ in PRIORITY]
        self.charged: dict[tuple[int, str], int] = {}
        self.admitted: list[int] = []  # sids in the order in which a step held them first

    def submit(
        self, tokens: list[int], max_tokens: int = 4, priority: int = 1, tenant: str = "t", pinned_blocks: int = 0,
        late_ns: int = 0, start_by_ns: int = NEVER_NS, endless: bool = False,
    ) -> int:
        sid = super().submit(tokens, max_tokens, priority, tenant, pinned_blocks, late_ns, start_by_ns, endless)
        if sid in self.open:
            self.naive[priority].enqueue(tenant)
        return sid

    def _end(self, asked: Asked) -> None:
        naive, tenant = self.naive[asked.priority], asked.submit.tenant
        if asked.running:
            naive.let_go(tenant)
        else:
            naive.dequeue(tenant)
        super()._end(asked)

    def _promote(self, asked: Asked) -> None:
        self.naive[asked.priority].dequeue(asked.submit.tenant)
        super()._promote(asked)
        self.naive[asked.priority].enqueue(asked.submit.tenant)

    def _put_back(self, asked: Asked) -> None:
        naive, tenant = self.naive[asked.priority], asked.submit.tenant
        naive.let_go(tenant)
        naive.enqueue(tenant)
        super()._put_back(asked)

    def _start(self, step: RunStep) -> None:
        waiting = [a for a in self.open.values() if not a.running]
        for start in step.start:
            asked = self.open[start.sid]
            if asked.held:
                continue
            assert asked is self._next(waiting), "admission: of the first priority, the tenant served least, its oldest"
            waiting.remove(asked)
            naive, tenant = self.naive[asked.priority], asked.submit.tenant
            naive.hold(tenant)
            naive.dequeue(tenant)
            if asked.first_ns is None:
                self.admitted.append(asked.sid)
                uncached = asked.submit.prompt_tokens - start.computed
                self._charge(asked, uncached * self.config.fairness.prompt_token_weight)
        super()._start(step)

    def _accept(self, asked: Asked, failed: bool, first: list[int], ends: list[SeqEnd]) -> None:
        self._charge(asked, self.config.fairness.output_token_weight)  # an end token and nan are computed too
        super()._accept(asked, failed, first, ends)

    def _charge(self, asked: Asked, cost: int) -> None:
        priority, tenant = asked.priority, asked.submit.tenant
        self.naive[priority].charge(tenant, cost)
        self.charged[priority, tenant] = self.charged.get((priority, tenant), 0) + cost

    def _next(self, waiting: list[Asked]) -> Asked | None:
        for priority, naive in enumerate(self.naive):
            tenant = naive.pick()
            if tenant is not None:
                ours = [a for a in waiting if (a.priority, a.submit.tenant) == (priority, tenant)]
                return min(ours, key=lambda a: a.rank)
        return None

    def _strict(self, step: RunStep, before: dict[int, list[int]], victims: int) -> None:
        """Priority first; then nobody new before another tenant's that is in prefill; age inside a tenant."""
        served = [self.open[c.sid] for c in step.chunks]
        starved = [a for a in self._running() if not a.decoding and a not in served]
        self._held_back(served)
        for one, two in pairwise(a for at, a in enumerate(served) if not self._behind_owner(a, served[:at])):
            if one.priority == two.priority and one.submit.tenant == two.submit.tenant:
                assert one.rank < two.rank, "chunks: by age inside a tenant"
        critical = any(a.submit.priority == 0 for a in starved)
        assert not starved or self._spent(step, victims, served, critical), "prefill: all of it, while there is budget"
        for at, asked in enumerate(served):
            for later in (*served[at + 1 :], *starved):
                assert asked.priority <= later.priority, "chunks: in order of priority"
                overtakes = asked.sid in self._new and later.sid not in self._new
                overtakes = overtakes and asked.submit.tenant != later.submit.tenant
                assert not overtakes or asked.priority < later.priority, "prefill: not overtaken by heads"
        head = self._next([a for a in self.open.values() if not a.running])
        if head is not None:
            self._waits_for_an_owner(head, served)
        spent = head is not None and self._spent(step, victims, served, head.submit.priority == 0)
        if head is not None and (not spent or (served and served[-1].priority > head.priority)):
            assert not self._could_enter(head, before.get(head.sid, [])), "head: passed over only if it had no room"

    def _outranks(self, one: Asked, two: Asked) -> bool:
        return one.rank < two.rank and (one.priority, one.submit.tenant) == (two.priority, two.submit.tenant)

    def check(self) -> None:
        super().check()
        for naive, queue in zip(self.naive, self.machine.batcher.room.queues, strict=True):
            floor = naive.floor
            for name, tenant in naive.tenants.items():
                start = tenant.counter if tenant.waiting else max(tenant.counter, floor)
                assert queue.tokens.counter(name) == start, "counters: the naive rule's, whoever was charged when"
            assert queue.tokens.stats().tenants == naive.remembered()

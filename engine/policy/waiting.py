"""A replica's waiting room: strict between priorities, fair between the tenants of one, by age inside a tenant.

Strict priority alone starves. Who has waited longer than ``age_ms``, all its times in here together, is treated one
priority up from then on, though never as critical: it moves to the other queue, as one more request of its tenant, and
what it is served from then on is charged there. So each queue orders what it serves by what it has served, and the
bound holds in each. It stays up when it is put back: having waited twice is no reason to wait from the start.

One ``FairQueue`` a priority. What is charged is what a tenant asked for and the replica did for it: the prompt tokens
that no prefix cache held, when it first runs, and every token that a decode row gives, when its step has run. Hits are
free, since nothing is computed for them; what a put-back sequence computes again is free too, since others caused it.
Rows are counted by tenant, and steps are charged when somebody asks whose turn it is or a row comes or goes: a step in
which nobody waits costs nothing here, another one by how many tenants decode and not by how many rows.
"""

from __future__ import annotations

from heapq import heappop, heappush

from engine.config import ReplicaConfig
from engine.events import PRIORITY
from engine.policy.fairness import FairQueue
from engine.policy.sequence import Sequence
from engine.units import ms_to_ns

BEST_AGED = 1  # standard: waiting makes nobody critical


class WaitingRoom:
    """Owned by a Batcher. A sequence is known here from ``push`` to ``remove``, waiting or running."""

    def __init__(self, config: ReplicaConfig) -> None:
        self._costs = config.fairness
        self._age_ns = ms_to_ns(config.batcher.age_ms)
        self.queues = tuple(FairQueue(config.weights) for _ in PRIORITY)  # by priority
        self._rows: tuple[dict[str, int], ...] = tuple({} for _ in PRIORITY)  # decode rows by tenant
        self._uncharged = 0  # steps that these rows have run
        self._due: list[tuple[int, int, Sequence]] = []  # heap of (instant, sid, seq): it has waited long enough then

    def push(self, seq: Sequence) -> None:
        """It waits: new, or put back to its old place among its tenant's. ``seq.since_ns`` says since when."""
        self._charge_steps()
        self.queues[seq.priority].push(seq.tenant, seq.ask.sid, seq.rank)
        if self._age_ns and seq.priority > BEST_AGED:
            heappush(self._due, (seq.since_ns + self._age_ns - seq.waited_ns, seq.ask.sid, seq))

    def promote(self, now_ns: int) -> None:
        """Whoever has waited longer than it may goes up. Entries of those that wait no more, or again, are skipped."""
        while self._due and self._due[0][0] < now_ns:
            _, sid, seq = heappop(self._due)
            if seq.state == "waiting" and seq.priority > BEST_AGED and self._waited_ns(seq, now_ns) > self._age_ns:
                self._charge_steps()
                self.queues[seq.priority].remove(sid)
                seq.priority -= 1
                self.push(seq)

    def _waited_ns(self, seq: Sequence, now_ns: int) -> int:
        return seq.waited_ns + now_ns - seq.since_ns

    def head(self) -> int | None:
        """The sid that is next: nobody else may go instead, or fairness loses its bound."""
        for queue in self.queues:
            if queue.waiting:
                self._charge_steps()
                return queue.head()
        return None

    def pop(self, now_ns: int, seq: Sequence) -> None:
        """The head runs from now on."""
        popped = self.queues[seq.priority].pop()
        assert popped == seq.ask.sid, "pop: only the head is taken in"
        seq.waited_ns = self._waited_ns(seq, now_ns)

    def remove(self, seq: Sequence) -> None:
        """It has ended, waiting or running."""
        self._charge_steps()
        self.queues[seq.priority].remove(seq.ask.sid)

    # ------------------------------------------------------------ what was served

    def charge_prompt(self, seq: Sequence, tokens: int) -> None:
        """So many prompt tokens are to be computed for it: once, at its first admission, before anybody else's."""
        self.queues[seq.priority].charge(seq.ask.sid, tokens * self._costs.prompt_token_weight)

    def begin_decode(self, seq: Sequence) -> None:
        """Its prompt has given the first token (or the next one, after a preemption); from now on one a step."""
        self._charge_steps()
        rows = self._rows[seq.priority]
        rows[seq.tenant] = rows.get(seq.tenant, 0) + 1
        self.queues[seq.priority].charge(seq.ask.sid, self._costs.output_token_weight)

    def end_decode(self, seq: Sequence) -> None:
        """It gives no more tokens: ended, or put back."""
        self._charge_steps()
        rows = self._rows[seq.priority]
        rows[seq.tenant] -= 1
        if not rows[seq.tenant]:
            del rows[seq.tenant]

    def charge_outputs(self, steps: int) -> None:
        """Every decode row has given a token in each of so many steps."""
        self._uncharged += steps

    def _charge_steps(self) -> None:
        """Counters are looked at, or rows change: what was served meanwhile comes first."""
        if not self._uncharged:
            return
        cost, self._uncharged = self._uncharged * self._costs.output_token_weight, 0
        for queue, rows in zip(self.queues, self._rows, strict=True):
            for tenant, count in rows.items():
                queue.tokens.charge(tenant, count * cost)

    def check(self, sequences: dict[int, Sequence]) -> None:
        """Invariants, against all sequences that have not ended."""
        self._charge_steps()
        for priority, (queue, rows) in enumerate(zip(self.queues, self._rows, strict=True)):
            queue.check()
            ours = [seq for seq in sequences.values() if seq.priority == priority]
            waits = {seq.ask.sid: seq.state == "waiting" for seq in ours}
            assert queue.waits() == waits, "waiting room: all that have not ended, and who of them waits"
            decoding: dict[str, int] = {}
            for seq in ours:
                if seq.state == "decode":
                    decoding[seq.tenant] = decoding.get(seq.tenant, 0) + 1
            assert rows == decoding, "waiting room: the decode rows of every tenant"
        for seq in sequences.values():
            aged = seq.ask.priority - seq.priority
            assert aged in (0, 1) and (not aged or seq.priority >= BEST_AGED), "aging: one up, never to critical"
            assert not aged or self._age_ns, "aging: only if it is on"

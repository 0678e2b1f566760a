"""A replica's waiting room: strict between priorities, fair between the tenants of one, by age inside a tenant.

One ``FairQueue`` a priority. What is charged is what a tenant asked for and the replica did for it: the prompt tokens
that no prefix cache held, when it first runs, and every token that a decode row gives, when its step has run. Hits are
free, since nothing is computed for them; what a put-back sequence computes again is free too, since others caused it.
Rows are counted by tenant, so a step costs by how many tenants decode and not by how many rows.
"""

from __future__ import annotations

from engine.config import ReplicaConfig
from engine.events import PRIORITY
from engine.policy.fairness import FairQueue
from engine.policy.sequence import Sequence


class WaitingRoom:
    """Owned by a Batcher. A sequence is known here from ``push`` to ``remove``, waiting or running."""

    def __init__(self, config: ReplicaConfig) -> None:
        self._costs = config.fairness
        self.queues = tuple(FairQueue(config.weights) for _ in PRIORITY)  # by priority
        self._rows: tuple[dict[str, int], ...] = tuple({} for _ in PRIORITY)  # decode rows by tenant

    def push(self, seq: Sequence) -> None:
        """It waits: new, or put back to its old place among its tenant's."""
        self.queues[seq.ask.priority].push(seq.tenant, seq.ask.sid, seq.rank)

    def head(self) -> int | None:
        """The sid that is next: nobody else may go instead, or fairness loses its bound."""
        for queue in self.queues:
            if queue.waiting:
                return queue.head()
        return None

    def pop(self, seq: Sequence) -> None:
        """The head runs from now on."""
        popped = self.queues[seq.ask.priority].pop()
        assert popped == seq.ask.sid, "pop: only the head is taken in"

    def remove(self, seq: Sequence) -> None:
        """It has ended, waiting or running."""
        self.queues[seq.ask.priority].remove(seq.ask.sid)

    # ------------------------------------------------------------ what was served

    def charge_prompt(self, seq: Sequence, tokens: int) -> None:
        """So many prompt tokens are to be computed for it: once, at its first admission, before anybody else's."""
        self.queues[seq.ask.priority].charge(seq.ask.sid, tokens * self._costs.prompt_token_weight)

    def begin_decode(self, seq: Sequence) -> None:
        """Its prompt has given the first token (or the next one, after a preemption); from now on one a step."""
        rows = self._rows[seq.ask.priority]
        rows[seq.tenant] = rows.get(seq.tenant, 0) + 1
        self.queues[seq.ask.priority].charge(seq.ask.sid, self._costs.output_token_weight)

    def end_decode(self, seq: Sequence) -> None:
        """It gives no more tokens: ended, or put back."""
        rows = self._rows[seq.ask.priority]
        rows[seq.tenant] -= 1
        if not rows[seq.tenant]:
            del rows[seq.tenant]

    def charge_outputs(self, steps: int) -> None:
        """Every decode row has given a token in each of so many steps."""
        cost = steps * self._costs.output_token_weight
        for queue, rows in zip(self.queues, self._rows, strict=True):
            for tenant, count in rows.items():
                queue.tokens.charge(tenant, count * cost)

    def check(self, sequences: dict[int, Sequence]) -> None:
        """Invariants, against all sequences that have not ended."""
        for priority, (queue, rows) in enumerate(zip(self.queues, self._rows, strict=True)):
            queue.check()
            ours = [seq for seq in sequences.values() if seq.ask.priority == priority]
            waits = {seq.ask.sid: seq.state == "waiting" for seq in ours}
            assert queue.waits() == waits, "waiting room: all that have not ended, and who of them waits"
            decoding: dict[str, int] = {}
            for seq in ours:
                if seq.state == "decode":
                    decoding[seq.tenant] = decoding.get(seq.tenant, 0) + 1
            assert rows == decoding, "waiting room: the decode rows of every tenant"

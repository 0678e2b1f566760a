"""One request inside a replica: how many tokens are known, how many of them have KV, and which blocks hold it.

No prefill and no decode phase (vLLM's framing): a step hands out tokens until ``computed`` reaches ``known``, and then
one token at a time. While a sequence decodes, its numbers stand still and are settled from the step index.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from engine.events import Submit

State = Literal["waiting", "prefill", "decode", "ended"]


@dataclass(slots=True, eq=False)
class Sequence:
    """Mutable, owned by one Batcher."""

    ask: Submit
    digests: list[bytes]  # chain over the full blocks of all known tokens, as far as it is known
    tenant: str  # whose turn it takes and who is charged; "" for all when fairness is off
    priority: int  # as which it is treated: its own, or one up when it has waited too long
    since_ns: int  # when it began to wait, this time
    waited_ns: int = 0  # in earlier times
    state: State = "waiting"
    known: int = 0  # prompt and output tokens; while decoding: at ``decode_from``
    computed: int = 0  # of these, with KV in ``table``
    outputs: int = 0  # while decoding: at ``decode_from``
    decode_from: int = 0  # step index of the first decode step
    table: list[int] = field(default_factory=list)
    owes: int = 0  # blocks that it may still ask for while it runs
    border: int = 0  # while decoding: the step that needs one more block
    limit: int = 0  # while decoding: the step that yields the last token
    chunk: int = 0  # tokens planned in the step in flight
    queued: int = 0  # tokens that it adds to the replica's queue
    first_ns: int | None = None  # when a step held it first
    cached_tokens: int = 0
    computed_tokens: int = 0
    preemptions: int = 0
    told: bool = False  # the runner has it in its running set

    @property
    def rank(self) -> tuple[int, int, int]:
        """Strict priority, then age, then number: smaller goes first. Total, so that ties never depend on history."""
        return (self.priority, self.ask.sent_ns, self.ask.sid)

    def precedes(self, other: Sequence) -> bool:
        """Does it take budget before one that was taken in earlier? Age counts only inside a tenant.

        Between tenants the fair queue has decided who was taken in when. Were age asked again here, the old requests
        of a flood would overtake another tenant's only one in the middle of its prefill.
        """
        if self.priority != other.priority:
            return self.priority < other.priority
        return self.tenant == other.tenant and self.rank < other.rank

    @property
    def queue_ns(self) -> int:
        """From submission to the first step that held it."""
        return 0 if self.first_ns is None else self.first_ns - self.ask.sent_ns

"""Which replica: the one that would be through with it first, counted in prompt tokens that it would have to compute.

Ahead of a request lies what this gateway has sent there and not seen done, or what the replica itself says is queued,
whichever is more. Of its own prompt, what the replica has in its prefix cache is free; the router remembers which
blocks it sent where, as far as that fits, and guesses the rest. With KV events it need not guess: it knows what is
there, and counts as there what an open submission is about to compute. A replica that is far behind the others is not
asked for what it remembers: a popular prompt would keep it there. The gateway's own account is never stale; what it
knows of work that others send there can be. A replica that has something of ours and shows no progress for ``stale_ms``
may be full of theirs, and all gateways would go to where each of them thinks that there is nothing to do. Then two are
drawn, and the better one of these is taken: whoever looks best gets two shares at most. Method: NVIDIA Dynamo's cost
(blocks to prefill plus blocks in decode, predicted when routing), Ray Serve's rule (affinity only while balanced), the
power of two choices under stale information (Mitzenmacher 2000).
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from engine.config import RouterConfig
from engine.events import Arrive
from engine.units import ms_to_ns
from engine.values import Struct


def two_of(candidates: Sequence[int], draw: int) -> Sequence[int]:
    """Two of them, by lot; ``draw`` is uniform in [0, 2**62)."""
    count = len(candidates)
    if count <= 2:
        return candidates
    first, second = draw % count, draw // count % (count - 1)
    return candidates[first], candidates[second + (second >= first)]


class RouterStats(Struct):
    """By replica: predicted work ahead in prompt tokens, submissions since the start, of their prompt tokens guessed
    to be cached."""

    ahead_tokens: tuple[int, ...]
    sent: tuple[int, ...]
    affine_tokens: tuple[int, ...]


@dataclass(slots=True)
class _Lane:
    """One replica."""

    ahead_tokens: int = 0  # own submissions: uncached prompt until the first token, and weighed answer until the end
    said_tokens: int = 0  # its own word on all gateways' prompts
    sent: int = 0
    affine_tokens: int = 0
    blocks: OrderedDict[bytes, None] = field(default_factory=OrderedDict)  # guessed; least recently sent first
    cached: set[bytes] = field(default_factory=set)  # told by events
    coming: dict[bytes, int] = field(default_factory=dict)  # by how many open submissions without a token yet
    silent_ns: int | None = None  # since it was sent something, without a sign of progress; None = there was one


@dataclass(slots=True)
class _Load:
    replica: int
    prompt_tokens: int  # 0 once the first token is out
    answer_tokens: int
    coming: tuple[bytes, ...] = ()  # its prompt's blocks, with events and until the first token is out


class Router:
    """One gateway's picture of the work on its replicas."""

    def __init__(self, config: RouterConfig, replicas: int, block_tokens: int) -> None:
        self._config, self._block_tokens = config, block_tokens
        self._lanes = [_Lane() for _ in range(replicas)]
        self._loads: dict[int, _Load] = {}  # by sid
        self._stale_ns = ms_to_ns(config.stale_ms)
        self._events = config.kv_events and replicas > 1  # as ``config.replica_config`` has them sent

    def choose(self, now_ns: int, candidates: Sequence[int], ask: Arrive) -> int:
        """The replica of ``candidates`` (one at least) with the least to do before this request is through."""
        lanes = self._lanes
        if any(self._is_stale(now_ns, lanes[r]) for r in candidates):
            candidates = two_of(candidates, ask.draw)
        least = min(self._ahead(lanes[r]) for r in candidates)
        balanced = [r for r in candidates if self._ahead(lanes[r]) <= least + self._config.imbalance_tokens]
        # at a tie, whoever has had fewest: calm traffic is spread too
        return min(balanced, key=lambda r: (self._ahead(lanes[r]) + self._to_compute(lanes[r], ask), lanes[r].sent, r))

    def _is_stale(self, now_ns: int, lane: _Lane) -> bool:
        return 0 < self._stale_ns < now_ns - (now_ns if lane.silent_ns is None else lane.silent_ns)

    def sent(self, now_ns: int, sid: int, replica: int, ask: Arrive) -> None:
        """Submitted just now."""
        lane = self._lanes[replica]
        lane.silent_ns = now_ns if lane.silent_ns is None else lane.silent_ns
        load = _Load(replica, self._to_compute(lane, ask), self._config.answer_weight * ask.max_tokens)
        self._loads[sid] = load
        lane.sent += 1
        lane.affine_tokens += ask.prompt_tokens - load.prompt_tokens
        lane.ahead_tokens += load.prompt_tokens + load.answer_tokens
        if self._events:
            load.coming = ask.blocks
            for block in ask.blocks:
                lane.coming[block] = lane.coming.get(block, 0) + 1
            return
        for block in reversed(ask.blocks):  # a chain is forgotten from its end
            lane.blocks[block] = None
            lane.blocks.move_to_end(block)
        while len(lane.blocks) > self._config.remembered_blocks:
            lane.blocks.popitem(last=False)

    def started(self, sid: int) -> None:
        """Its prompt is computed."""
        if load := self._loads.get(sid):
            self._lanes[load.replica].silent_ns = None
            self._lanes[load.replica].ahead_tokens -= load.prompt_tokens
            load.prompt_tokens = 0
            self._arrived(load)

    def ended(self, sid: int) -> None:
        """It is through, or given up."""
        if load := self._loads.pop(sid, None):
            self._lanes[load.replica].silent_ns = None
            self._lanes[load.replica].ahead_tokens -= load.prompt_tokens + load.answer_tokens
            self._arrived(load)

    def hear(self, replica: int, queued_tokens: int) -> None:
        """A replica's own word on what it has queued, whoever sent it."""
        lane = self._lanes[replica]
        if queued_tokens < lane.said_tokens:
            lane.silent_ns = None
        lane.said_tokens = queued_tokens

    def hear_kv(self, replica: int, stored: Iterable[bytes], removed: Iterable[bytes]) -> None:
        """A replica's own word on what became findable in its prefix cache, and what no longer is."""
        cached = self._lanes[replica].cached
        cached.difference_update(removed)
        cached.update(stored)

    def lose(self, replica: int) -> None:
        """Its queue and its prefix cache are gone; its submissions end one by one."""
        self._lanes[replica].said_tokens, self._lanes[replica].silent_ns = 0, None
        self._lanes[replica].blocks.clear()
        self._lanes[replica].cached.clear()

    def stats(self) -> RouterStats:
        """A snapshot."""
        return RouterStats(
            ahead_tokens=tuple(self._ahead(lane) for lane in self._lanes),
            sent=tuple(lane.sent for lane in self._lanes),
            affine_tokens=tuple(lane.affine_tokens for lane in self._lanes),
        )

    def check(self) -> None:
        """Invariants."""
        for replica, lane in enumerate(self._lanes):
            mine = [load for load in self._loads.values() if load.replica == replica]
            ahead = sum(load.prompt_tokens + load.answer_tokens for load in mine)
            assert lane.ahead_tokens == ahead, "work: the running sum is the sum of what is open"
            assert lane.coming == Counter(block for load in mine for block in load.coming), "coming: until it is there"
            assert len(lane.blocks) <= self._config.remembered_blocks, "memory: bounded"

    def _arrived(self, load: _Load) -> None:
        """Its prompt is computed, and its events were heard, or it never will be."""
        coming = self._lanes[load.replica].coming
        for block in load.coming:
            if coming[block] == 1:
                del coming[block]
            else:
                coming[block] -= 1
        load.coming = ()

    @staticmethod
    def _ahead(lane: _Lane) -> int:
        return max(lane.ahead_tokens, lane.said_tokens)

    def to_compute(self, replica: int, ask: Arrive) -> int:
        """Prompt tokens that a replica would compute for it, going by what is known of its cache."""
        return self._to_compute(self._lanes[replica], ask)

    def _to_compute(self, lane: _Lane, ask: Arrive) -> int:
        """Prompt tokens not remembered to be there. The last token is always computed."""
        if not self._config.affinity:
            return ask.prompt_tokens
        known = 0
        for block in ask.blocks:
            if not (block in lane.cached or block in lane.coming or block in lane.blocks):
                break
            known += self._block_tokens
        return max(ask.prompt_tokens - known, 1)

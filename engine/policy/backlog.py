"""Prompt tokens that a replica has still to compute, by priority: what lies ahead of a newcomer's first token.

Of a running sequence that is exact: chunks that were computed and prefix hits are gone from it. Of one that waits it is
an estimate, made when it came: what the cache holds then is free, and so is what another one that came before it is to
write, or a stampede for one new prefix would count it once for each. Work follows what changed, never what runs.
"""

from __future__ import annotations

from collections.abc import Iterable

from engine.events import PRIORITY
from engine.policy.prefix import BlockPool
from engine.policy.sequence import Sequence


class Backlog:
    """Owned by a Replica, which shows it every sequence that came, ran, was put back or has ended."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self.tokens = [0] * len(PRIORITY)  # by the priority that was asked for
        self._left: dict[int, int] = {}  # by sid, of those with something to compute
        self._waits: set[int] = set()  # of these, estimated
        self._to_write: dict[bytes, int] = {}  # digest -> how many of these have it in their prompt

    def look(self, seqs: Iterable[Sequence]) -> None:
        """These may have changed; one that has not costs nothing but the look."""
        for seq in seqs:
            sid = seq.ask.sid
            if seq.state == "waiting":
                if sid not in self._waits:  # new, or put back
                    self._forget(seq)
                    self._waits.add(sid)
                    self._enter(seq, self._uncached(seq))
            else:
                left = seq.queued if seq.state == "prefill" else 0
                if left != self._left.get(sid, 0) or sid in self._waits:
                    self._forget(seq)
                    if left:
                        self._enter(seq, left)

    def _uncached(self, seq: Sequence) -> int:
        size, found = self._pool.block_tokens, 0
        if self._pool.enabled:
            for digest in seq.ask.blocks[: (seq.known - 1) // size]:
                if not (digest in self._to_write or self._pool.holds(digest)):
                    break
                found += size
        return seq.known - found

    def _enter(self, seq: Sequence, tokens: int) -> None:
        self._left[seq.ask.sid] = tokens
        self.tokens[seq.ask.priority] += tokens
        for digest in seq.ask.blocks:
            self._to_write[digest] = self._to_write.get(digest, 0) + 1

    def _forget(self, seq: Sequence) -> None:
        self._waits.discard(seq.ask.sid)
        tokens = self._left.pop(seq.ask.sid, None)
        if tokens is None:
            return
        self.tokens[seq.ask.priority] -= tokens
        for digest in seq.ask.blocks:
            if self._to_write[digest] == 1:
                del self._to_write[digest]
            else:
                self._to_write[digest] -= 1

    def check(self, sequences: dict[int, Sequence]) -> None:
        """Invariants, against all sequences that have not ended."""
        sums = [0] * len(PRIORITY)
        written: dict[bytes, int] = {}
        for sid, tokens in self._left.items():
            seq = sequences[sid]
            sums[seq.ask.priority] += tokens
            assert (sid in self._waits) == (seq.state == "waiting"), "backlog: who waits is estimated, and nobody else"
            assert 0 < tokens <= seq.queued, "backlog: never more than there is to compute"
            assert tokens == seq.queued or seq.state == "waiting", "backlog: exact for those that run"
            for digest in seq.ask.blocks:
                written[digest] = written.get(digest, 0) + 1
        assert self.tokens == sums, "backlog: the running sums are the sums"
        assert self._to_write == written, "backlog: to write, by those that have not"
        missing = [s for s in sequences.values() if s.ask.sid not in self._left and s.state != "decode" and s.queued]
        assert not missing, "backlog: all that have something to compute"

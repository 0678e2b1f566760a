"""A random shop before one replica: who asks, who gives up, which step raises. Seeded; on a counting clock.

One operation is one draw: a submission (some critical, pinned, in a hurry, several at once), an abort, or a turn of the
worker's loop, in which all that waits in the mailbox is told and a step runs, or raises. What is demanded is what is
promised to the outside: one end for each submission, right tokens, nothing lost.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

from engine.config import ReplicaConfig
from engine.events import Abort, Ended, FirstToken, RunStep, Submit
from engine.model.blockhash import Hasher
from engine.model.loader import LoadedModel
from engine.model.stepping import SamplingParams
from engine.model.wire import Output, ToReplica, Work
from engine.model.worker import ReplicaDriver
from tests.model.undisturbed import LONGEST, Known
from tests.model.watched import Asked, CheckedReplica, WatchedRunner, watched

NEVER_NS = 1 << 62
TENANTS = ("shop", "bank", "press")
CROWD = 26  # so many at once; more are not let in


@dataclass
class Request:
    """What was asked, what has come, and what must have come in the end."""

    submit: Submit
    want: list[int]
    reason: str
    bad: bool = False  # no step survives it, or it gives no numbers
    aborted: bool = False
    got: list[int] = field(default_factory=list)
    firsts: int = 0


class World:
    """``bad_tokens``: what a ``bad_share`` of the prompts is poisoned with; the first makes the model raise.

    ``order``: the numbers of the pool's blocks, in the order in which they are to be given out first.
    """

    def __init__(
        self, model: LoadedModel, known: list[Known], config: ReplicaConfig, seed: int, bad_tokens: tuple[int, ...],
        bad_share: float = 0.02, order: list[int] | None = None,
    ) -> None:
        self.r = random.Random(seed)
        self.known, self.ends = known, model.eos_ids
        self.bad_tokens, self.bad_share = bad_tokens, bad_share
        self.hasher = Hasher(b"k" * 16, config.prefix.block_tokens)
        self.runner = WatchedRunner(model, config.prefix.blocks, self.hasher, bad_tokens[0])
        self.replica = CheckedReplica(config)
        self.pool = self.replica.batcher.pool
        if order is not None:
            self.pool.take((), self.pool.total)
            self.pool.release(order)
        self.books = self.replica.books = self.runner.books
        self.books.sweep(self.replica)
        self.driver = ReplicaDriver(self.replica, self.runner)
        self.mailbox: list[ToReplica] = []
        self.live: dict[int, Request] = {}
        self.now_ns, self.next_sid = 1, 0
        self.seen: Counter[str] = self.books.seen
        self.tables: list[tuple[int, ...]] = []  # as the runner was told
        self.told: list[object] = []  # all that is said, without a block's number

    def run(self, operations: int) -> None:
        """So many draws, then the rest of what is in flight."""
        with watched(self.runner):
            for _ in range(operations):
                self.seen["operations"] += 1
                self.draw()
            turns = 0
            while self.live or self.mailbox:
                self.turn()
                turns += 1
                assert turns < 3000, "liveness: what was accepted ends"

    # ------------------------------------------------------------ operations

    def draw(self) -> None:
        lull = self.seen["operations"] // 150 % 4 == 3
        roll = self.r.random() * (5.0 if lull else 1.0)
        if roll < 0.36 and len(self.live) < CROWD:
            self.submit(self.r.choice(self.known), tenant=self.r.choice(TENANTS))
        elif roll < 0.38 and len(self.live) < CROWD - 6:
            tenant, one = self.r.choice(TENANTS), self.r.choice(self.known)
            for _ in range(self.r.randint(2, 6)):
                self.submit(one, tenant)
            self.seen["stampedes"] += 1
        elif roll < 0.43 and self.next_sid:
            self.abort()
        elif roll < 0.46:
            self.turn(stumble=True)
        else:
            self.turn()

    def submit(self, one: Known, tenant: str) -> None:
        r, sid = self.r, self.next_sid
        self.next_sid += 1
        prompt, max_tokens, endless = list(one.prompt), r.randint(1, LONGEST), r.random() < 0.3
        bad = r.random() < self.bad_share
        want, reason = one.cut(max_tokens, () if endless else self.ends)
        if bad:
            prompt[r.randrange(len(prompt))] = r.choice(self.bad_tokens)
        blocks = self.hasher.chain(self.hasher.root(tenant, "model"), prompt)
        priority = r.choice((0, 1, 1, 1, 2, 2))
        submit = Submit(
            sid=sid, rid=sid, tenant=tenant, traffic_class=("fraud", "chat", "mail")[priority], priority=priority,
            sent_ns=self.now_ns, start_by_ns=self.now_ns + r.randint(5, 40) if r.random() < 0.08 else NEVER_NS,
            prompt_tokens=len(prompt), max_tokens=max_tokens, blocks=blocks,
            pinned_blocks=min(2, len(blocks)) if priority == 0 and r.random() < 0.5 else 0,
        )  # fmt: skip
        self.seen["submits"] += 1
        self.seen["with pins"] += submit.pinned_blocks > 0
        self.live[sid] = Request(submit, want, reason, bad)
        self.books.asked[sid] = Asked(submit, list(prompt), list(blocks))
        self.mailbox.append(Work(submit, prompt, SamplingParams(ignore_eos=endless)))

    def abort(self) -> None:
        """Of one that waits, runs, has just been sent, or has ended."""
        sid = self.r.choice(list(self.live)) if self.live and self.r.random() < 0.8 else self.r.randrange(self.next_sid)
        if request := self.live.get(sid):
            request.aborted = True
        self.seen["aborts of the living" if request else "aborts of the dead"] += 1
        self.mailbox.append(Abort(sid))

    def turn(self, stumble: bool = False) -> None:
        """As the worker's loop does it. ``stumble``: one of its forwards raises, before or after it has written."""
        self.now_ns += self.r.randint(1, 3)
        messages, self.mailbox = self.mailbox, []
        step, output = self.driver.begin(self.now_ns, messages)
        self.hear(output)
        if step is None:
            return
        self.say(step)
        self.seen["steps"] += 1
        several = step.at_most > 1
        stumble |= several and self.r.random() < 0.1
        spoken = self.r.random() < 0.3  # somebody speaks after the first of several
        self.runner.saboteur.arm(self.r.randint(1, step.at_most) if stumble else 0, late=self.r.random() < 0.5)
        result = self.runner.run(step, lambda: spoken, self.tell)
        self.now_ns += 1
        self.hear(self.driver.finish(self.now_ns, result))

    # ------------------------------------------------------------ what comes back

    def say(self, step: RunStep) -> None:
        self.tables += [start.blocks for start in step.start]
        starts = tuple((start.sid, start.computed, len(start.blocks)) for start in step.start)
        grows = tuple((grow.sid, len(grow.blocks)) for grow in step.grow)
        self.told.append((step.step, step.shape, step.chunks, step.stop, step.at_most, starts, grows))

    def hear(self, output: Output | None) -> None:
        if output is None:
            return
        self.told.append((output.events, output.tokens))
        self.tell(output.tokens)
        for event in output.events:
            if isinstance(event, FirstToken):
                self.live[event.sid].firsts += 1
            elif isinstance(event, Ended):
                self.end(event)

    def tell(self, tokens: list[tuple[int, list[int]]]) -> None:
        for sid, new in tokens:
            request = self.live[sid]
            request.got += new
            self.books.asked[sid].tokens += new
            assert request.got == request.want[: len(request.got)], f"request {sid}: its own tokens, whatever happened"

    def end(self, ended: Ended) -> None:
        assert ended.sid in self.live, f"request {ended.sid}: one end, no more"
        request = self.live.pop(ended.sid)
        del self.books.asked[ended.sid]
        what = ended.reason
        if what in ("stop", "length"):
            assert not request.bad, "a poison request has no answer"
            assert (request.got, what) == (request.want, request.reason), f"request {ended.sid}: the whole answer"
            assert request.firsts == bool(request.got)
            assert ended.output_tokens == len(request.got), "machine and runner count alike"
            self.seen["whole answers"] += 1
            self.seen["whole answers after a preemption"] += ended.preemptions > 0
        elif what == "failed":
            self.seen["failed though innocent" if not request.bad else "poison requests failed"] += 1
        elif what == "aborted":
            assert request.aborted
        else:
            assert what == "deadline" and request.submit.start_by_ns != NEVER_NS and not request.got, ended
        self.seen[f"ended: {what}"] += 1
        self.seen["preemptions"] += ended.preemptions

    # ------------------------------------------------------------ the end

    def check_whole(self) -> None:
        """Nobody runs: no table, no token, no reference but pins'; and these go when their time has come."""
        for _ in range(2):
            stats = self.pool.stats()
            assert stats.free + stats.evictable == stats.total - stats.pinned
            assert all(self.pool.references(b) == self.pool.is_pinned(b) for b in range(stats.total))
            assert not self.runner.runner._known and not self.runner.runner._running, "the runner has forgotten all"
            now = self.replica.stats()
            assert now.running == now.waiting == now.queued_tokens == 0
            self.now_ns += self.replica.config.pin_ttl_ns + 1
            self.hear(self.driver.begin(self.now_ns, [])[1])
        assert self.pool.stats().pinned == 0 and self.pool.available == self.pool.total
        self.seen["evictions"] = self.pool.stats().evictions
        self.seen |= self.runner.saboteur.raised
        innocent = self.seen["failed though innocent"]
        assert innocent <= self.seen["failed steps of one row"], "innocents fail only where they were alone"

"""One replica, two whole gateways, in virtual time: each hears of its own work and of the queue as it is.

The replica's driver, its machine and what splits its words are the real ones; only sockets are left out. The second
gateway comes when the replica has long been at work, and the first dies in the middle of its own.

Run: python -m pytest tests/equivalence/test_two_gateways.py -q
Mutations it caught: the highest submission of all told to each gateway.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import pytest

from engine.config import gateway_config, replica_config
from engine.events import SID_BITS, Abort, Ended, FirstToken, KvEvents, Pressure, Record, Submit
from engine.ledger.journal import JournalWriter, open_journal
from engine.model.blockhash import Hasher
from engine.model.fake import FakeRunner
from engine.model.sharing import Board, part_of
from engine.model.smalllm import small_tokenizer
from engine.model.stepping import SamplingParams
from engine.model.tokenizer import Detokenizer
from engine.model.wire import Output, ToReplica, Work
from engine.model.worker import ReplicaDriver
from engine.policy.gateway import Gateway
from engine.policy.replica import Replica
from engine.service.driver import GatewayDriver
from engine.units import S_NS
from sim.twin.replay import replay
from tests.equivalence.test_virtual_time import COST, TENANTS, scenario, workload
from tests.equivalence.virtual import InProcessReplica, VirtualLoop

COMES_S, DIES_S, END_S = 4.0, 12.0, 120.0


class Line:
    """A gateway's link: as a socket would be, with what is to be heard of a death."""

    def __init__(self) -> None:
        self.replica: InProcessReplica | None = None
        self.open: dict[int, None] = {}
        self.dead = False

    def send(self, replica: int, message: ToReplica) -> None:
        assert self.replica is not None and not self.dead
        if isinstance(message, Work):
            self.open[message.submit.sid] = None
        self.replica.put(message)


def run(folder: Path, seed: int) -> list[GatewayDriver]:
    hasher = Hasher(b"key", 16)
    loop = VirtualLoop()
    asyncio.set_event_loop(loop)
    requests = workload(hasher, seed)
    answers = {tuple(prompt): answer for _, prompt, answer, _ in requests}
    config = msgspec.structs.replace(replica_config(scenario(), TENANTS, 0, COST), kv_events=True)
    runner = FakeRunner(lambda prompt: answers[tuple(prompt)], hasher, None)
    journal = JournalWriter(folder / "journal/replica-0.ndjson", "replica", config, hasher.key)
    driver = ReplicaDriver(Replica(config), runner, journal)
    gateways: list[GatewayDriver] = []
    lines = [Line(), Line()]
    board = Board()

    def hear(output: Output) -> None:
        board.post(output)
        for n, gateway in enumerate(gateways):
            if not lines[n].dead:
                gateway.hear(part_of(output, n))
            for event in output.events:
                if isinstance(event, Ended):
                    lines[n].open.pop(event.sid, None)

    replica = InProcessReplica(loop, driver, runner, COST, hear)
    for line in lines:
        line.replica = replica

    def come(n: int) -> None:
        own = gateway_config(scenario(), TENANTS, n)
        gateway = GatewayDriver(
            Gateway(own), loop.now_ns, lines[n], hasher, lambda: Detokenizer(small_tokenizer()),
            {"fallback:tips": "these five"},
            JournalWriter(folder / f"journal/gateway-{n}.ndjson", "gateway", own, hasher.key), dims=8,
        )
        gateways.append(gateway)
        gateway.hear(board.read(n))

    def die(n: int) -> None:
        lines[n].dead = True
        gateways[n].close()
        assert lines[n].open, "it dies in the middle of work"
        for sid in lines[n].open:
            replica.put(Abort(sid))

    async def sale() -> None:
        task = asyncio.create_task(replica.run())
        come(0)
        loop.call_at(COMES_S, come, 1)
        loop.call_at(DIES_S, die, 0)
        for ask, prompt, _, _ in requests:
            n = ask.rid % 2 if COMES_S < ask.arrived_ns / S_NS < DIES_S else int(ask.arrived_ns / S_NS > DIES_S)
            loop.call_at(ask.arrived_ns / S_NS, arrive, n, ask, prompt)
        done = loop.create_future()
        loop.call_at(END_S, done.set_result, None)
        await done
        task.cancel()

    def arrive(n: int, *ask: object) -> None:
        gateways[n].arrive(*ask, SamplingParams())  # type: ignore[arg-type]

    loop.run_until_complete(sale())
    gateways[1].close()
    journal.close()
    loop.close()
    driver.machine.check()
    stats = driver.machine.stats()
    assert (stats.running, stats.waiting) == (0, 0), "the dead one's slots are free"
    assert stats.prefix.free + stats.prefix.evictable == stats.prefix.total - stats.prefix.pinned, "and its blocks"
    return gateways


@pytest.mark.parametrize("seed", [1, 2])
def test_each_hears_of_its_own_and_of_the_queue_as_it_is(tmp_path: Path, seed: int) -> None:
    first, second = run(tmp_path, seed)
    assert first.in_flight > 0
    assert second.in_flight == 0
    entries = {name: list(open_journal(tmp_path / "journal" / f"{name}.ndjson").entries())
               for name in ("gateway-0", "gateway-1", "replica-0")}
    for name in entries:
        assert replay(tmp_path / "journal" / f"{name}.ndjson").identical
    said: list[tuple[Pressure, dict[int, int]]] = []  # with each gateway's highest submission so far
    seen = {0: -1, 1: -1}
    blocks: list[KvEvents] = []
    for entry in entries["replica-0"]:
        if isinstance(entry.event, Submit):
            seen[entry.event.sid >> SID_BITS] = entry.event.sid
        said += [(action, dict(seen)) for action in entry.actions if isinstance(action, Pressure)]
        blocks += [action for action in entry.actions if isinstance(action, KvEvents)]
    for n in range(2):
        events = [entry.event for entry in entries[f"gateway-{n}"]]
        own = {e.sid for e in events if isinstance(e, Ended | FirstToken)}
        assert own and {sid >> SID_BITS for sid in own} == {n}
        heard = [e for e in events if isinstance(e, Pressure)]
        at = len(said) - len(heard) if n else 0  # the second comes late, and is told the last that was said
        assert len(heard) > 100
        for pressure, (whole, acked) in zip(heard, said[at:], strict=False):
            want = msgspec.structs.replace(whole, acked_sid=acked[n], acked_sids=())
            assert pressure == want
    ends = [a for entry in entries["gateway-1"] for a in entry.actions if isinstance(a, Record)]
    assert {record.record.outcome for record in ends if hasattr(record.record, "outcome")} >= {"served"}
    assert {len(whole.acked_sids) for whole, _ in said} == {0, 2}, "one gateway's journal is as it always was"


def test_what_comes_late_knows_the_cache_as_it_is(tmp_path: Path) -> None:
    run(tmp_path, 3)
    replica = open_journal(tmp_path / "journal" / "replica-0.ndjson").entries()
    held: set[bytes] = set()
    [late] = [e for e in open_journal(tmp_path / "journal" / "gateway-1.ndjson").entries()
              if isinstance(e.event, KvEvents)][:1]
    for entry in replica:
        if entry.at_ns >= late.at_ns:
            break
        for action in entry.actions:
            if isinstance(action, KvEvents):
                held = held - set(action.removed) | set(action.stored)
    assert held and set(late.event.stored) == held

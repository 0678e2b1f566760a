"""A whole doorbuster on the simulated clock: one gateway, its replicas, a list of arrivals in, records out.

The twin is told the scenario, the costs, the arrivals and how long each answer is. It is not told anything else of a
live run. ``SimPy`` users can hand in their own environment and put a doorbuster into their own model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import simpy

from engine.config import Scenario, TenantConfig, gateway_config, replica_config
from engine.events import Answer, Arrive, BreakerRecord, Charge, LevelRecord, Reject, RequestRecord
from engine.ledger.journal import JournalWriter
from engine.model.blockhash import Hasher
from engine.model.counting import CountingRunner
from engine.policy.gateway import Gateway
from engine.policy.replica import Replica
from engine.stepcost import StepCost
from sim.twin.driver import Fails, GatewaySim, Lags, Rank, ReplicaSim, at, never, now_ns
from sim.twin.encoder import EncoderCost, EncoderServer


class TwinArrival(msgspec.Struct, frozen=True, gc=False):
    """One request of the workload, as the gateway will learn of it; ``ask.arrived_ns`` is the scheduled instant.

    The answer's id says which other requests would get the same text (greedy decoding: those that ask the same).
    """

    ask: Arrive
    output_tokens: int
    answer_id: str
    answer_bytes: int
    gives_up_ns: int | None = None  # instant at which a client without an answer goes away
    short: tuple[str, int] | None = None  # id and bytes of its answer as its class's brown-out cap leaves it, if known


class TwinRun(msgspec.Struct, frozen=True):
    """What came of it; ``requests`` hold latencies as clients see them."""

    requests: list[RequestRecord]
    levels: list[LevelRecord]
    breakers: list[BreakerRecord]
    answers: list[Answer | Reject]
    end_ns: int
    busy_ns: int  # of the replicas, on average


class TwinSystem:
    """One gateway and the scenario's replicas in ``env``."""

    def __init__(
        self,
        scenario: Scenario,
        tenants: dict[str, TenantConfig],
        cost: StepCost,
        lags: Lags,
        arrivals: list[TwinArrival],
        hasher: Hasher,
        folder: Path | None = None,
        env: simpy.Environment | None = None,
        check: bool = False,
        encoder: EncoderCost | None = None,
        vectors: dict[bytes, np.ndarray] | None = None,
        fails: Fails = never,
        charges: Sequence[tuple[int, Charge]] = (),
    ) -> None:
        """``folder``: journals are written to its ``journal/``. ``check``: invariants after every event (slow).

        ``vectors``: of the questions, by text key; with ``encoder`` they make the semantic tier. ``fails``: steps that
        raise, for drills. ``charges``: what is asked for beside the machines, and when.
        """
        self.env = env if env is not None else simpy.Environment(0)
        self._emit_ns = lags.emit_ns
        self._by_rid = {arrival.ask.rid: arrival for arrival in arrivals}
        gateway = gateway_config(scenario, tenants)
        replicas = [replica_config(scenario, tenants, n, cost) for n in range(scenario.replicas)]
        self._journals = [] if folder is None else [
            JournalWriter(folder / "journal" / "gateway-0.ndjson", "gateway", gateway, hasher.key),
            *(
                JournalWriter(folder / "journal" / f"replica-{n}.ndjson", "replica", replica, hasher.key)
                for n, replica in enumerate(replicas)
            ),
        ]
        journals: list[JournalWriter | None] = [*self._journals] or [None] * (1 + len(replicas))
        server, dims = None, 384
        if encoder is not None and vectors:
            dims = len(next(iter(vectors.values())))
            server = EncoderServer(
                lambda: now_ns(self.env), lambda wait_ns, call: at(self.env, Rank.ENCODER, wait_ns, call), encoder,
                vectors,
            )
        self.gateway = GatewaySim(
            self.env, Gateway(gateway), lags, self._answer_of, journals[0], check, server, dims
        )
        self.gateway.replicas = [
            ReplicaSim(
                self.env, Replica(replica), CountingRunner(hasher), cost, lags,
                lambda rid: self._by_rid[rid].output_tokens, self.gateway.tell, journal, check, fails,
            )
            for replica, journal in zip(replicas, journals[1:], strict=True)
        ]
        for arrival in arrivals:
            self._schedule(arrival, lags.admit_ns)
        for charged_ns, asked in charges:
            self._charge(charged_ns + lags.admit_ns, asked)

    def _charge(self, charged_ns: int, asked: Charge) -> None:
        at(self.env, Rank.ARRIVE, charged_ns - now_ns(self.env), lambda: self.gateway.charge(asked))

    def _schedule(self, arrival: TwinArrival, admit_ns: int) -> None:
        ask, start_ns = arrival.ask, now_ns(self.env)
        at(self.env, Rank.ARRIVE, ask.arrived_ns + admit_ns - start_ns, lambda: self.gateway.arrive(ask))
        if arrival.gives_up_ns is not None:
            at(self.env, Rank.ARRIVE, arrival.gives_up_ns - start_ns, lambda: self.gateway.give_up(ask.rid))

    def _answer_of(self, rid: int, output_tokens: int) -> tuple[str, int]:
        arrival = self._by_rid[rid]
        if arrival.short is not None and output_tokens < arrival.output_tokens:
            return arrival.short
        return arrival.answer_id, arrival.answer_bytes

    def _at_the_client(self, record: RequestRecord) -> RequestRecord:
        """Latencies as the client sees them: the gateway's, and the way back."""
        emit_ns = self._emit_ns
        ttft_ns = None if record.ttft_ns is None else record.ttft_ns + emit_ns
        return msgspec.structs.replace(record, ttft_ns=ttft_ns, e2e_ns=record.e2e_ns + emit_ns)

    def run(self) -> TwinRun:
        """Until nothing is left to do."""
        self.env.run()
        for journal in self._journals:
            journal.close()
        records = self.gateway.records
        requests = [self._at_the_client(r) for r in records if isinstance(r, RequestRecord)]
        return TwinRun(
            requests=requests,
            levels=[r for r in records if isinstance(r, LevelRecord)],
            breakers=[r for r in records if isinstance(r, BreakerRecord)],
            answers=self.gateway.answers,
            busy_ns=sum(replica.busy_ns for replica in self.gateway.replicas) // len(self.gateway.replicas),
            end_ns=max((r.arrived_ns + r.e2e_ns for r in requests), default=0),  # not the last idle timer
        )

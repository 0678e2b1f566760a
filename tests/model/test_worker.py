"""The replica driver's mailbox: what came in during a step, in the order in which it must be told.

Run: python -m pytest tests/model/test_worker.py -q
"""

from __future__ import annotations

import simpy

from engine.config import ReplicaConfig
from engine.events import Abort, Ended, GatewayEvent, Submit
from engine.model.blockhash import Hasher
from engine.model.counting import CountingRunner
from engine.model.fake import FakeRunner
from engine.model.stepping import SamplingParams
from engine.model.wire import Work
from engine.model.worker import ReplicaDriver
from engine.policy.replica import Replica
from engine.stepcost import StepCost
from sim.twin.driver import Lags, ReplicaSim

ASK = Submit(7, 7, "t", "c", 1, 0, 10**9, 20, 4)


def test_a_submission_given_up_in_the_same_mailbox_is_never_computed() -> None:
    runner = FakeRunner(lambda prompt: prompt[:4], Hasher(b"k", 16), None)
    driver = ReplicaDriver(Replica(ReplicaConfig()), runner)
    step, output = driver.begin(1, [Work(ASK, list(range(20)), SamplingParams()), Abort(7)])
    assert step is None
    assert output is not None
    assert [event for event in output.events if isinstance(event, Ended)] == [Ended(7, "aborted")]
    assert runner.counting.rows == {}, "the runner has forgotten it"


def test_the_twin_does_the_same() -> None:
    env, told = simpy.Environment(0), list[GatewayEvent]()
    cost = StepCost(fixed_ns=1e6, prefill_token_ns=0, prefill_row_ns=0, decode_row_ns=0, decode_kv_ns=0, area_ns=0)
    replica = ReplicaSim(
        env, Replica(ReplicaConfig()), CountingRunner(Hasher(b"k", 16)), cost, Lags(), lambda rid: 4, told.append
    )
    replica.receive(ASK)
    replica.receive(Abort(7))
    env.run()
    assert [event for event in told if isinstance(event, Ended)] == [Ended(7, "aborted")]
    assert replica.busy_ns == 0

"""The replica's end of its connections, over real sockets: what is whose, who hears what, and what a hang-up means.

Run: python -m pytest tests/model/test_endpoint.py -q
Mutations it caught: the highest submission of all told to each; each one's own never told; no aborts at a hang-up; the
ended aborted; no sign of life; a deaf one kept; a board that never forgets, or has no pressure.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.config import ReplicaConfig
from engine.events import SID_BITS, Abort, Ended, FirstToken, KvEvents, Plan, Pressure, ReplicaWord, Submit
from engine.model import endpoint as module
from engine.model.endpoint import Endpoint
from engine.model.sharing import Board, part_of
from engine.model.stepping import SamplingParams
from engine.model.wire import Hello, Output, ToReplica, Unframer, Work, decode_from_replica, frame
from engine.policy.replica import Replica

SECOND = 1 << SID_BITS  # the first submission of gateway 1


def submit(sid: int, prompt_tokens: int = 20) -> Submit:
    return Submit(sid, sid, "shop", "chat", 1, 0, 10**12, prompt_tokens, 4)


class Client:
    """A gateway's end."""

    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(str(path))
        self._unframer = Unframer()

    def say(self, message: ToReplica | Hello) -> None:
        self.sock.sendall(frame(message))

    def work(self, sid: int) -> None:
        self.say(Work(submit(sid), [1, 2], SamplingParams()))

    def heard(self) -> list[object]:
        """All frames that are here now."""
        self.sock.setblocking(False)
        out: list[object] = []
        try:
            while data := self.sock.recv(1 << 20):
                out += map(decode_from_replica, self._unframer.feed(data))
        except BlockingIOError:
            pass
        return out


@pytest.fixture
def dial(tmp_path: Path) -> Iterator[tuple[Endpoint, Callable[..., Client]]]:
    """An endpoint, and what connects to it: with a gateway's index it says Hello."""
    endpoint = Endpoint(str(tmp_path / "replica.sock"))
    clients: list[Client] = []

    def begin(gateway: int | None = None) -> Client:
        clients.append(Client(tmp_path / "replica.sock"))
        endpoint.waits()
        if gateway is not None:
            clients[-1].say(Hello(gateway))
            endpoint.waits()
        return clients[-1]

    yield endpoint, begin
    for client in clients:
        client.sock.close()
    while not endpoint.alone:
        endpoint.waits()
    endpoint._listener.close()
    endpoint._selector.close()


def test_who_owns_it_alone_hears_everything(dial: tuple[Endpoint, Callable[..., Client]]) -> None:
    endpoint, begin = dial
    owner = begin()
    said = Output([Pressure(0, SECOND, 1, acked_sids=(4, SECOND)), FirstToken(SECOND, 0, 0)], [(3, [1]), (SECOND, [2])])
    endpoint.send(said)
    assert owner.heard() == [said]


def test_each_gateway_hears_its_own_and_the_supervisor_nothing(dial: tuple[Endpoint, Callable[..., Client]]) -> None:
    endpoint, begin = dial
    supervisor, first, second = begin(), begin(0), begin(1)
    for client in (first, second):
        assert client.heard() == [Output([])], "nothing is on the board yet"
    first.work(3)
    second.work(SECOND)
    assert {m.submit.sid for m in endpoint.take(idle=True) + endpoint.take(idle=False)} == {3, SECOND}  # type: ignore[union-attr]
    pressure = Pressure(0, SECOND, 2, acked_sids=(3, SECOND))
    endpoint.send(Output([pressure, FirstToken(3, 0, 0)], [(SECOND, [7])]))
    assert first.heard() == [Output([Pressure(0, 3, 2), FirstToken(3, 0, 0)])]
    assert second.heard() == [Output([Pressure(0, SECOND, 2)], [(SECOND, [7])])]
    endpoint.send(Output([], [(3, [1])]))
    assert second.heard() == [Output([])], "who waits hears that work goes on"
    endpoint.send(Output([Ended(SECOND, "stop")]))
    endpoint.send(Output([], [(3, [1])]))
    assert second.heard() == [Output([Ended(SECOND, "stop")])], "who waits for nothing hears nothing of others"
    assert supervisor.heard() == []
    late = begin(2)
    assert late.heard() == [Output([Pressure(0, -1, 2)])], "the last word, with nothing acknowledged"


def test_who_hangs_up_has_its_work_aborted_and_no_other(dial: tuple[Endpoint, Callable[..., Client]]) -> None:
    endpoint, begin = dial
    begin()
    first, second = begin(0), begin(1)
    for sid in (0, 1, 2):
        first.work(sid)
    second.work(SECOND)
    while len(endpoint._pending) < 4:
        endpoint.waits()
    endpoint.take(idle=False)
    endpoint.send(Output([Ended(1, "stop")]))
    first.sock.close()
    assert endpoint.take(idle=True) == [Abort(0), Abort(2)]
    assert not endpoint.deserted
    second.heard()
    endpoint.send(Output([Ended(0, "aborted")], [(2, [5])]))
    assert second.heard() == [Output([])]


def test_one_that_reads_nothing_does_not_hold_up_the_others(
    dial: tuple[Endpoint, Callable[..., Client]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SEND_TIMEOUT_S", 0.05)
    endpoint, begin = dial
    begin()
    deaf, other = begin(0), begin(1)
    deaf.work(0)
    assert endpoint.take(idle=True)
    much = Output([Pressure(0, 0, 1)], [(0, list(range(60_000)))])
    for _ in range(1000):
        endpoint.send(much)
        other.heard()
        if 0 not in endpoint._gateways:
            break
    assert endpoint.take(idle=False) == [Abort(0)]
    other.heard()
    endpoint.send(much)
    assert other.heard() == [Output([Pressure(0, -1, 1)])]


def test_an_acknowledgement_alone_is_said_to_whom_it_concerns() -> None:
    machine = Replica(ReplicaConfig())
    heard: list[Pressure] = []
    for sid in (5, SECOND + 8, 6):  # they fit nowhere, so nothing moves but what was seen
        machine.handle(0, submit(sid, prompt_tokens=10**6))
        heard += [action for action in machine.handle(0, Plan()) if isinstance(action, Pressure)]
    assert [pressure.acked_sid for pressure in heard] == [5, SECOND + 8, SECOND + 8]
    own = [[part_of(Output([pressure]), gateway).events for pressure in heard] for gateway in range(2)]
    assert own[0] == [[msgspec.structs.replace(heard[0], acked_sid=sid, acked_sids=())] for sid in (5, 5, 6)]
    assert [event.acked_sid for [event] in own[1]] == [-1, SECOND + 8, SECOND + 8]  # type: ignore[union-attr]


words = st.lists(
    st.one_of(
        st.builds(FirstToken, st.integers(0, 3).map(lambda n: (n % 2 << SID_BITS) + n), st.just(0), st.just(0)),
        st.builds(
            KvEvents, st.just(0), st.lists(st.binary(max_size=1), max_size=3).map(tuple),
            st.lists(st.binary(max_size=1), max_size=3).map(tuple),
        ),
        st.builds(Pressure, st.just(0), st.just(-1), st.integers(0, 3)),
    ),
    max_size=8,
)


@given(turns=st.lists(words, max_size=6))
def test_who_comes_late_knows_what_the_others_were_told(turns: list[list[ReplicaWord]]) -> None:
    board, told = Board(), [Output([]), Output([])]
    for events in turns:
        board.post(Output(events))
        for gateway in range(2):
            told[gateway].events.extend(part_of(Output(events), gateway).events)
    for gateway, heard in enumerate(told):
        blocks: set[bytes] = set()
        for event in heard.events:
            if isinstance(event, KvEvents):
                blocks = blocks - set(event.removed) | set(event.stored)
        pressures = [event for event in heard.events if isinstance(event, Pressure)]
        late = board.read(gateway).events
        assert [e for e in late if isinstance(e, Pressure)] == pressures[-1:]
        assert {d for e in late if isinstance(e, KvEvents) for d in e.stored} == blocks

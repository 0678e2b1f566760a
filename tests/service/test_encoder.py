"""The encoder client with the real process and the real model; its failures are made by signals and drills.

    pytest tests/service/test_encoder.py

The process' own rules (who is skipped, in what order, when it ends) are shown on its loop with a model that waits.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from engine.errors import UserError
from engine.model.encoder_process import (
    MAX_CHARS,
    Cancel,
    Drill,
    Encode,
    EncoderSpec,
    Failed,
    Loop,
    Ready,
    Skipped,
    Vector,
    decode_from_encoder,
    frame,
)
from engine.model.wire import Unframer
from engine.service import encoder as module
from engine.service.encoder import EncoderClient

DEADLINE_S = 30.0
Run = Callable[[Awaitable[Any]], Any]


class Told:
    """A caller that keeps all it is told."""

    def __init__(self) -> None:
        self.all: list[tuple[np.ndarray | None, str]] = []

    def __call__(self, vector: np.ndarray | None, word: str) -> None:
        assert (vector is not None) == (word == "ok")
        self.all.append((vector, word))

    @property
    def words(self) -> list[str]:
        return [word for _, word in self.all]

    @property
    def vector(self) -> np.ndarray:
        [(vector, _)] = self.all
        assert vector is not None
        return vector


async def make(**options: Any) -> EncoderClient:
    return EncoderClient(**options)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():
            await asyncio.sleep(0.005)


def ask(client: EncoderClient, text: str, deadline_s: float = DEADLINE_S) -> Told:
    told = Told()
    client.encode(text.encode(errors="replace"), text, deadline_s, told)
    return told


async def answered(*all_told: Told) -> None:
    await until(lambda: all(told.all for told in all_told))


def remembered(client: EncoderClient, text: str) -> bool:
    return text.encode() in client._memo


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    with asyncio.Runner() as runner:
        yield runner.run  # type: ignore[misc]


@pytest.fixture(scope="module")
def shared(run: Run) -> Iterator[EncoderClient]:
    client = run(make())
    ready = run(client.start(EncoderSpec()))
    assert ready.dims == 384 and ready.digest
    yield client
    run(client.stop())


@pytest.fixture
def client(run: Run, shared: EncoderClient) -> Iterator[EncoderClient]:
    """The shared one, at its normal speed and with nothing open."""
    yield shared
    shared.drill(Drill())
    run(until(lambda: not shared._jobs))


# ---------------------------------------------------------------- answers, memo, one text once


def test_vectors_come_through_whole(client: EncoderClient, run: Run) -> None:
    texts = ["Can I return it?", "May I send it back?", "Which cards do you take?"]
    told = [ask(client, text) for text in texts]
    run(answered(*told))
    a, b, c = (t.vector for t in told)
    assert a.shape == (384,) and a.dtype == np.float32 and abs(np.linalg.norm(a) - 1) < 1e-6
    assert a @ b > 0.6 > a @ c
    with pytest.raises(ValueError, match="read-only"):
        a[0] = 0  # all who ask share it


def test_a_text_is_remembered(client: EncoderClient, run: Run) -> None:
    first = ask(client, "remember me")
    run(answered(first))
    before = client.stats()
    again = ask(client, "remember me", deadline_s=0.0)
    assert again.words == ["ok"] and again.vector is first.vector  # at once, and no deadline is too short
    assert client.stats().memo_hits == before.memo_hits + 1


def test_the_longest_unused_is_forgotten_first(
    client: EncoderClient, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    client._memo.clear()
    monkeypatch.setattr(client, "_remember", 2)
    for text in ("one", "two", "one", "three"):
        run(answered(ask(client, text)))
    assert list(client._memo) == [b"one", b"three"] and client.stats().remembered == 2


def test_a_text_in_flight_is_encoded_once(client: EncoderClient, run: Run) -> None:
    before = client.stats()
    told = [ask(client, "all at once") for _ in range(50)]
    assert client.stats().open == 1
    run(answered(*told))
    assert client.stats().joined == before.joined + 49
    assert all(t.vector is told[0].vector for t in told)


def test_what_cannot_have_a_vector_is_unfit(client: EncoderClient, run: Run) -> None:
    """Told at once for what cannot even be sent, by the process for a text beyond the model; neither is remembered."""
    at_once = [ask(client, "x" * (MAX_CHARS + 1)), ask(client, "half a pair \ud800")]
    assert [t.words for t in at_once] == [["unfit"], ["unfit"]]
    long = ask(client, "stock " * 200)
    run(answered(long))
    assert long.words == ["unfit"] and not remembered(client, "stock " * 200)


def test_a_caller_that_raises_is_its_own_problem(client: EncoderClient, run: Run) -> None:
    heard: list[Any] = []

    async def scene() -> Told:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: heard.append(context["exception"]))

        def bad(vector: object, word: str) -> None:
            raise RuntimeError("mine")

        client.encode(b"raising", "raising", DEADLINE_S, bad)
        good = ask(client, "raising")
        await answered(good)
        client.encode(b"raising", "raising", DEADLINE_S, bad)  # from memory: not into its face either
        asyncio.get_running_loop().set_exception_handler(None)
        return good

    assert run(scene()).words == ["ok"]
    assert [repr(error) for error in heard] == ["RuntimeError('mine')"] * 2


# ---------------------------------------------------------------- deadlines


def test_a_late_answer_is_told_once_and_remembered(client: EncoderClient, run: Run) -> None:
    client.drill(Drill(delay_ms=300))
    late = ask(client, "late", deadline_s=0.02)
    early = ask(client, "late", deadline_s=DEADLINE_S)
    run(answered(late))
    assert late.words == ["late"] and not early.all and not remembered(client, "late")
    run(answered(early))
    assert remembered(client, "late") and ask(client, "late").words == ["ok"]
    assert late.words == ["late"]


def test_an_answered_call_s_deadline_is_nothing_to_its_caller(client: EncoderClient, run: Run) -> None:
    told = Told()
    call = client.encode(b"in time", "in time", DEADLINE_S, told)
    assert call is not None
    run(answered(told))
    client._deadlines.insert(0, (0, 0, call))  # its time is up
    client._ring()
    assert told.words == ["ok"]


def test_deadlines_ring_in_their_order_and_a_hang_is_a_bounded_miss(client: EncoderClient, run: Run) -> None:
    order: list[int] = []
    assert client.pid is not None
    os.kill(client.pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        for ms in (150, 50, 250, 100, 200):
            client.encode(b"hang %d" % ms, "hang", ms / 1e3, lambda vector, word, ms=ms: order.append((word, ms)))
        run(until(lambda: len(order) == 5))
        took_s = time.monotonic() - began
    finally:
        os.kill(client.pid, signal.SIGCONT)
    assert order == [("late", ms) for ms in (50, 100, 150, 200, 250)]
    assert 0.25 <= took_s < 2.0
    again = ask(client, "after the hang")
    run(answered(again))
    assert again.words == ["ok"] and client.stats().restarts == 0


def test_who_joins_a_text_that_was_skipped_still_gets_it(client: EncoderClient, run: Run) -> None:
    """The process gives it up for its first caller's sake; the second has time, so it is asked for again."""
    skipped = ask(client, "skipped", deadline_s=0.0)
    joined = ask(client, "skipped")
    assert client.stats().open == 1
    run(answered(skipped, joined))
    assert skipped.words == ["late"] and joined.words == ["ok"]


def test_nobody_is_told_what_it_has_cancelled(client: EncoderClient, run: Run) -> None:
    """The process stands still while it is asked and told off: it finds all of it in its mailbox at once."""
    left, stays = Told(), Told()
    assert client.pid is not None
    os.kill(client.pid, signal.SIGSTOP)
    try:
        call = client.encode(b"left", "left", DEADLINE_S, left)
        both = client.encode(b"both", "both", DEADLINE_S, left)
        client.encode(b"both", "both", DEADLINE_S, stays)
        assert call is not None and both is not None
        client.cancel(call)
        client.cancel(both)
    finally:
        os.kill(client.pid, signal.SIGCONT)
    run(until(lambda: not client._jobs))
    assert stays.words == ["ok"] and left.words == []
    assert not remembered(client, "left")  # it was not even encoded
    client.cancel(call)


def test_too_many_open_texts_fail_at_once(client: EncoderClient, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_OPEN", 2)
    client.drill(Drill(delay_ms=50))
    first, second, third, second_again = (ask(client, f"open {i}") for i in (1, 2, 3, 2))
    assert third.words == ["failed"] and not first.all
    run(answered(first, second, second_again))
    assert [first.words, second.words, second_again.words] == [["ok"]] * 3


# ---------------------------------------------------------------- the process goes


def test_a_dead_and_a_hung_process_are_replaced(run: Run) -> None:
    """kill -9: open calls fail, and new ones at once; then a process that says nothing. Both times it comes back."""

    async def scene() -> None:
        client = EncoderClient(hang_s=1.0)
        await client.start(EncoderSpec(drill=Drill(hang=True)))
        client.drill(Drill())
        known = ask(client, "known")
        await answered(known)
        client.drill(Drill(hang=True))
        first, pid = ask(client, "open"), client.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        await answered(first)
        assert first.words == ["failed"] and not client.stats().ready
        assert ask(client, "meanwhile").words == ["failed"]
        assert ask(client, "known").words == ["ok"]
        await until(lambda: client.stats().ready)
        assert client.pid != pid and not psutil.pid_exists(pid) and client.stats().restarts == 1

        # the new one has its spec's drill again: it hears and never answers
        pid, misses = client.pid, list[Told]()
        while client.stats().ready:
            misses.append(ask(client, f"miss {len(misses)}", deadline_s=0.05))
            await answered(misses[-1])
        assert {word for told in misses for word in told.words} <= {"late", "failed"}
        assert all(len(told.all) == 1 for told in misses) and len(misses) > 5
        await until(lambda: client.stats().ready)
        assert client.pid != pid and client.stats().restarts == 2
        client.drill(Drill())
        again = ask(client, "open")
        await answered(again)
        assert again.words == ["ok"]

        client.drill(Drill(hang=True))
        last, process = ask(client, "at the end"), psutil.Process(client.pid)
        folder = Path(client.path).parent
        await client.stop()
        assert last.words == ["failed"] and not process.is_running() and not folder.exists()
        assert ask(client, "after it").words == ["failed"]
        assert all(len(told.all) == 1 for told in (known, first, again, last))

    run(scene())


def test_a_process_that_gives_up_is_told_at_start(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    client = run(make())
    with pytest.raises(UserError, match="gave up"):
        run(client.start(EncoderSpec()))
    assert not Path(client.path).parent.exists() and ask(client, "x").words == ["failed"]


# ---------------------------------------------------------------- the process' loop, its model at the test's word


class Gate:
    """A model that answers when it is let; remembers its batches."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.entered, self.go = threading.Semaphore(0), threading.Semaphore(0)

    def __call__(self, texts: list[str]) -> list[bytes]:
        self.batches.append(texts)
        self.entered.release()
        assert self.go.acquire(timeout=DEADLINE_S)
        if "poison" in texts:
            raise ValueError("poison")
        return [text.encode() for text in texts]


class Peer:
    """A gateway that speaks the wire by hand."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(DEADLINE_S)
        self.socket.connect(str(path))
        self._unframer, self._heard = Unframer(), []  # type: ignore[var-annotated]
        assert self.hear() == Ready("digest", 4)

    def say(self, *messages: Encode | Cancel | Drill) -> None:
        self.socket.sendall(b"".join(map(frame, messages)))

    def hear(self) -> object:
        while not self._heard:
            data = self.socket.recv(1 << 16)
            assert data, "hung up"
            self._heard += map(decode_from_encoder, self._unframer.feed(data))
        return self._heard.pop(0)


@contextmanager
def looping(path: Path, **spec: Any) -> Iterator[Gate]:
    """The loop in a thread; it must have ended of itself when the test's peers have hung up."""
    gate = Gate()
    loop = Loop(EncoderSpec(socket_path=str(path), **spec), gate, Ready("digest", 4))
    thread = threading.Thread(target=loop.run, daemon=True)
    thread.start()
    yield gate
    thread.join(DEADLINE_S)
    assert not thread.is_alive()


def encode(id: int, text: str, wait_s: float = 60.0) -> Encode:
    within_ns = round(wait_s * 1e9)
    return Encode(id, text, time.monotonic_ns() + within_ns, within_ns)


def test_the_newest_go_first_the_dead_are_skipped_and_the_last_to_leave_ends_it(tmp_path: Path) -> None:
    with looping(tmp_path / "s", max_batch=3) as gate:
        peer = Peer(tmp_path / "s")
        peer.say(encode(0, "first"))
        assert gate.entered.acquire(timeout=DEADLINE_S)
        peer.say(*[encode(i, f"t{i}") for i in range(1, 5)], encode(5, "dead", 0.0), encode(6, "left"), Cancel(6))
        peer.say(Cancel(99))
        gate.go.release(3)
        heard = [peer.hear() for _ in range(7)]
        peer.socket.close()
    assert gate.batches == [["first"], ["t4", "t3", "t2"], ["t1"]]
    assert heard == [
        Vector(0, b"first"), Skipped(6), Skipped(5),
        Vector(4, b"t4"), Vector(3, b"t3"), Vector(2, b"t2"), Vector(1, b"t1"),
    ]


def test_a_batch_is_no_longer_than_its_askers_have_time_for(tmp_path: Path) -> None:
    """Nobody can have two vectors within a nanosecond: three texts at once, then two, then one at a time."""
    with looping(tmp_path / "s", max_batch=3) as gate:
        peer = Peer(tmp_path / "s")
        gate.go.release(6)
        for _ in range(3):
            peer.say(*[Encode(i, f"t{i}", encode(0, "").deadline_ns, within_ns=1) for i in range(3)])
            assert [peer.hear() for _ in range(3)] == [Vector(i, b"t%d" % i) for i in (2, 1, 0)]
        peer.socket.close()
    assert [len(batch) for batch in gate.batches] == [3, 2, 1, 1, 1, 1]


def test_gateways_share_batches_but_not_fates(tmp_path: Path) -> None:
    """The same id from two gateways is two texts; one that hangs up costs the batch it is in, at most."""
    with looping(tmp_path / "s", max_batch=3) as gate:
        one, two, three = (Peer(tmp_path / "s") for _ in range(3))
        one.say(encode(1, "first"))
        assert gate.entered.acquire(timeout=DEADLINE_S)
        one.say(encode(7, "of one"))
        two.say(encode(7, "of two"))
        three.say(*[encode(i, "of three") for i in range(12)])
        three.socket.close()
        gate.go.release(20)
        assert [one.hear(), one.hear(), two.hear()] == [Vector(1, b"first"), Vector(7, b"of one"), Vector(7, b"of two")]
        one.socket.close()
        two.say(encode(8, "alone"))
        assert two.hear() == Vector(8, b"alone")
        two.socket.close()
    encoded = [text for batch in gate.batches for text in batch]
    assert encoded.count("of one") == encoded.count("of two") == 1 and encoded.count("of three") <= 3


def test_a_batch_that_fails_is_told_and_the_process_stays(tmp_path: Path) -> None:
    with looping(tmp_path / "s") as gate:
        peer = Peer(tmp_path / "s")
        gate.go.release(2)
        peer.say(encode(1, "poison"))
        assert peer.hear() == Failed(1, "ValueError('poison')")
        peer.say(encode(2, "food"))
        assert peer.hear() == Vector(2, b"food")
        peer.socket.close()


def test_a_window_waits_for_company(tmp_path: Path) -> None:
    """Each text is read before the next is said, as the cancelled one behind it shows: one batch all the same."""
    with looping(tmp_path / "s", max_batch=3, window_ms=DEADLINE_S * 1e3) as gate:
        peer = Peer(tmp_path / "s")
        gate.go.release(3)
        for i in range(2):
            peer.say(encode(i, f"t{i}"), encode(9, "left"), Cancel(9))
            assert peer.hear() == Skipped(9)
        peer.say(encode(2, "t2"))  # full: it does not wait for the window's end
        assert [peer.hear() for _ in range(3)] == [Vector(i, b"t%d" % i) for i in (2, 1, 0)]
        peer.socket.close()
    assert len(gate.batches) == 1

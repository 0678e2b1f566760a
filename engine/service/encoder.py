"""The gateway's side of the encoder: texts to vectors, each call answered once, on time or not at all.

A vector is remembered under its text's digest; a text in flight is encoded once however many wait for it; a late one
is still remembered. A process that died, or that says nothing while it is asked, is started anew in the background and
calls fail at once meanwhile. Knows nothing of requests, indexes or thresholds; nothing here raises into the caller.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import time
from collections import OrderedDict
from collections.abc import Callable
from itertools import count

import msgspec
import numpy as np

from engine.errors import UserError
from engine.model.encoder_process import (
    MAX_CHARS,
    Cancel,
    Drill,
    Encode,
    EncoderSpec,
    Failed,
    FromEncoder,
    Ready,
    Vector,
    decode_from_encoder,
    frame,
)
from engine.model.wire import Unframer
from engine.service.encoder_host import EncoderHost, OwnEncoder
from engine.service.similar import Done, Word
from engine.units import S_NS

MAX_OPEN = 1000  # texts asked for and not answered; more fail at once
START_TIMEOUT_S = 120.0
HANG_S = 5.0  # silent for so long while it is asked: killed and started anew
RESTART_S, RESTART_MAX_S, STEADY_S = 0.1, 10.0, 30.0  # first pause, longest; one that lived so long starts over


class EncoderStats(msgspec.Struct, frozen=True, gc=False):
    """Counted since the start: calls by the word they got, those that needed no new work, and restarts."""

    ok: int
    late: int
    failed: int
    unfit: int
    memo_hits: int
    joined: int
    restarts: int
    remembered: int
    open: int
    ready: bool


class Call:
    """One caller's wait; ``done`` is None once it has been told, or has left."""

    __slots__ = ("deadline_ns", "done", "job")

    def __init__(self, job: Job, deadline_ns: int, done: Done) -> None:
        self.job, self.deadline_ns = job, deadline_ns
        self.done: Done | None = done


class Job:
    """A text in flight and the calls that wait for it."""

    __slots__ = ("calls", "id", "text", "text_key")

    def __init__(self, id: int, text_key: bytes, text: str) -> None:
        self.id, self.text_key, self.text = id, text_key, text
        self.calls: list[Call] = []


class Line(asyncio.Protocol):
    """The connection to one encoder process."""

    def __init__(self, hear: Callable[[FromEncoder], None], lost: Callable[[Line], None]) -> None:
        self._hear, self._lost, self._unframer = hear, lost, Unframer()
        self.ready: asyncio.Future[Ready | None] = asyncio.get_running_loop().create_future()
        self.gone = asyncio.Event()
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Connected; Ready follows."""
        self.transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        """Frames from the process."""
        for raw in self._unframer.feed(data):
            message = decode_from_encoder(raw)
            if not isinstance(message, Ready):
                self._hear(message)
            elif not self.ready.done():
                self.ready.set_result(message)

    def connection_lost(self, exc: Exception | None) -> None:
        """The process has gone, on our word or by itself."""
        self.transport = None
        if not self.ready.done():
            self.ready.set_result(None)
        self.gone.set()
        self._lost(self)


class EncoderClient:
    """One encoder process, kept alive, and the calls to it. Made on the running asyncio loop that it lives on."""

    def __init__(
        self, remember: int = 50_000, hang_s: float = HANG_S, host: EncoderHost | None = None
    ) -> None:
        """``remember``: vectors, 1.7 KiB each; the longest unused goes first. ``host``: None = a process of its own."""
        self._loop = asyncio.get_running_loop()
        self._remember, self._hang_ns = remember, round(hang_s * S_NS)
        self._memo: OrderedDict[bytes, np.ndarray] = OrderedDict()
        self._jobs: dict[int, Job] = {}
        self._job_of: dict[bytes, Job] = {}
        self._ids, self._order = count(), count()
        self._deadlines: list[tuple[int, int, Call]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._counts: dict[str, int] = dict.fromkeys(("ok", "late", "failed", "unfit", "memo", "joined", "restarts"), 0)
        self._heard_ns = 0
        self._host: EncoderHost = host or OwnEncoder()
        self._line: Line | None = None  # None while there is no process that is ready
        self._keeper: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """Of the process that is there now, ready or not."""
        return self._host.pid

    @property
    def path(self) -> str:
        """Of the socket that others may connect to."""
        return self._host.path

    def kill(self) -> None:
        """It hangs. A new one is started."""
        self._host.kill()

    async def start(self, spec: EncoderSpec) -> Ready:
        """Spawn and wait for the weights; UserError when the process gives up. ``spec.socket_path`` is ours to say."""
        try:
            ready = await self._spawn(spec)
        except BaseException:
            await self.stop()
            raise
        self._keeper = asyncio.create_task(self._keep(spec))
        return ready

    def encode(self, text_key: bytes, text: str, deadline_s: float, done: Done) -> Call | None:
        """Calls ``done`` exactly once, perhaps before this returns. The result is for ``cancel``."""
        vector = self._memo.get(text_key)
        if vector is not None:
            self._memo.move_to_end(text_key)
            self._counts["memo"] += 1
            self._tell(done, vector, "ok")
            return None
        job = self._job_of.get(text_key)
        now_ns = time.monotonic_ns()
        deadline_ns = now_ns + round(min(deadline_s, 3600.0) * S_NS)
        if job is not None:
            self._counts["joined"] += 1
        else:
            job = Job(next(self._ids), text_key, text)
            refusal = self._send(job, now_ns, deadline_ns)
            if refusal is not None:
                self._tell(done, None, refusal)
                return None
        call = Call(job, deadline_ns, done)
        job.calls.append(call)
        heapq.heappush(self._deadlines, (deadline_ns, next(self._order), call))
        if self._deadlines[0][2] is call:
            self._arm()
        return call

    def cancel(self, call: Call) -> None:
        """The caller has left: ``done`` will not be called. A text that nobody waits for is not encoded."""
        call.done = None
        if call.job.id in self._jobs and not any(other.done for other in call.job.calls):
            self._write(Cancel(call.job.id))

    def drill(self, drill: Drill) -> None:
        """Make the process slow, or deaf, from now on."""
        self._write(drill)

    def stats(self) -> EncoderStats:
        """Counts so far."""
        c = self._counts
        return EncoderStats(
            ok=c["ok"], late=c["late"], failed=c["failed"], unfit=c["unfit"], memo_hits=c["memo"], joined=c["joined"],
            restarts=c["restarts"], remembered=len(self._memo), open=len(self._jobs), ready=self._line is not None,
        )

    async def stop(self) -> None:
        """Open calls fail; the process ends by itself, or is killed after a second."""
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait([self._keeper])
        connected = self._line is not None
        if self._line is not None and self._line.transport is not None:
            self._line.transport.close()
            await self._line.gone.wait()
        await self._host.bury(1.0 if connected else 0.0)
        if self._timer is not None:
            self._timer.cancel()
        self._host.close()

    # ------------------------------------------------------------ calls

    def _tell(self, done: Done | None, vector: np.ndarray | None, word: Word) -> None:
        if done is None:
            return
        self._counts[word] += 1
        try:
            done(vector, word)
        except Exception as error:  # one caller's mistake is not the next one's
            self._loop.call_exception_handler({"message": "an encoder's caller", "exception": error})

    def _settle(self, job: Job, vector: np.ndarray | None, word: Word) -> None:
        for call in job.calls:
            done, call.done = call.done, None
            self._tell(done, vector, word)

    def _send(self, job: Job, now_ns: int, deadline_ns: int) -> Word | None:
        """None when it is on its way."""
        if len(job.text) > MAX_CHARS:
            return "unfit"
        if self._line is None or self._line.transport is None or len(self._jobs) >= MAX_OPEN:
            self._kill_if_hung()
            return "failed"
        try:
            data = frame(Encode(job.id, job.text, deadline_ns, deadline_ns - now_ns))
        except UnicodeEncodeError:  # half a surrogate pair
            return "unfit"
        if not self._jobs:
            self._heard_ns = now_ns
        self._jobs[job.id] = self._job_of[job.text_key] = job
        self._line.transport.write(data)
        return None

    def _write(self, message: Cancel | Drill) -> None:
        if self._line is not None and self._line.transport is not None:
            self._line.transport.write(frame(message))

    def _hear(self, message: FromEncoder) -> None:
        self._heard_ns = time.monotonic_ns()
        job = None if isinstance(message, Ready) else self._jobs.get(message.id)
        if job is None:
            return
        del self._jobs[job.id], self._job_of[job.text_key]
        if isinstance(message, Failed):
            self._settle(job, None, "failed")
        elif not isinstance(message, Vector):  # skipped; but somebody may have joined who still has time
            latest_ns = max((call.deadline_ns for call in job.calls if call.done), default=0)
            if latest_ns <= self._heard_ns or self._send(job, self._heard_ns, latest_ns) is not None:
                self._settle(job, None, "late")
        elif not message.vector:
            self._settle(job, None, "unfit")
        else:
            vector = np.frombuffer(message.vector, "<f4")
            self._memo[job.text_key] = vector
            if len(self._memo) > self._remember:
                self._memo.popitem(last=False)
            self._settle(job, vector, "ok")

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None
        if self._deadlines:
            wait_s = max(0, self._deadlines[0][0] - time.monotonic_ns()) / S_NS
            self._timer = self._loop.call_later(wait_s, self._ring)

    def _ring(self) -> None:
        now_ns = time.monotonic_ns()
        while self._deadlines and self._deadlines[0][0] <= now_ns:
            call = heapq.heappop(self._deadlines)[2]
            done, call.done = call.done, None
            self._tell(done, None, "late")
        self._kill_if_hung()
        self._arm()

    # ------------------------------------------------------------ the process

    def _kill_if_hung(self) -> None:
        if self._jobs and time.monotonic_ns() - self._heard_ns > self._hang_ns:
            self.kill()
            self._heard_ns = time.monotonic_ns()  # said once, and again if that did not help

    def _lost(self, line: Line) -> None:
        if line is self._line:
            self._line = None
            jobs = list(self._jobs.values())
            self._jobs.clear()
            self._job_of.clear()
            for job in jobs:
                self._settle(job, None, "failed")

    async def _keep(self, spec: EncoderSpec) -> None:
        """A new process for every one that is lost."""
        pause_s = RESTART_S
        while True:
            born_s = self._loop.time()
            if self._line is not None:
                await self._line.gone.wait()
            await self._host.bury(0.0)
            if self._loop.time() - born_s > STEADY_S:
                pause_s = RESTART_S
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, RESTART_MAX_S)
            self._counts["restarts"] += 1
            with contextlib.suppress(UserError, OSError, TimeoutError):
                await self._spawn(spec)

    async def _spawn(self, spec: EncoderSpec) -> Ready:
        await self._host.begin(spec)
        deadline_s = self._loop.time() + START_TIMEOUT_S
        line = Line(self._hear, self._lost)
        while True:
            with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
                await self._loop.create_unix_connection(lambda: line, self._host.path)
                break
            if self._host.exit_code is not None:
                raise UserError("the encoder process gave up", why=f"exit code {self._host.exit_code}; see above")
            if self._loop.time() > deadline_s:
                raise UserError(f"the encoder process was not ready within {START_TIMEOUT_S:.0f} s")
            await asyncio.sleep(0.02)
        try:
            ready = await asyncio.wait_for(line.ready, max(0.0, deadline_s - self._loop.time()))
            if ready is None or line.transport is None:
                raise UserError("the encoder process gave up before it was ready")
            self._line = line
            return ready
        finally:
            if self._line is not line and line.transport is not None:
                line.transport.close()

"""One of several ingress processes: a gateway of its own over replicas that all of them share.

``python -m engine.service.ingress_process FD``: the socket to its supervisor is that file descriptor. Signals are the
supervisor's business; when that one has died, this one leaves at once, with its journal and ledger in the kernel's
hands.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
from pathlib import Path
from typing import NoReturn

from engine.errors import UserError
from engine.service.auth import KeyRing
from engine.service.connections import allow_many_files
from engine.service.ingress_words import (
    CalledOff,
    Channel,
    DrainNow,
    EncoderHangs,
    GivenUp,
    Hangs,
    IngressSpec,
    Refused,
    Up,
    Word,
)
from engine.service.loop import run
from engine.service.server import RunningEngine, ServeOptions, running
from engine.service.shared_replicas import Sibling

log = logging.getLogger(__name__)

CUT_OFF = 130  # exit code of one that was left alone, or told twice


class Ingress:
    """The process's one task, and what its supervisor says meanwhile."""

    def __init__(self) -> None:
        self._spec: asyncio.Future[IngressSpec] = asyncio.get_running_loop().create_future()
        self._drain = asyncio.Event()
        self._engine: RunningEngine | None = None
        self._early: list[GivenUp | CalledOff] = []  # said before there was a gateway that it could be told
        self._done = False
        self.channel = Channel(self._hear, self._left_alone)

    async def serve(self) -> int:
        """From the spec to the end of the drain; the exit code."""
        spec = await self._spec
        keys = KeyRing(spec.digests, spec.tenants, spec.admins)
        options = ServeOptions(
            spec.host, spec.port, Path(spec.folder) if spec.folder else None, hash_key=spec.hash_key,
            drain_s=spec.drain_s,
        )
        sibling = Sibling(
            spec.gateway, spec.name, spec.epoch_ns, spec.replicas, spec.hang_s,
            hangs=lambda replica: self.channel.say(Hangs(replica)),
            encoder=spec.encoder, encoder_hangs=lambda: self.channel.say(EncoderHangs()),
            tell_others=lambda what: self.channel.say(CalledOff(what)), own_port=spec.own_port,
        )
        try:
            async with running(spec.scenario, keys, options, sibling) as engine:
                self._engine = engine
                for word in self._early:
                    _tell(engine, word)
                self.channel.say(Up(os.getpid(), engine.warm_answers))
                await self._drain.wait()
                await engine.drain()
        except UserError as error:
            self.channel.say(Refused(error.what, error.where, error.why, error.fix))
            return 1
        finally:
            self._done = True
            self.channel.close()
        return 0

    def _hear(self, word: Word) -> None:
        match word:
            case IngressSpec():
                self._spec.set_result(word)
            case DrainNow():
                self._drain.set()
            case GivenUp() | CalledOff() if self._engine is None:
                self._early.append(word)
            case GivenUp() | CalledOff():
                assert self._engine is not None
                _tell(self._engine, word)
            case _:
                pass

    def _left_alone(self) -> None:
        if not self._done:
            _leave(self._engine)


def _tell(engine: RunningEngine, word: GivenUp | CalledOff) -> None:
    if isinstance(word, GivenUp):
        engine.driver.lose(word.replica, for_good=True)
    else:
        try:
            engine.driver.call_off(word.what)
        except OSError as error:  # the machine has heard it; only its snapshot could not be removed
            log.error("the snapshot cannot be removed, and holds what was called off: %s", error)


def _leave(engine: RunningEngine | None) -> NoReturn:
    try:
        if engine is not None:
            engine.flush()
    finally:
        os._exit(CUT_OFF)


async def _main(fd: int) -> int:
    ingress = Ingress()
    sock = socket.socket(fileno=fd)
    sock.setblocking(False)
    await asyncio.get_running_loop().create_unix_connection(lambda: ingress.channel, sock=sock)
    return await ingress.serve()


def main() -> None:
    """See the module's docstring."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    allow_many_files()
    sys.exit(run(_main(int(sys.argv[1]))))


if __name__ == "__main__":
    main()

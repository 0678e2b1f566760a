"""Where the encoder's process comes from: one of one's own, or somebody else's that one only connects to.

The socket's path is the same in every life, so that who only connects need not be told of a new one.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import msgspec

from engine.model.encoder_process import EncoderSpec


class EncoderHost(Protocol):
    """What a client needs of it."""

    path: str  # of its socket

    @property
    def exit_code(self) -> int | None:
        """None while it may still be there."""
        ...

    @property
    def pid(self) -> int | None:
        """Of the process that is there now, ready or not; None where that is not known."""
        ...

    async def begin(self, spec: EncoderSpec) -> None:
        """The next life, if it is ours to give. ``spec.socket_path`` is ours to say."""
        ...

    def kill(self) -> None:
        """It hangs. Its end is noticed like any other."""
        ...

    async def bury(self, grace_s: float) -> None:
        """This life has ended when this returns, if it is ours to end."""
        ...

    def close(self) -> None:
        """There are no more lives."""
        ...


class OwnEncoder:
    """A process that lives and dies with its client."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="doorbuster-")  # readable by this user alone
        self.path = str(Path(self._folder.name) / "encoder.sock")
        self._process: asyncio.subprocess.Process | None = None

    @property
    def exit_code(self) -> int | None:
        """See ``EncoderHost``."""
        return self._process.returncode if self._process is not None else None

    @property
    def pid(self) -> int | None:
        """See ``EncoderHost``."""
        return self._process.pid if self._process is not None else None

    async def begin(self, spec: EncoderSpec) -> None:
        """See ``EncoderHost``."""
        Path(self.path).unlink(missing_ok=True)  # a former life's
        env = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": str(max(1, spec.threads))}
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "engine.model.encoder_process", stdin=asyncio.subprocess.PIPE, env=env
        )
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.msgpack.encode(msgspec.structs.replace(spec, socket_path=self.path)))
        self._process.stdin.close()

    def kill(self) -> None:
        """See ``EncoderHost``."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    async def bury(self, grace_s: float) -> None:
        """See ``EncoderHost``."""
        if self._process is None:
            return
        try:
            await asyncio.wait_for(self._process.wait(), grace_s)
        except TimeoutError:
            self.kill()
            await self._process.wait()

    def close(self) -> None:
        """See ``EncoderHost``."""
        self._folder.cleanup()


class SharedEncoder:
    """Somebody else's. ``hangs``: who kills it, and starts it anew."""

    exit_code = pid = None

    def __init__(self, path: str, hangs: Callable[[], None]) -> None:
        self.path, self.kill = path, hangs

    async def begin(self, spec: EncoderSpec) -> None:
        """See ``EncoderHost``."""

    async def bury(self, grace_s: float) -> None:
        """See ``EncoderHost``."""

    def close(self) -> None:
        """See ``EncoderHost``."""

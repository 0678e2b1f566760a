"""Keeps one server's snapshot: read before the model is loaded, given to the gateway, written at times and at the end.

What is on disk is never older than the last word on what is called off: with such a word the file goes, and the next
write makes a new one. So a server that is killed comes back with fewer answers, never with one that may not serve. One
server a path.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from pathlib import Path

from engine.cache_config import SnapshotConfig
from engine.config import Scenario
from engine.errors import UserError
from engine.events import Remember
from engine.model import whole_file
from engine.model.encoder_process import DIMS
from engine.model.index import VectorIndex
from engine.service import snapshot
from engine.service.driver import GatewayDriver, Kept, answer_ids
from engine.service.snapshot import Origin, Snapshot

log = logging.getLogger(__name__)


class SnapshotKeeper:
    """Lives on the driver's loop."""

    def __init__(self, config: SnapshotConfig) -> None:
        """Reads what is there. UserError when nothing could be written there; what cannot be used is only logged."""
        self.path, self._every_s = Path(config.path).expanduser(), config.every_s
        whole_file.check_place(self.path, "no snapshot can be written", "name another file: --set snapshot.path=FILE")
        self._found: Snapshot | None = None
        try:
            self._found = snapshot.read(self.path)
        except UserError as error:
            _warn(error)
        self._words = 0  # on what is called off
        self._ending = asyncio.Event()
        self._saving: asyncio.Task[None] | None = None

    @property
    def hash_key(self) -> bytes:
        """Of the digests in there; b"" = nothing is there."""
        return self._found.origin.hash_key if self._found is not None else b""

    def called_off(self) -> None:
        """What is on disk may hold what may serve no more. OSError when it cannot be removed."""
        self._words += 1
        whole_file.remove(self.path)

    def warm(self, driver: GatewayDriver, origin: Origin) -> int:
        """Give the gateway what was found, if it is of this origin; how many answers it took."""
        found, self._found = self._found, None
        if found is None:
            return 0
        try:
            kept = self._fitting(found, driver.now_ns(), origin)
            questions, answers = self._vectors(found, origin)
        except UserError as error:
            _warn(error)
            return 0
        driver.remember(kept, questions, answers)
        return len(answer_ids(driver.machine.answers.kept()))

    def _fitting(self, found: Snapshot, now_ns: int, origin: Origin) -> Kept:
        if why := snapshot.why_foreign(found.origin, origin):
            raise snapshot.refusal(self.path, why)
        try:
            what = snapshot.aged(found, now_ns, time.time_ns())
        except ValueError as error:
            raise snapshot.refusal(self.path, str(error)) from None
        if found.origin.vectors != origin.vectors:
            if what.similar and origin.encoder:
                why = "their vectors are of another encoder or encoding"
                log.warning("%s: its similar questions are left out (%d): %s", self.path, len(what.similar), why)
            what = Remember(what.exact, (), what.versions)
        named = set(answer_ids(what))
        texts = [(answer_id, text) for answer_id, text in found.texts if answer_id in named]
        if len(texts) != len(named):
            raise snapshot.refusal(self.path, "texts are missing")
        return Kept(now_ns, what, texts)

    def _vectors(self, found: Snapshot, origin: Origin) -> tuple[VectorIndex, VectorIndex]:
        encoder, dims, encoding = origin.vectors
        if found.origin.vectors != origin.vectors:
            return VectorIndex(dims, vectors=encoding), VectorIndex(dims)
        where = str(self.path)
        questions = VectorIndex.unpack(found.questions, where, encoder, dims, vectors=encoding)
        return questions, VectorIndex.unpack(found.answers, where, encoder, dims)

    # ------------------------------------------------------------ writing

    def begin(self, driver: GatewayDriver, origin: Origin) -> None:
        """From now on it is written every ``every_s``, if that is asked for."""
        if self._every_s:
            self._saving = asyncio.create_task(self._save_often(driver, origin))

    async def stop(self) -> None:
        """No more writes but by ``save``; one that has begun is waited for."""
        self._ending.set()
        if self._saving is not None:
            await self._saving

    async def _save_often(self, driver: GatewayDriver, origin: Origin) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ending.wait(), self._every_s)
                return
            await self.save(driver, origin)

    async def save(self, driver: GatewayDriver, origin: Origin) -> None:
        """Write what is kept now. Encoding and writing are a thread's work; a disk that is full is only logged."""
        words = self._words
        at_ns, what, texts = driver.kept()
        taken = Snapshot(origin, time.time_ns(), at_ns, what, texts)
        packed = driver.packed(origin.encoder)
        try:
            beside = await asyncio.to_thread(
                lambda: whole_file.write_beside(self.path, snapshot.to_bytes(taken, packed))
            )
            if words == self._words:
                whole_file.install(self.path, beside)
            else:
                beside.unlink()
        except OSError as error:
            why = error.strerror or str(error)
            _warn(UserError("the response caches were not saved", str(self.path), why, "make room, or name another"))


def origin_of(scenario: Scenario, hash_key: bytes, model_digest: str, encoder: str) -> Origin:
    """Whose answers this server's caches hold. ``encoder``: its weights' digest."""
    depends_on = {name: cls.depends_on for name, cls in scenario.classes.items()}
    return Origin(hash_key, scenario.model.name, model_digest, depends_on, encoder, DIMS, scenario.semantic.vectors)


def _warn(error: UserError) -> None:
    log.warning("%s: %s; why: %s; fix: %s", error.where, error.what, error.why, error.fix)

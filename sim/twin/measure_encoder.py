"""Times the real encoder process through the gateway's own client: batches of each size, and texts that come alone.

A batch of a wanted size needs the process to be busy while its texts gather. So a plug goes first, held up by a drill;
what is sent meanwhile is one batch, and its time is the plug's answer to the last of its own. A text that finds the
process idle takes the wire's time on top. Same cores, same threads, same batch limit as live.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator
from itertools import count

import msgspec
import numpy as np

from engine.errors import CalibrationError
from engine.model.encoder_process import Drill, EncoderSpec
from engine.service.encoder import EncoderClient
from engine.service.similar import Word

ROUNDS = 6  # of all batch sizes, each batch twice
HOLD_MS, GATHER_S = 12, 0.004  # the plug is held up so long; the batch is sent so long after it
DEADLINE_S = 60.0
PLUG = "is it in stock"


class BatchSample(msgspec.Struct, frozen=True, gc=False):
    """One measured batch. Two in a row with the same ``number`` were the same texts."""

    texts: int
    ns: int
    number: int


class EncoderMeasured(msgspec.Struct, frozen=True):
    """What was seen. ``wire_ns``: of the same text, alone less in a batch of its own."""

    batches: list[BatchSample]
    wire_ns: list[int]
    digest: str
    max_batch: int


def measure_encoder(
    texts: list[str], cores: tuple[int, ...], seed: int = 1, rounds: int = ROUNDS
) -> EncoderMeasured:
    """About 10 s, half of it until the process is there. Raises UserError when there is no encoder."""
    before = os.sched_getaffinity(0) if cores else None
    if cores:
        os.sched_setaffinity(0, cores)  # as the gateway, which shares them with the encoder
    try:
        return asyncio.run(_measure(EncoderSpec(cores=cores), texts, seed, rounds))
    finally:
        if before:
            os.sched_setaffinity(0, before)


async def _measure(spec: EncoderSpec, texts: list[str], seed: int, rounds: int) -> EncoderMeasured:
    rng = np.random.default_rng(seed)
    client = EncoderClient()
    ready = await client.start(spec)
    try:
        asking = _Asking(client)
        sizes = [n for _ in range(rounds) for n in rng.permutation(np.arange(1, spec.max_batch + 1)).tolist()]
        batches: list[BatchSample] = []
        wire_ns: list[int] = []
        for number, size in enumerate([spec.max_batch, *sizes]):
            chosen = [texts[i] for i in rng.choice(len(texts), size, replace=size > len(texts))]
            taken = [ns for _ in range(2) if (ns := await asking.batch_ns(chosen)) is not None]
            if number == 0:
                continue  # warm-up
            batches += [BatchSample(size, ns, number) for ns in taken]
            if size == 1 and taken:
                wire_ns += [await asking.alone_ns(chosen[0]) - ns for ns in taken]
    finally:
        await client.stop()
    return EncoderMeasured(batches, wire_ns, ready.digest, spec.max_batch)


class _Asking:
    """Texts under keys that are never the same twice: nothing is remembered, everything is encoded."""

    def __init__(self, client: EncoderClient) -> None:
        self._client = client
        self._keys: Iterator[int] = count()

    async def batch_ns(self, texts: list[str]) -> int | None:
        """Time of one batch of these; None when the plug was not under way before they came."""
        self._client.drill(Drill(delay_ms=HOLD_MS))
        plug = self._ask(PLUG)
        await asyncio.sleep(GATHER_S)
        self._client.drill(Drill())
        answered_ns = await asyncio.gather(*[self._ask(text) for text in texts])
        began_ns = await plug
        return max(answered_ns) - began_ns if began_ns < min(answered_ns) else None

    async def alone_ns(self, text: str) -> int:
        """From asking to hearing, with nothing else under way."""
        began_ns = time.monotonic_ns()
        return await self._ask(text) - began_ns

    def _ask(self, text: str) -> asyncio.Future[int]:
        answered: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def done(vector: np.ndarray | None, word: Word) -> None:
            if vector is None:
                answered.set_exception(CalibrationError(f"the encoder said {word!r} while it was measured"))
            else:
                answered.set_result(time.monotonic_ns())

        self._client.encode(next(self._keys).to_bytes(16, "little"), text, DEADLINE_S, done)
        return answered

"""An encoder that is somebody else's: asked like one's own, never started, and told on when it hangs.

Run: python -m pytest tests/service/test_encoder_host.py -q
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import numpy as np

from engine.model.encoder_process import Encode, EncoderSpec, Ready, Vector, frame
from engine.model.wire import Unframer
from engine.service.encoder import EncoderClient
from engine.service.encoder_host import SharedEncoder
from tests.waiting import DEADLINE_S


class Deaf:
    """An encoder on a socket: says that it is ready, answers only while ``hears``."""

    def __init__(self) -> None:
        self.hears = True
        self.lines: list[asyncio.StreamWriter] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.lines.append(writer)
        writer.write(frame(Ready("digest", 4)))
        unframer, decode = Unframer(), msgspec.msgpack.Decoder(Encode).decode
        while data := await reader.read(1 << 16):
            for raw in unframer.feed(data):
                if self.hears:
                    writer.write(frame(Vector(decode(raw).id, np.ones(4, "<f4").tobytes())))
        writer.close()


def test_one_that_hangs_is_told_on_and_the_next_life_is_found_by_itself(tmp_path: Path) -> None:
    async def story() -> None:
        told: list[int] = []
        encoder, path = Deaf(), str(tmp_path / "encoder.sock")
        client = EncoderClient(hang_s=0.05, host=SharedEncoder(path, lambda: told.append(len(words))))
        words: list[str] = []
        starting = asyncio.create_task(client.start(EncoderSpec()))
        await asyncio.sleep(0)  # nobody is there yet
        server = await asyncio.start_unix_server(encoder.serve, path)
        assert (await starting).digest == "digest"
        assert client.pid is None

        async def ask(n: int, deadline_s: float) -> str:
            answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()
            client.encode(b"%d" % n, f"text {n}", deadline_s, lambda vector, word: answer.set_result(word))
            words.append(await answer)
            return words[-1]

        assert await ask(1, 5.0) == "ok"
        encoder.hears = False
        n = 2
        while not told:  # each is late; one of them finds that it has been silent for too long
            assert await ask(n, 0.02) == "late"
            n += 1
        server.close()
        Path(path).unlink()
        encoder.hears = True
        for line in encoder.lines:
            line.close()
        server = await asyncio.start_unix_server(encoder.serve, path)
        while await ask(n, 5.0) != "ok":  # fails at once while nobody is there
            n += 1
            await asyncio.sleep(0)
        await client.stop()
        server.close()

    async def bounded() -> None:
        async with asyncio.timeout(DEADLINE_S):
            await story()

    asyncio.run(bounded())

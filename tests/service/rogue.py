"""A server that speaks the OpenAI protocol as badly as it is told to, on a loop of its own in a thread.

``mood`` says how the next completions are answered; looks (GET) are answered well unless ``away``. It keeps what it was
asked, and counts connections that its clients have closed in the middle of an answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Iterator
from typing import Any, Literal

Mood = Literal[
    "well", "busy", "loading", "broken", "refuses", "no key", "html", "garbage", "binary", "hangs", "silent", "cut",
    "cut early", "error event", "no end", "no usage", "closes", "redirects", "chatty", "closes kept",
]
WORDS = ["Yes", ", ", "that ", "is ", "so", "."]
USAGE = {"prompt_tokens": 9, "completion_tokens": 6, "total_tokens": 15, "prompt_tokens_details": {"cached_tokens": 4}}
STATUS = {"busy": 429, "loading": 503, "broken": 500, "refuses": 400, "no key": 401, "redirects": 307}


def event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def piece(text: str | None, finish: str | None = None) -> bytes:
    delta = {} if text is None else {"content": text}
    return event({"id": "x", "object": "chat.completion.chunk", "choices": [{"index": 0, "delta": delta,
                  "finish_reason": finish}], "usage": None, "extra": {"of": "its own"}})


class Rogue:
    """Made by ``rogue``."""

    def __init__(self) -> None:
        self.mood: Mood = "well"
        self.moods: list[Mood] = []  # of the next ones, before ``mood``
        self.away = False
        self.asked: list[dict[str, Any]] = []
        self.headers: list[bytes] = []
        self.closed = 0  # hung up on in the middle
        self.open = 0
        self.most_open = 0
        self.looks = 0
        self.connections = 0
        self.retry_after = b""
        self.port = 0
        self.gate: asyncio.Event | None = None  # "hangs", "silent" and "chatty" wait for it
        self.loop: asyncio.AbstractEventLoop | None = None
        self.listening: asyncio.Server | None = None
        self.writers: set[asyncio.StreamWriter] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1/"

    def release(self) -> None:
        """Who hangs or is silent goes on."""
        assert self.loop is not None and self.gate is not None
        self.loop.call_soon_threadsafe(self.gate.set)

    def kill(self) -> None:
        """As a process dies: no more connections, and a reset on each that is there."""
        async def die() -> None:
            assert self.listening is not None
            self.listening.close()
            for writer in self.writers:
                writer.transport.abort()

        assert self.loop is not None
        asyncio.run_coroutine_threadsafe(die(), self.loop).result(10)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.writers.add(writer)
        kept = False
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                if head.startswith(b"GET"):
                    self.looks += 1
                    status = b"503 no" if self.away else b"200 OK"
                    body = b'{"object":"list","data":[{"id":"rogue-1","object":"model"}]}'
                    writer.write(b"HTTP/1.1 %s\r\ncontent-length: %d\r\n\r\n%s" % (status, len(body), body))
                    continue
                size = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
                self.headers.append(head)
                self.asked.append(json.loads(await reader.readexactly(size)))
                self.open += 1
                self.most_open = max(self.most_open, self.open)
                answer = asyncio.create_task(self.answer(writer, kept))
                kept = True
                gone = asyncio.create_task(reader.read(1))
                try:
                    await asyncio.wait([answer, gone], return_when=asyncio.FIRST_COMPLETED)
                    if not answer.done():
                        self.closed += 1
                        return
                    if answer.result():
                        return
                finally:
                    self.open -= 1
                    answer.cancel()
                    if not gone.done():
                        gone.cancel()
                        await asyncio.wait([gone])
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.writers.discard(writer)
            writer.close()

    async def answer(self, writer: asyncio.StreamWriter, kept: bool) -> bool:
        """True: close the connection."""
        mood = self.moods.pop(0) if self.moods else self.mood
        if mood in STATUS:
            body = json.dumps({"error": {"message": mood, "type": "x", "code": None}}).encode()
            retry = b"retry-after: %s\r\n" % self.retry_after if self.retry_after else b""
            writer.write(
                b"HTTP/1.1 %d No\r\n%slocation: /elsewhere\r\ncontent-length: %d\r\n\r\n%s"
                % (STATUS[mood], retry, len(body), body)
            )
            return False
        if mood == "closes" or (kept and mood == "closes kept"):
            return True
        if mood == "hangs":
            assert self.gate is not None
            await self.gate.wait()
        kind = b"text/html" if mood == "html" else b"text/event-stream; charset=utf-8"
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: %s\r\ntransfer-encoding: chunked\r\n\r\n" % kind)

        async def say(raw: bytes) -> None:
            writer.write(b"%x\r\n%s\r\n" % (len(raw), raw))
            await writer.drain()

        if mood in ("garbage", "html"):
            await say(b"data: <html>\n\n")
        elif mood == "binary":
            await say(b"data: \xff\xfe\n\n")
        elif mood == "cut early":
            await say(event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}))
            return True
        else:
            await say(b": a comment\n\nevent: x\nid: 7\n" + event({"choices": [{"delta": {"role": "assistant"}}]}))
            for at, word in enumerate(WORDS):
                await say(piece(word))
                while at == 1 and mood == "chatty" and self.gate is not None and not self.gate.is_set():
                    await say(piece("well, "))
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(self.gate.wait(), 0.02)
                if at == 1 and mood == "silent":
                    assert self.gate is not None
                    await self.gate.wait()
                if at == 1 and mood == "cut":
                    return True
                if at == 1 and mood == "error event":
                    await say(event({"error": {"message": "out of memory", "code": 500}}))
            if mood != "no end":
                await say(piece(None, "stop"))
                if mood != "no usage":
                    await say(event({"choices": [], "usage": USAGE}))
                await say(b"data: [DONE]\n\n")
        await say(b"")
        return False


@contextlib.contextmanager
def rogue() -> Iterator[Rogue]:
    """Serving on a free port."""
    server, loop, ready = Rogue(), asyncio.new_event_loop(), threading.Event()

    async def run() -> None:
        server.gate = asyncio.Event()
        listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
        server.loop, server.listening = loop, listening
        server.port = listening.sockets[0].getsockname()[1]
        ready.set()

    loop.create_task(run())
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield server
    finally:
        async def end() -> None:
            assert server.listening is not None
            server.listening.close()
            tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(end(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()

"""One state, told once a second to everybody who watches: server-sent events, computed once for all viewers.

Nobody watches: nothing is computed. There is room for so many viewers and no more; one that takes no event in time
loses its place at once (the connection is the protocol's to close, see ``write_stall_ms``). Nothing is queued: who is
slow misses states, and the next one is whole. Knows nothing of what the state is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from engine.errors import RequestError
from engine.service.sse import Receive, Send

PERIOD_S = 1.0
MOST_VIEWERS = 32
SLOW_S = 5.0


class Viewer:
    """One that watches."""

    def __init__(self) -> None:
        self.news = asyncio.Event()
        self.gone = False


class Feed:
    """Lives on one event loop."""

    def __init__(
        self, look: Callable[[], bytes], over: Callable[[], bool], period_s: float = PERIOD_S,
        most: int = MOST_VIEWERS, slow_s: float = SLOW_S,
    ) -> None:
        """``look``: the state as JSON on one line. ``over``: whether the server shuts down; viewers are let go then."""
        self._look, self._over = look, over
        self._period_s, self._most, self._slow_s = period_s, most, slow_s
        self._viewers: set[Viewer] = set()
        self._event = b""
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._viewers)

    async def serve(self, receive: Receive, send: Send, start: dict[str, object]) -> None:
        """The whole response, ``start`` being its first message. RequestError "overloaded" when there is no room."""
        viewer = self._enter()
        watch = asyncio.create_task(_until_gone(viewer, receive))
        try:
            await send(start)
            await self._tell(viewer, send)
        except TimeoutError:
            pass  # too slow
        finally:
            self._viewers.discard(viewer)
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)
        if not viewer.gone:
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _enter(self) -> Viewer:
        if len(self._viewers) >= self._most:
            raise RequestError("overloaded", f"{self._most} viewers watch already")
        viewer = Viewer()
        viewer.news.set()  # what is known already
        self._viewers.add(viewer)
        if self._timer is None:
            try:
                self._tick()
            except BaseException:
                self._viewers.discard(viewer)
                raise
        return viewer

    async def _tell(self, viewer: Viewer, send: Send) -> None:
        while True:
            await viewer.news.wait()
            viewer.news.clear()
            if viewer.gone or self._over():
                return
            async with asyncio.timeout(self._slow_s):
                await send({"type": "http.response.body", "body": self._event, "more_body": True})

    def _tick(self) -> None:
        self._timer = None
        if not self._viewers:
            return
        self._event = b"data: " + self._look() + b"\n\n"
        for viewer in self._viewers:
            viewer.news.set()
        self._timer = asyncio.get_running_loop().call_later(self._period_s, self._tick)


async def _until_gone(viewer: Viewer, receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    viewer.gone = True
    viewer.news.set()

"""The routes for people and their tools, on Starlette: the status page, its events, the OpenAPI document.

Only its router and responses are used: no middleware stands between a client that leaves and who serves it, and errors
pass through to where all refusals get their one shape. Who may read a page is decided before it gets here.
"""

from __future__ import annotations

from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import Receive, Scope, Send

from engine.service.feed import Feed

HEADERS = {
    "cache-control": "no-store",
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
EVENT_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
]


class Watching(Response):
    """A response that is a place in the feed for as long as the client stays."""

    def __init__(self, feed: Feed) -> None:
        super().__init__()
        self._feed = feed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As every response of Starlette's."""
        start = {"type": "http.response.start", "status": 200, "headers": list(EVENT_HEADERS)}
        await self._feed.serve(receive, send, start)  # type: ignore[arg-type]


def pages(feed: Feed, document: bytes) -> Router:
    """``document``: the OpenAPI one, as JSON."""
    html = Path(__file__).with_name("status.html").read_bytes()

    async def status(request: Request) -> Response:
        return Response(html, media_type="text/html", headers=HEADERS)

    async def events(request: Request) -> Response:
        return Watching(feed)

    async def openapi(request: Request) -> Response:
        return Response(document, media_type="application/json")

    routes = [Route("/", status), Route("/status/events", events), Route("/openapi.json", openapi)]
    return Router(routes, redirect_slashes=False)

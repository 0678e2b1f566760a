"""One HTTP request as it comes in, and the one response to it: body within its limits, headers, errors in one shape."""

from __future__ import annotations

import asyncio
import re
import uuid
from typing import Any

from engine.config import IngressConfig
from engine.errors import RequestError
from engine.service.admin import TAGS_HEADER, tags_of
from engine.service.metrics import is_local
from engine.service.openai import ErrorFields, ErrorObject, encode_json, error_object
from engine.service.sse import Receive, Send, event
from engine.units import S_NS, ceil_div

LINGER_BYTES = 4 << 20  # of a refused body, let pass unread: many clients hear no answer before they have said all
REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
JSON = (b"content-type", b"application/json")


class Disconnected(Exception):
    """The client left while its body was read: there is nobody to answer."""


class Exchange:
    """One request as it comes in, and the one response to it."""

    def __init__(self, scope: dict[str, Any], receive: Receive, send: Send, arrived_ns: int) -> None:
        self.path: str = scope["path"]
        self.method: str = scope["method"]
        self.query: bytes = scope.get("query_string", b"")
        self.receive, self.send, self.arrived_ns = receive, send, arrived_ns
        self._headers: list[tuple[bytes, bytes]] = scope["headers"]
        self.is_local = is_local(scope.get("client"), self._headers)
        given = self.header(b"x-request-id")
        self.request_id = given.decode() if given and REQUEST_ID.fullmatch(given) else f"req-{uuid.uuid4().hex}"
        self.started = False
        self._all_read = self._too_slow = False

    def header(self, name: bytes) -> bytes | None:
        """A header's value; several are one list (RFC 9110, 5.3), so that two keys, or two classes, are none."""
        values = [value for key, value in self._headers if key == name]
        return b", ".join(values) if values else None

    def tags(self) -> tuple[str, ...]:
        """What its answer depends on, beside what its class says."""
        return tags_of(self.header(TAGS_HEADER.encode()))

    async def body(self, limits: IngressConfig) -> bytes:
        """All of it; RequestError before more than the limits allow is taken in, or waited for."""
        try:
            async with asyncio.timeout(limits.receipt_ms / 1000):
                return await self._body(limits.max_body_bytes)
        except TimeoutError:
            self._too_slow = True
            why = f"the body was not here within {limits.receipt_ms / 1000:g} s"
            raise RequestError("body_too_slow", why) from None

    async def _body(self, most_bytes: int) -> bytes:
        too_large = RequestError("body_too_large", f"the body is larger than {most_bytes} bytes")
        declared = self.header(b"content-length")
        if declared and declared.isdigit() and int(declared) > most_bytes:
            raise too_large
        body = bytearray()
        while True:
            message = await self.receive()
            if message["type"] == "http.disconnect":
                raise Disconnected
            body += message.get("body", b"")
            if len(body) > most_bytes:
                raise too_large
            if not message.get("more_body", False):
                self._all_read = True
                return bytes(body)

    async def start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        """Status line and headers."""
        headers.append((b"x-request-id", self.request_id.encode()))
        if self._rest_is_too_much():
            headers.append((b"connection", b"close"))
        self.started = True
        await self.send({"type": "http.response.start", "status": status, "headers": headers})

    def _rest_is_too_much(self) -> bool:
        """Whether the server should hang up rather than pass over the rest of the body to find the next request."""
        if self._all_read:
            return False
        if self._too_slow or self.header(b"transfer-encoding") or self.header(b"expect"):
            return True  # it may never end, or never come
        declared = self.header(b"content-length") or b"0"
        return not declared.isdigit() or int(declared) > LINGER_BYTES

    async def whole(
        self, status: int, data: bytes, headers: list[tuple[bytes, bytes]], kind: tuple[bytes, bytes] = JSON
    ) -> None:
        """A response of known length."""
        await self.start(status, [kind, (b"content-length", b"%d" % len(data)), *headers])
        await self.send({"type": "http.response.body", "body": data, "more_body": False})

    async def refuse(self, error: RequestError, retry_after_ns: int | None = None, *more: tuple[bytes, bytes]) -> None:
        """The error object, with Retry-After where waiting helps."""
        headers = list(more)
        if error.status in (429, 503):
            headers.append((b"retry-after", b"%d" % max(1, ceil_div(retry_after_ns or 0, S_NS))))
        if error.status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        await self.whole(error.status, encode_json(error_object(error)), headers)

    async def fail(self) -> None:
        """Our own fault: the client learns the request's id, the log the rest."""
        message = f"internal error; the server's log has the details under {self.request_id}"
        body = ErrorObject(ErrorFields(message, "server_error", None, "internal_error"))
        if self.started:
            await self.send({"type": "http.response.body", "body": event(body), "more_body": False})
        else:
            await self.whole(500, encode_json(body), [])

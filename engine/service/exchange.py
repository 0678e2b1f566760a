"""One HTTP request as it comes in, and the one response to it: body within its limits, headers, errors in one shape."""

from __future__ import annotations

import random
import re
from collections.abc import Awaitable, Callable
from typing import Any

from engine.errors import RequestError
from engine.service.admin import TAGS_HEADER, tags_of
from engine.service.metrics import is_local
from engine.service.openai import ErrorFields, ErrorObject, encode_json, error_object
from engine.service.sse import Receive, Send, event
from engine.units import MS_NS, S_NS, ceil_div

LINGER_BYTES = 4 << 20  # of a refused body, let pass unread: many clients hear no answer before they have said all
RETRY_COUNT = b"x-stainless-retry-count"  # of OpenAI's own client libraries
ATTEMPT = re.compile(rb"[0-9]|[1-9][0-9]|100")
REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
TAGS = TAGS_HEADER.encode()
App = Callable[[Any, Any, Any], Awaitable[None]]  # as ASGI has it
JSON = (b"content-type", b"application/json")


class Disconnected(Exception):
    """The client left while its body was read: there is nobody to answer."""


class Exchange:
    """One request as it comes in, and the one response to it."""

    def __init__(self, scope: dict[str, Any], receive: Receive, send: Send, arrived_ns: int) -> None:
        self.path: str = scope["path"]
        self.method: str = scope["method"]
        self.query: bytes = scope.get("query_string", b"")
        self._scope, self.receive, self.send, self.arrived_ns = scope, receive, send, arrived_ns
        self._fields: list[tuple[bytes, bytes]] = scope["headers"]
        self._values = dict(self._fields)
        if len(self._values) < len(self._fields):
            self._values = _listed(self._fields)
        self._client: tuple[str, int] | None = scope.get("client")
        given = self.header(b"x-request-id")
        own = given is None or not REQUEST_ID.fullmatch(given)
        self.request_id = f"req-{random.getrandbits(128):032x}" if own else given.decode()  # type: ignore[union-attr]
        self.started = False
        self._all_read = False

    @property
    def is_local(self) -> bool:
        """Whether it comes from this machine itself."""
        return is_local(self._client, self._fields)

    def header(self, name: bytes) -> bytes | None:
        """A header's value; several are one list (RFC 9110, 5.3), so that two keys, or two classes, are none."""
        return self._values.get(name)

    def tags(self) -> tuple[str, ...]:
        """What its answer depends on, beside what its class says."""
        said = self._values.get(TAGS)
        return tags_of(said) if said is not None else ()

    @property
    def attempt(self) -> int:
        """How often the client has tried before, by its own word; what is no number up to 100 is none."""
        said = self._values.get(RETRY_COUNT)
        return int(said) if said is not None and ATTEMPT.fullmatch(said) else 0

    async def body(self, most_bytes: int) -> bytes:
        """All of it; RequestError before more than that is taken in, or unpacked. How long it may take, ``protocol.py``
        knows.
        """
        coding = self.header(b"content-encoding")
        if coding is not None and coding.lower() != b"identity":  # a kilobyte can unpack to a gigabyte
            raise RequestError("unsupported_encoding", "the body must not be compressed", "content-encoding")
        declared = self.header(b"content-length")
        if declared and declared.isdigit() and int(declared) > most_bytes:
            raise _too_large(most_bytes)
        body = b""
        while True:
            message = await self.receive()
            if message["type"] == "http.disconnect":
                raise Disconnected
            body += message.get("body", b"")
            if len(body) > most_bytes:
                raise _too_large(most_bytes)
            if not message.get("more_body", False):
                self._all_read = True
                return body

    async def start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        """Status line and headers."""
        headers.append((b"x-request-id", self.request_id.encode()))
        if not self._all_read and self._rest_is_too_much():
            headers.append((b"connection", b"close"))
        self.started = True
        await self.send({"type": "http.response.start", "status": status, "headers": headers})

    def _rest_is_too_much(self) -> bool:
        """Whether the server should hang up rather than pass over the rest of the body to find the next request."""
        if self.header(b"transfer-encoding") or self.header(b"expect"):
            return True  # it may never end, or never come
        declared = self.header(b"content-length") or b"0"
        return not declared.isdigit() or int(declared) > LINGER_BYTES

    async def whole(
        self, status: int, data: bytes, headers: list[tuple[bytes, bytes]], kind: tuple[bytes, bytes] = JSON
    ) -> None:
        """A response of known length."""
        await self.start(status, [kind, (b"content-length", b"%d" % len(data)), *headers])
        await self.send({"type": "http.response.body", "body": data, "more_body": False})

    async def hand_on(self, app: App) -> None:
        """To another application, whose response goes out under this request's id."""

        async def send(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                return await self.start(message["status"], list(message["headers"]))
            return await self.send(message)

        await app(self._scope, self.receive, send)

    async def refuse(self, error: RequestError, retry_after_ns: int | None = None, *more: tuple[bytes, bytes]) -> None:
        """The error object, with Retry-After where waiting helps."""
        headers = list(more)
        if error.status in (429, 503):
            wait_ns = max(S_NS, retry_after_ns or 0)
            headers.append((b"retry-after", b"%d" % ceil_div(wait_ns, S_NS)))
            headers.append((b"retry-after-ms", b"%d" % ceil_div(wait_ns, MS_NS)))  # OpenAI's libraries look here first
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


def _listed(fields: list[tuple[bytes, bytes]]) -> dict[bytes, bytes]:
    values: dict[bytes, bytes] = {}
    for name, value in fields:
        values[name] = values[name] + b", " + value if name in values else value
    return values


def _too_large(most_bytes: int) -> RequestError:
    return RequestError("body_too_large", f"the body is larger than {most_bytes} bytes")

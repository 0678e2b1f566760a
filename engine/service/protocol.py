"""One client's connection: uvicorn's httptools protocol, and the checks that it lacks.

llhttp refuses most that is ambiguous (both lengths, folded and nameless headers, bare line ends). Added here: Host, the
head's size, a deadline for all of it, one for a client that reads nothing, how many connections and pipelined requests,
trailers that nobody sees. A refusal is written only where it can be no answer to something else; then the connection
is closed, so that nothing that follows what was refused is ever taken for a request. Sources: RFC 9112 (2.2, 3.2, 6,
9.3), RFC 6585 (431), the desync attacks of Linhart et al. (2005) and Kettle (2019).
"""

from __future__ import annotations

import asyncio
import os
import re
from http import HTTPStatus
from typing import Any
from urllib.parse import unquote

import httptools
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from engine.errors import RequestError
from engine.service.connections import FOREVER, Connections
from engine.service.cycle import Cycle
from engine.service.exchange import LINGER_BYTES
from engine.service.openai import encode_json, error_object
from engine.service.writing import TickWriter

HOST = re.compile(rb"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._~-]+)(:[0-9]{1,5})?")
LINGER_S = 2.0  # what a refused client still sends is let pass unread, or it would never read the refusal
FRAMING = 8  # bytes on the wire for one of a chunked body; one-byte chunks take six


class GuardedProtocol(HttpToolsProtocol):
    """Its ``deadline_s`` is the client's next one, ``stalled_s`` the end of patience with one that does not read."""

    def __init__(self, connections: Connections, **given: Any) -> None:
        super().__init__(**given)
        self._door, self._limits = connections, connections.limits
        self._max_header_bytes, self._max_headers = self._limits.max_header_bytes, self._limits.max_headers
        self._time_s = self.loop.time
        self.address = ""  # under which it is counted
        self.deadline_s = self.stalled_s = FOREVER
        self._active: RequestResponseCycle | None = None  # whose response is due; ``cycle`` is the newest
        self._in_head = self._in_message = self._deaf = False
        self._head_bytes = self._head_fields = self._fed_bytes = 0
        self._refusal: RequestError | None = None  # what a parser's callback has found

    # ------------------------------------------------------------ the connection

    def connection_made(self, transport: Any) -> None:
        """Room for it, or a short word."""
        transport = TickWriter(transport, self.loop)
        super().connection_made(transport)  # type: ignore[arg-type]
        self.deadline_s = self._in_s(self._limits.header_ms)
        try:
            self._door.enter(self, self.loop)
        except RequestError as error:
            self._door.refused(error.code)
            self._deaf = True
            transport.write(refusal_bytes(error))
            transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Whoever is being answered learns it, pipelined requests behind it or not."""
        self.pipeline.clear()
        if self._active is not None and not self._active.response_complete:
            self._active.disconnected = True
            self._active.message_event.set()
        self._door.leave(self)
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """The client does not read."""
        super().pause_writing()
        self.stalled_s = self._in_s(self._limits.write_stall_ms)

    def resume_writing(self) -> None:
        """It does."""
        super().resume_writing()
        self.stalled_s = FOREVER

    def overdue(self, now_s: float) -> None:
        """A deadline has passed."""
        if self.stalled_s <= now_s or self.transport.is_closing() or self._deaf:
            self.transport.abort()  # closing would wait for a client that takes nothing
        elif self._in_message and self.flow.read_paused:
            self.deadline_s = now_s + self._limits.header_ms / 1000  # it is us who do not listen
        elif self._in_head:
            within = f"{self._limits.header_ms / 1000:g} s"
            self._too_slow(RequestError("headers_too_slow", f"the request's head was not here within {within}"))
        elif self._in_message and not self.cycle.response_complete:
            within = f"{self._limits.receipt_ms / 1000:g} s"
            self._too_slow(RequestError("body_too_slow", f"the body was not here within {within}"))
        else:
            self._close()

    def _too_slow(self, error: RequestError) -> None:
        """What is not here in time is not answered; what was asked before it, and is being answered, is."""
        due = self._active
        if due is None or due.response_complete or (due is self.cycle and not self._in_head):
            return self._refuse(error)
        self._door.refused(error.code)
        if not self._in_head:  # the newest that waits is the one whose body is missing
            self.pipeline.popleft()
            self.cycle = self.pipeline[0][0] if self.pipeline else due
        self._hear_no_more()
        self._in_head = self._in_message = False
        self.deadline_s = FOREVER
        return None

    def _close(self) -> None:
        self.transport.close()
        self.deadline_s = self._in_s(self._limits.write_stall_ms)  # for what is still to be sent

    def _in_s(self, ms: int) -> float:
        return self._time_s() + ms / 1000

    # ------------------------------------------------------------ bytes

    def data_received(self, data: bytes) -> None:
        """To the parser, counted."""
        if self._deaf:
            self._fed_bytes += len(data)
            if self._fed_bytes > LINGER_BYTES:
                self.transport.abort()
            return
        if self._in_message:  # a message that begins in this chunk is counted from the next on
            self._fed_bytes += len(data)
        try:
            self.parser.feed_data(data)
            self._check_fed()
        except httptools.HttpParserUpgrade:
            self._hear_no_more()  # no other protocol is spoken here: the request is answered as what it is
        except httptools.HttpParserError:
            self._refuse(self._refusal or RequestError("invalid_request", "this is not HTTP/1.1 as it should be"))
        except RequestError as error:
            self._refuse(error)

    def _check_fed(self) -> None:
        """What the parser holds back, or passes over, has limits too: an endless field, an endless chunk extension."""
        if self._in_head and self._fed_bytes > self._limits.max_header_bytes + self._limits.max_url_bytes:
            raise self._head_too_large()
        if self._fed_bytes > FRAMING * self._limits.max_body_bytes + LINGER_BYTES:
            raise RequestError("body_too_large", f"the body is larger than {self._limits.max_body_bytes} bytes")

    def _hear_no_more(self) -> None:
        """The last request that was understood is the last one on this connection."""
        self._deaf, self._fed_bytes = True, 0
        if self.cycle is not None:
            self.cycle.keep_alive = False

    def _refuse(self, error: RequestError) -> None:
        """Say it and listen no more; without a word where it would stand in, or after, an answer."""
        self._door.refused(error.code)
        self._deaf, self._fed_bytes = True, 0
        cycle = self.cycle
        if cycle is not None and not (self._in_head and cycle.response_complete):
            own = self._in_message and not self._in_head  # it is this cycle's own body that is wrong
            if cycle.response_complete or not own or self.pipeline or cycle.response_started:
                self.transport.abort()
                return
            cycle.disconnected = True  # whoever waits for the body need not
            cycle.message_event.set()
        self.flow.resume_reading()
        self.transport.write(refusal_bytes(error))
        self.transport.write_eof()
        self.deadline_s = self.loop.time() + LINGER_S

    # ------------------------------------------------------------ what the parser finds

    def on_message_begin(self) -> None:
        """The first byte of a request line."""
        self.url, self.headers = b"", []
        self._in_head = self._in_message = True
        self._head_bytes = self._head_fields = self._fed_bytes = 0
        self.deadline_s = self._in_s(self._limits.header_ms)

    def on_url(self, url: bytes) -> None:
        """A piece of the target."""
        self.url += url
        if len(self.url) > self._limits.max_url_bytes:
            raise self._found("uri_too_long", f"the URL is longer than {self._limits.max_url_bytes} bytes")

    def on_header(self, name: bytes, value: bytes) -> None:
        """A field. Trailers, after a body, are counted and never seen: handlers read headers then, too."""
        self._head_bytes += len(name) + len(value) + 4
        self._head_fields += 1
        if self._head_bytes > self._max_header_bytes or self._head_fields > self._max_headers:
            raise self._head_too_large()
        if self._in_head:
            self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        """The head is whole: the application hears of it, if it is unambiguous."""
        self._in_head = False
        try:
            version, fields = self.parser.get_http_version(), dict(self.headers)
            self._check_head(version, fields)
            self._begin(version, fields.get(b"expect", b"").lower() == b"100-continue")
        except Exception:
            self._in_head = True  # no cycle is this message's
            raise
        self.deadline_s = self._in_s(self._limits.receipt_ms)

    def _begin(self, version: str, expects: bool) -> None:
        """As uvicorn's own, but for what is never asked for here: other protocols, its limit on tasks."""
        url, parser = httptools.parse_url(self.url), self.parser
        path = url.path.decode("ascii")
        scope: Any = {
            "type": "http", "asgi": {"version": self.asgi_version, "spec_version": "2.3"}, "http_version": version,
            "server": self.server, "client": self.client, "scheme": self.scheme, "root_path": "",
            "method": parser.get_method().decode("ascii"), "path": unquote(path) if "%" in path else path,
            "raw_path": url.path, "query_string": url.query or b"", "headers": self.headers, "state": {},
        }  # fmt: skip
        before = self.cycle
        self.cycle = cycle = Cycle(
            scope, self.transport, self.flow, self.logger, self.access_logger, self.access_log,
            self.server_state.default_headers, asyncio.Event(), expects,
            version != "1.0" and parser.should_keep_alive(), self.on_response_complete,
        )  # fmt: skip
        if before is None or before.response_complete:
            self._start_asgi_task(cycle, self.app)
        else:
            self.flow.pause_reading()
            self.pipeline.appendleft((cycle, self.app))

    def _check_head(self, version: str, fields: dict[bytes, bytes]) -> None:
        if version not in ("1.1", "1.0"):
            raise self._found("invalid_request", "only HTTP/1.1 and 1.0 are spoken here")
        host = fields.get(b"host")
        twice = len(fields) < len(self.headers) and sum(name == b"host" for name, _ in self.headers) > 1
        if twice or (host is None and version == "1.1"):
            raise self._found("invalid_request", "one Host header is wanted", "host")
        if host is not None:
            self._check_host(host)
        if version == "1.0" and b"transfer-encoding" in fields:
            raise self._found("invalid_request", "HTTP/1.0 has no Transfer-Encoding", "transfer-encoding")
        if not self.url.startswith(b"/") and self.url != b"*":
            self._check_host(httptools.parse_url(self.url).host or b"")  # RFC 9112, 3.2.2: it takes Host's place
        if len(self.pipeline) >= self._limits.max_pipelined:
            raise self._found("overloaded", f"more than {self._limits.max_pipelined} requests wait on this connection")

    def _check_host(self, value: bytes) -> None:
        host = HOST.fullmatch(value)
        if host is None:
            raise self._found("invalid_request", "the Host header is not a host with perhaps a port", "host")
        if self._door.hosts and host[1].decode().lower() not in self._door.hosts:
            raise self._found("invalid_request", "this server does not go by that Host", "host")

    def on_body(self, body: bytes) -> None:
        """A piece of the body; one of a request that has to wait is held to a little."""
        if self.pipeline and len(self.cycle.body) + len(body) > HIGH_WATER_LIMIT:
            raise self._found("overloaded", "too much was sent before the answer to what came before")
        if self.cycle is not None:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """Its last byte."""
        self._in_message = False
        if self.cycle is None or self.cycle.response_complete:
            self._idle()
        else:
            self.deadline_s = FOREVER
            super().on_message_complete()

    def _found(self, code: str, message: str, param: str | None = None) -> RequestError:
        self._refusal = RequestError(code, message, param)  # the parser wraps what a callback raises
        return self._refusal

    def _head_too_large(self) -> RequestError:
        most = f"{self._limits.max_header_bytes} bytes or {self._limits.max_headers} fields"
        return self._found("headers_too_large", f"the request's headers are more than {most}")

    # ------------------------------------------------------------ responses

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._active = cycle
        super()._start_asgi_task(cycle, app)

    def on_response_complete(self) -> None:
        """The next, or a wait for one."""
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            self.deadline_s = self._in_s(self._limits.write_stall_ms)
            return
        self.flow.resume_reading()
        if self._in_message:  # perhaps it was us who did not listen; or it is a body that nobody reads
            self.deadline_s = self._in_s(self._limits.header_ms if self._in_head else self._limits.receipt_ms)
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
        elif not self._in_message:
            self._idle()

    def _idle(self) -> None:
        """Between two requests; nothing is kept of the last: 10,000 may be idle."""
        self.cycle = self._active = self.scope = self.headers = None  # type: ignore[assignment]
        self.deadline_s = self._in_s(self._limits.keep_alive_ms)


def refusal_bytes(error: RequestError) -> bytes:
    """A whole response in the shape of every other refusal, after which the connection is closed."""
    body = encode_json(error_object(error))
    retry = b"retry-after: 1\r\n" if error.status == 503 else b""
    return (
        b"HTTP/1.1 %d %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\nx-request-id: req-%s\r\n%s"
        b"connection: close\r\n\r\n%s"
    ) % (error.status, HTTPStatus(error.status).phrase.encode(), len(body), os.urandom(16).hex().encode(), retry, body)

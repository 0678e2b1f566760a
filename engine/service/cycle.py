"""One request and its response on a connection: uvicorn's, but that a response of one piece is one write.

ASGI has the server wait with the head until there is some body. So a whole answer is known to be whole before its first
byte is out, and then it takes no second write, no turn of the event loop, and one look at all its headers. Whatever is
not as plain as that (streams, HEAD, closing, headers that uvicorn would refuse) is uvicorn's to write.
"""

from __future__ import annotations

import string
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle

PLAIN_NAME = (string.ascii_lowercase + string.digits + "-").encode()
PLAIN_VALUE = bytes(range(0x20, 0x7F))


class Cycle(RequestResponseCycle):
    """Its head is held until the first piece of the body."""

    _held: Any = None  # the message that starts the response

    async def send(self, message: Any) -> None:
        """The application's next word."""
        if self._held is None and not self.response_started and message["type"] == "http.response.start":
            self._held = message
            return
        held, self._held = self._held, None
        if held is not None:
            data = self._whole(held, message)
            if data is not None:
                self.response_started = self.response_complete = True
                self.message_event.set()
                self.transport.write(data)
                self.on_response()
                return
            await super().send(held)
        await super().send(message)

    async def send_500_response(self) -> None:
        """For an application that has failed; what it had begun to say is dropped."""
        self._held = None
        await super().send_500_response()

    def _whole(self, start: Any, message: Any) -> bytes | None:
        """The response, where this is all of it and nothing about it is special."""
        if (
            message.get("more_body") or self.disconnected or self.flow.write_paused or not self.keep_alive
            or self.access_log or self.default_headers or self.scope["method"] == "HEAD"
        ):
            return None
        body: bytes = message.get("body", b"")
        lines, names, values = [STATUS_LINE[start["status"]]], [], []
        length = None
        for name, value in start["headers"]:
            if name == b"content-length":
                length = value
            elif name in (b"connection", b"transfer-encoding"):
                return None
            names.append(name)
            values.append(value)
            lines += name, b": ", value, b"\r\n"
        if b"".join(names).translate(None, PLAIN_NAME) or b"".join(values).translate(None, PLAIN_VALUE):
            return None
        if length != b"%d" % len(body):
            return None
        lines += b"\r\n", body
        return b"".join(lines)

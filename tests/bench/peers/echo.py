"""The floor under any ASGI server here: uvicorn, uvloop, httptools, and an application that sends back what it got.

Prints its port, serves until its stdin ends.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import uvicorn
import uvloop

JSON = (b"content-type", b"application/json")


async def echo(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """Raw ASGI: the whole body, and back."""
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    headers = [JSON, (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})


async def main() -> None:
    """Until nobody needs it any more."""
    config = uvicorn.Config(
        echo, port=0, http="httptools", ws="none", lifespan="off", log_level="warning", access_log=False,
        server_header=False, date_header=False,
    )
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    print(server.servers[0].sockets[0].getsockname()[1], flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    server.should_exit = True
    await serving


if __name__ == "__main__":
    uvloop.run(main())

"""Where clients come in: a port of one's own, or one that several processes share by ``SO_REUSEPORT``.

The kernel gives each connection to one of the sockets that listen there, by a hash of both ends' addresses. A socket
that is only bound gets none, but holds the port: so a process that dies leaves its place to the next.
"""

from __future__ import annotations

import socket

from engine.errors import UserError

SEND_BUFFER_BYTES = 64 * 1024  # in the kernel, for a client that does not read; by itself it would grow to 4 MiB
BACKLOG = 2048


def listen(host: str, port: int) -> socket.socket:
    """A listening socket, or a clear word on why not."""
    sock = _bound(host, port)
    sock.listen(BACKLOG)
    return sock


def reserve(host: str, port: int) -> socket.socket:
    """A socket that holds a port (0: a free one) for those who ``join`` it. Nobody else listens there."""
    with _bound(host, port) as alone:  # without SO_REUSEPORT: it finds out
        port = alone.getsockname()[1]
    return _bound(host, port, shared=True)


def join(host: str, port: int) -> socket.socket:
    """A socket of one's own on a reserved port. It gets connections from when it listens, which its server does."""
    return _bound(host, port, shared=True)


def _bound(host: str, port: int, shared: bool = False) -> socket.socket:
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)  # its connections inherit it
    try:
        if shared:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise UserError(
            f"cannot listen on {host} port {port}", why=error.strerror or str(error),
            fix="give another --port, or 0 for a free one",
        ) from None
    sock.setblocking(False)
    return sock

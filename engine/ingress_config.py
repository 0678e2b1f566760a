"""What can be set about the ingress: how much of a request is taken in, how long one waits for it, from how many."""

from __future__ import annotations

from engine.values import Positive, Section


class IngressConfig(Section):
    """What the ingress takes in before it says no. A client that is over a limit hears which one."""

    max_body_bytes: Positive = 64 * 1024  # tokenising it takes some 20 ms of the ingress; a context is far smaller
    max_in_flight: Positive = 10_000
    receipt_ms: Positive = 10_000  # for the whole body to come in; a phone on a bad line takes a second for a context
    max_url_bytes: Positive = 8 * 1024  # what RFC 9112, 3, asks servers to support; our own paths need 30
    max_header_bytes: Positive = 16 * 1024  # all fields of a request: what nginx and Node take; a browser sends 1 KiB
    max_headers: Positive = 100  # fields of a request; a browser behind two proxies sends 30
    header_ms: Positive = 10_000  # for all of a request's head, from the connection or the request's first byte
    keep_alive_ms: Positive = 75_000  # without a request; longer than usual proxies' 60 s: they should hang up first
    write_stall_ms: Positive = 20_000  # with more than 64 KiB not sent: a client that reads 3 KB/s is still served
    max_pipelined: Positive = 8  # requests that wait behind the one in progress; ours pipeline none
    max_connections: Positive = 12_000  # 10 KB each; cut to what the limit of open files leaves
    max_connections_per_address: Positive = 1_000  # phones share addresses. Loopback is not counted: it may be a proxy
    hosts: tuple[str, ...] = ()  # names that a Host header may have, without port; () = any

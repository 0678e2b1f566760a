"""All connections of one ingress: how many, from where, and who is late.

One coarse timer looks at all connections instead of one timer for each: to set a deadline is to set an attribute. What
is late is seen up to a tenth of the shortest deadline later, at most a second; of many who are late at once a few are
dealt with at a time.
"""

from __future__ import annotations

import asyncio
import ipaddress
import resource
from collections import Counter, deque
from collections.abc import Callable, Iterator
from typing import Protocol

from engine.errors import RequestError
from engine.ingress_config import IngressConfig

SPARE_FILES = 256  # open files that are no client's: journals, replicas, Python's own
FOREVER = float("inf")
MOST_PERIOD_S = 1.0
AT_ONCE, PAUSE_S = 20, 0.002  # thousands may be late at one moment; everybody else would wait for the last of them


class Connection(Protocol):
    """What must be known of one."""

    client: tuple[str, int] | None
    address: str  # under which it is counted; "" = not counted
    deadline_s: float
    stalled_s: float

    def overdue(self, now_s: float) -> None:
        """One of the two has passed."""
        ...


class Connections:
    """Counted by address. Times are of the event loop's clock, in seconds."""

    def __init__(self, limits: IngressConfig, refused: Callable[[str], None] = lambda code: None) -> None:
        """``refused``: told the code of each refusal that no application hears of."""
        self.limits, self.refused = limits, refused
        self.most = min(limits.max_connections, max(1, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - SPARE_FILES))
        self.by_address: Counter[str] = Counter()
        self.hosts = frozenset(host.lower() for host in limits.hosts)
        shortest_ms = min(limits.header_ms, limits.keep_alive_ms, limits.write_stall_ms)
        self._period_s = min(MOST_PERIOD_S, shortest_ms / 10_000)
        self._all: set[Connection] = set()
        self._late: deque[Connection] = deque()  # found by the last look
        self._timer: asyncio.TimerHandle | None = None

    def __iter__(self) -> Iterator[Connection]:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._all)

    def enter(self, connection: Connection, loop: asyncio.AbstractEventLoop) -> None:
        """Counts it; RequestError "overloaded" when there are too many already."""
        if len(self._all) >= self.most:
            raise RequestError("overloaded", f"there are {self.most} connections already")
        address = counted_address(connection.client)
        if address and self.by_address[address] >= self.limits.max_connections_per_address:
            raise RequestError("overloaded", "there are too many connections from this address")
        if address:
            self.by_address[address] += 1
        connection.address = address
        self._all.add(connection)
        if self._timer is None:
            self._timer = loop.call_later(self._period_s, self._look, loop)

    def leave(self, connection: Connection) -> None:
        """Over. One that never entered is no mistake."""
        if connection not in self._all:
            return
        self._all.discard(connection)
        if connection.address:
            self.by_address[connection.address] -= 1
            if not self.by_address[connection.address]:
                del self.by_address[connection.address]

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        now_s = loop.time()
        if not self._late:
            self._late.extend(c for c in self._all if c.deadline_s <= now_s or c.stalled_s <= now_s)
        for _ in range(min(AT_ONCE, len(self._late))):
            late = self._late.popleft()
            if late in self._all and min(late.deadline_s, late.stalled_s) <= now_s:
                late.overdue(now_s)
        if self._all or self._late:
            self._timer = loop.call_later(PAUSE_S if self._late else self._period_s, self._look, loop)


def allow_many_files() -> None:
    """As many open files as this process may have; shells start it with a fraction of that."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def counted_address(client: tuple[str, int] | None) -> str:
    """Under what a connection is counted: an IPv4 address, the /64 of an IPv6 one; "" = loopback, or none."""
    if client is None:
        return ""
    try:
        address = ipaddress.ip_address(client[0].partition("%")[0])
    except ValueError:
        return ""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            address = address.ipv4_mapped
        elif not address.is_loopback:
            return str(ipaddress.ip_network((address, 64), strict=False))
    return "" if address.is_loopback else str(address)

"""All upstreams of a gateway: the ``ReplicaLink`` of who has no replicas of its own.

They are numbered in the order of the scenario. Nobody starts or stops them: one that is lost is looked for until it is
back. A gateway starts with those that are there, and with one at least.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

from engine.config import Scenario, TenantConfig, lane_config
from engine.errors import UserError
from engine.events import Ended
from engine.model.wire import Output, Ready, ToReplica, Work
from engine.policy.lane import LaneStats
from engine.service.upstream import Upstream

RETRY_S = 0.2  # between two looks at one that is awaited


class UpstreamPool:
    """Made on the asyncio loop that it lives on. ``lost``, ``back``: of an upstream, by number."""

    def __init__(
        self, scenario: Scenario, tenants: dict[str, TenantConfig], clock_ns: Callable[[], int],
        hear: Callable[[Output], None], hear_text: Callable[[int, str], None],
        lost: Callable[[int, bool], None], back: Callable[[int], None], folder: Path | None = None,
        lane: str = "lane",
    ) -> None:
        """``folder``: journals of the lanes go below it, as ``lane``-0 and so on.

        UserError when a key is missing, or a URL is none.
        """
        self._hear = hear
        self._upstreams = [
            Upstream(
                name, config, lane_config(scenario, tenants, n), clock_ns, hear, hear_text,
                partial(lost, n, False), partial(back, n),
                str(folder / "journal" / f"{lane}-{n}.ndjson") if folder else "",
            )
            for n, (name, config) in enumerate(scenario.upstreams.items())
        ]
        self._watches: list[asyncio.Task[None]] = []

    @property
    def up(self) -> tuple[int, ...]:
        """Upstreams that are there."""
        return tuple(n for n, upstream in enumerate(self._upstreams) if upstream.up)

    async def start(self) -> Ready:
        """Wait for all of them, each as long as its configuration says; UserError when none comes."""
        await asyncio.gather(*map(self._await, self._upstreams))
        if not self.up:
            each = "; ".join(f"{one.name} ({one.config.root}): {one.why_not}" for one in self._upstreams)
            raise UserError(
                "no upstream answers", where="upstreams", why=each,
                fix="start one, or correct its url; each is asked for its health_path",
            )
        self._watches = [asyncio.create_task(upstream.watch()) for upstream in self._upstreams]
        known = "\n".join(f"{upstream.config.root} {upstream.model}" for upstream in self._upstreams)
        names = ", ".join(dict.fromkeys(upstream.model for upstream in self._upstreams if upstream.up))
        return Ready(names, hashlib.sha256(known.encode()).hexdigest(), "upstream", "", 0)

    def send(self, replica: int, message: ToReplica) -> None:
        """See ``driver.ReplicaLink``. What is submitted to one that is lost is lost too."""
        if (upstream := self._upstreams[replica]).up:
            upstream.send(message)
        elif isinstance(message, Work):
            asyncio.get_running_loop().call_soon(self._hear, Output([Ended(message.submit.sid, "lost")]))

    def stats(self) -> dict[str, LaneStats]:
        """Each one's lane, by name."""
        return {upstream.name: upstream.stats() for upstream in self._upstreams}

    def flush(self) -> None:
        """What was written of the lanes is with the kernel."""
        for upstream in self._upstreams:
            upstream.flush()

    async def stop(self) -> None:
        """Hang up on all of them. More than once is fine."""
        for watch in self._watches:
            watch.cancel()
        if self._watches:
            await asyncio.wait(self._watches)
        self._watches = []
        await asyncio.gather(*(upstream.close() for upstream in self._upstreams))

    async def _await(self, upstream: Upstream) -> None:
        loop = asyncio.get_running_loop()
        until = loop.time() + upstream.config.start_ms / 1000
        await upstream.look()
        while not upstream.up and loop.time() < until:
            await asyncio.sleep(RETRY_S)
            await upstream.look()

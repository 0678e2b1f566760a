"""Open-loop load on a live engine over HTTP: every request leaves at its instant, whatever became of the others.

A closed loop would wait for answers and so hide the queue. Latencies count from the *scheduled* instant; how late the
generator itself was is recorded beside them, and a run with a late generator says so. Streams, to see first tokens.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import httpx
import msgspec

from engine.errors import UserError
from engine.units import S_NS
from sim.twin.workload import Request

TIMEOUT_S = 60.0


class Seen(msgspec.Struct, frozen=True, gc=False):
    """What the client saw of one request; times from the scheduled instant."""

    request_id: str
    traffic_class: str
    intent: str
    scheduled_ns: int  # on the machine's monotonic clock
    lateness_ns: int
    status: int  # 0 = no answer at all
    ttft_ns: int | None = None
    e2e_ns: int | None = None
    tier: str | None = None
    level: int | None = None
    error_code: str | None = None
    output_tokens: int = 0
    cached_tokens: int = 0


async def play(
    url: str, keys: dict[str, str], requests: list[Request], on_done: Callable[[int], None] = lambda done: None
) -> list[Seen]:
    """Send ``requests`` at their instants; ``keys``: tenant to API key. Returns in the order of the requests."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=200)
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S, limits=limits, trust_env=False) as client:
        try:
            await client.get("/healthz")  # connection, parser and event loop are warm when the sale begins
        except httpx.HTTPError as error:
            why = f"{type(error).__name__}: {error}"
            raise UserError("nothing answered", url, why, "doorbuster serve, in another terminal") from None
        start_ns = time.monotonic_ns() + S_NS // 10
        tasks: list[asyncio.Task[Seen]] = []
        done = 0

        def count(_: asyncio.Task[Seen]) -> None:
            nonlocal done
            done += 1
            on_done(done)

        for request in requests:
            due_ns = start_ns + request.at_ns
            await asyncio.sleep(max(0, due_ns - time.monotonic_ns()) / S_NS)
            task = asyncio.create_task(_one(client, keys[request.tenant], request, due_ns))
            task.add_done_callback(count)
            tasks.append(task)
        return list(await asyncio.gather(*tasks))


async def _one(client: httpx.AsyncClient, key: str, request: Request, due_ns: int) -> Seen:
    headers = {
        "authorization": f"Bearer {key}",
        "x-request-id": request.request_id,
        "x-doorbuster-class": request.traffic_class,
    }
    body = {
        "model": "default",
        "messages": [{"role": "user", "content": request.text}],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    late_ns = time.monotonic_ns() - due_ns
    seen: dict[str, Any] = {
        "request_id": request.request_id, "traffic_class": request.traffic_class, "intent": request.intent,
        "scheduled_ns": due_ns, "lateness_ns": late_ns,
    }
    try:
        async with client.stream("POST", "/v1/chat/completions", json=body, headers=headers) as response:
            return await _read(response, due_ns, seen)
    except httpx.HTTPError as error:
        return Seen(**seen, status=0, error_code=type(error).__name__, e2e_ns=time.monotonic_ns() - due_ns)


async def _read(response: httpx.Response, due_ns: int, seen: dict[str, Any]) -> Seen:
    head = response.headers
    level = head.get("x-doorbuster-level")
    seen["status"], seen["tier"] = response.status_code, head.get("x-doorbuster-tier")
    seen["level"] = int(level) if level else None
    if response.status_code != 200:
        raw = await response.aread()
        try:
            code = msgspec.json.decode(raw)["error"]["code"]
        except (msgspec.DecodeError, KeyError, TypeError):
            code = f"http_{response.status_code}"
        return Seen(**seen, error_code=code, e2e_ns=time.monotonic_ns() - due_ns)
    ttft_ns: int | None = None
    failure: str | None = None
    usage: dict[str, Any] = {}
    async for line in response.aiter_lines():
        if not line.startswith("data: ") or line == "data: [DONE]":
            continue
        chunk = msgspec.json.decode(line[6:])
        if "error" in chunk:
            failure = chunk["error"]["code"]
        usage = chunk.get("usage") or usage
        choices = chunk.get("choices") or [{}]
        if ttft_ns is None and (choices[0].get("delta") or {}).get("content"):
            ttft_ns = time.monotonic_ns() - due_ns
    end_ns = time.monotonic_ns() - due_ns
    return Seen(
        **seen, ttft_ns=end_ns if ttft_ns is None else ttft_ns, e2e_ns=end_ns, error_code=failure,
        output_tokens=usage.get("completion_tokens", 0),
        cached_tokens=(usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0),
    )

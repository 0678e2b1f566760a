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
from engine.units import MS_NS, S_NS, format_ns
from sim.twin.workload import Request

TIMEOUT_S = 60.0
GARBLED = "garbled_answer"  # not what the API promises
CUT_OFF = "cut_off"  # a stream that ended without its last word
LATE_NS = 50 * MS_NS  # at p99; beyond it latencies say as much about the generator as about the engine


class Seen(msgspec.Struct, frozen=True, gc=False):
    """What the client saw of one request; times from the scheduled instant."""

    request_id: str
    traffic_class: str
    intent: str
    scheduled_ns: int  # on the machine's monotonic clock
    lateness_ns: int
    status: int  # 0 = no answer at all; a 200 with an error code is a stream that broke off
    ttft_ns: int | None = None
    e2e_ns: int | None = None
    tier: str | None = None
    level: int | None = None
    error_code: str | None = None
    output_tokens: int = 0
    cached_tokens: int = 0
    text: str = ""  # the answer


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


async def one_by_one(url: str, keys: dict[str, str], requests: list[Request]) -> list[Seen]:
    """The same by one user with nobody else there: each leaves when the one before is answered."""
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S, trust_env=False) as client:
        return [await _one(client, keys[r.tenant], r, time.monotonic_ns()) for r in requests]


def late_warning(seen: list[Seen]) -> str:
    """One line if the generator itself was late; "" if it was on time."""
    late_ns = sorted(s.lateness_ns for s in seen)
    p99_ns = late_ns[min(len(late_ns) - 1, round(0.99 * len(late_ns)))] if late_ns else 0
    if p99_ns <= LATE_NS:
        return ""
    late = f"{format_ns(p99_ns)} at p99 (more than {format_ns(LATE_NS)})"
    return (f"warning: the load generator was late itself, {late}: "
            "latencies count from the scheduled instant and hold that too; give it a core of its own, or a lower rate")


async def _one(client: httpx.AsyncClient, key: str, request: Request, due_ns: int) -> Seen:
    headers = {
        "authorization": f"Bearer {key}",
        "x-request-id": request.request_id,
        "x-doorbuster-class": request.traffic_class,
    }
    body = {
        "model": "default",
        "messages": request.messages(),
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
        why = type(error).__name__
    except (msgspec.DecodeError, LookupError, TypeError, ValueError, AttributeError):
        why = GARBLED
    seen.setdefault("status", 0)  # a break after the headers keeps the status that they brought
    return Seen(**seen, error_code=why, e2e_ns=time.monotonic_ns() - due_ns)


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
    text: list[str] = []
    whole = False
    async for line in response.aiter_lines():
        if not line.startswith("data: ") or line == "data: [DONE]":
            whole = whole or line == "data: [DONE]"
            continue
        chunk = msgspec.json.decode(line[6:])
        if "error" in chunk:
            failure = chunk["error"]["code"]
        usage = chunk.get("usage") or usage
        choices = chunk.get("choices") or [{}]
        if content := (choices[0].get("delta") or {}).get("content"):
            ttft_ns = time.monotonic_ns() - due_ns if ttft_ns is None else ttft_ns
            text.append(content)
    if not whole and failure is None:
        failure = CUT_OFF
    end_ns = time.monotonic_ns() - due_ns
    return Seen(
        **seen, ttft_ns=end_ns if ttft_ns is None else ttft_ns, e2e_ns=end_ns, error_code=failure,
        output_tokens=usage.get("completion_tokens", 0),
        cached_tokens=(usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0), text="".join(text),
    )

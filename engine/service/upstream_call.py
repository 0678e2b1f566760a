"""One request to an upstream over HTTP, from its body to how it ended. Cancelling it closes the connection.

A connection that is closed is what every server takes for "stop computing". What goes wrong is told apart by whose
fault it is: the upstream's (5xx, silence, garbage, a wrong key or model: whoever asks will fail), nobody's (429, 503:
too much at the moment), or the request's own (any other 4xx). Method: https://platform.openai.com/docs/guides/error-codes
"""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import os
import time
from collections.abc import AsyncIterator, Callable
from typing import NamedTuple

import httpx

from engine.errors import UserError
from engine.lane_events import Done, DoneReason
from engine.model.wire import Work
from engine.service.eventstream import EventStream
from engine.service.upstream_words import Answer, Broken, decode_models, request_of
from engine.units import s_to_ns
from engine.upstream_config import UpstreamConfig

BUSY = (429, 503)
MISSING = (401, 403, 404, 405, 407)  # it does not know us, or not this model: no request of ours will fare better
KEEP_S = 4.0  # an idle connection; servers close theirs after 5 s and more, and a request must not meet that
LAST_BYTES_S = 0.1
ERROR_BYTES = 4096


def client_of(config: UpstreamConfig, name: str) -> httpx.AsyncClient:
    """A pool of connections to it. UserError when its key is not in the environment."""
    headers = {"content-type": "application/json", "accept-encoding": "identity", "user-agent": "doorbuster"}
    if config.api_key_env:
        key = os.environ.get(config.api_key_env, "")
        if not key:
            raise UserError(
                f"upstream {name} has no key", where=f"upstreams.{name}.api_key_env",
                why=f"the environment variable {config.api_key_env} is not set",
                fix=f"export {config.api_key_env}=...; or leave api_key_env out if it needs none",
            )
        headers["authorization"] = f"Bearer {key}"
    silence_s, connect_s = config.silence_ms / 1000, config.connect_ms / 1000
    try:
        return httpx.AsyncClient(
            base_url=config.root, headers=headers, trust_env=False,
            timeout=httpx.Timeout(silence_s, connect=connect_s),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=config.window, keepalive_expiry=KEEP_S),
        )
    except httpx.InvalidURL as error:
        raise UserError(f"upstream {name} has no usable URL", where=f"upstreams.{name}.url", why=str(error)) from None


class Called(NamedTuple):
    """How a request ended, in words what was wrong ("" = nothing), and whether there was anybody at all."""

    done: Done
    why: str = ""
    reached: bool = True


CLOSED = (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError)


class _Stale(Exception):
    """A kept connection was closed as we wrote to it: the server has not failed, and never saw the request."""


async def call(client: httpx.AsyncClient, work: Work, model: str, hear: Callable[[str], None]) -> Called:
    """``hear`` gets each piece of text. Over a kept connection that is closed meanwhile it is sent again, on a new one
    in the end (RFC 9112, 9.3.1 leaves that to us: what is computed twice does no harm)."""
    while True:
        with contextlib.suppress(_Stale):
            return await _call(client, work, model, hear)


async def _call(client: httpx.AsyncClient, work: Work, model: str, hear: Callable[[str], None]) -> Called:
    path, body = request_of(work, model)
    sid, heard, answered, fresh = work.submit.sid, False, False, False

    async def trace(event: str, _: object) -> None:
        nonlocal fresh
        fresh = fresh or event.startswith("connection.connect_tcp")

    try:
        async with client.stream("POST", f"/v1{path}", content=body, extensions={"trace": trace}) as response:
            answered = True
            if response.status_code != 200:
                return await _refused(sid, response)
            answer, events, raws = Answer(), EventStream(), response.aiter_raw()
            async for raw in raws:
                for data in events.feed(raw):
                    if text := answer.take(data):
                        heard = True
                        hear(text)
                if answer.done:
                    break
            end = answer.end()
            await _let_end(raws)
            return Called(Done(sid, end.reason, end.output_tokens, end.cached_tokens))
    except (httpx.HTTPError, Broken, ValueError) as error:
        if not answered and not fresh and isinstance(error, CLOSED):
            raise _Stale from error
        reached = not isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)
        return Called(Done(sid, "failed" if heard else "lost"), f"{type(error).__name__}: {error}", reached)


async def _let_end(raws: AsyncIterator[bytes]) -> None:
    """What follows the last event, so that the connection can be used again; not for long."""
    with contextlib.suppress(TimeoutError, httpx.HTTPError):
        async with asyncio.timeout(LAST_BYTES_S):
            async for _ in raws:
                pass


async def _refused(sid: int, response: httpx.Response) -> Called:
    status, said = response.status_code, b""
    async for raw in response.aiter_raw():
        said += raw
        if len(said) > ERROR_BYTES:
            break
    why = f"{status}: {said[:200].decode(errors='replace')}"
    if status in BUSY:
        pause_ns = retry_after_ns(response.headers.get("retry-after"), time.time())
        return Called(Done(sid, "busy", retry_after_ns=pause_ns), why)
    reason: DoneReason = "refused" if 400 <= status < 500 and status not in MISSING else "lost"
    return Called(Done(sid, reason), why)


def retry_after_ns(header: str | None, now_s: float) -> int:
    """Seconds, or a date (RFC 9110, 10.2.3); 0 = nothing sensible was said. ``now_s``: of the wall clock."""
    if header is None:
        return 0
    if header.strip().isdecimal():
        return s_to_ns(min(int(header), 3600))
    try:
        moment_s = email.utils.parsedate_to_datetime(header).timestamp()
    except ValueError:
        return 0
    return max(0, s_to_ns(min(moment_s - now_s, 3600)))


async def look(client: httpx.AsyncClient, config: UpstreamConfig) -> str | None:
    """Is it there? None, or why not."""
    try:
        got = await client.get(config.health_path, timeout=config.health_ms / 1000)
    except httpx.HTTPError as error:
        return f"{type(error).__name__}: {error}"
    return None if got.is_success else f"{config.health_path} says {got.status_code}"


async def first_model(client: httpx.AsyncClient, config: UpstreamConfig) -> str:
    """What it calls its model; Broken when it does not say."""
    try:
        got = await client.get("/v1/models", timeout=config.health_ms / 1000)
        names = decode_models(got.content).data if got.is_success else []
    except (httpx.HTTPError, ValueError) as error:
        raise Broken(f"/v1/models: {type(error).__name__}: {error}") from None
    if not names:
        raise Broken(f"/v1/models says {got.status_code} and names no model")
    return names[0].id

"""The HTTP face as a raw ASGI application: routes, limits, headers, and one shape for every refusal.

A request passes in this order: path, method, key, room, class, body, meaning; what fails early costs nothing later, and
the machine hears only of requests that passed all. Knows nothing of sockets (any ASGI server will do), of policies or
of models.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.routing import Router

from engine.config import Scenario
from engine.errors import RequestError
from engine.events import Answer, Charged, Reject
from engine.service.admin import check_admin, flush, look, needs_no_key
from engine.service.auth import KeyRing
from engine.service.completions import (
    TextWording,
    decode_completion,
    decode_embedding,
    embedding_list,
    vectors_of,
)
from engine.service.driver import Encoder, GatewayDriver
from engine.service.exchange import Disconnected, Exchange
from engine.service.facts import FactMaker, question_of
from engine.service.feed import Feed
from engine.service.memo import Asked, Memo
from engine.service.metrics import CONTENT_TYPE, Metrics
from engine.service.openai import (
    DEFAULT_MODEL,
    ModelCard,
    ModelList,
    Sampled,
    decode_chat,
    encode_json,
)
from engine.service.openapi import document
from engine.service.pages import pages
from engine.service.sse import Listener, Receive, Send, Wording, send_stream
from engine.service.status import StatusMaker
from engine.service.stream import joined
from engine.units import S_NS

log = logging.getLogger(__name__)

EVENT_STREAM = (b"content-type", b"text/event-stream; charset=utf-8")
UNBUFFERED = ((b"cache-control", b"no-store"), (b"x-accel-buffering", b"no"))  # proxies: pass each event on at once
CACHE_TIERS = ("exact", "semantic", "approximate")
ENCODER_MODEL = "minilm"
FAKE_MODEL = "fake"
ENCODE_WITHIN_S = 10.0  # all texts of one request

WHY = {
    "rate_limited": "the rate limit of this API key, of its user or of the traffic class is used up",
    "overloaded": "too much is going on for this traffic class to be served now",
    "breaker_open": "the model does not answer at the moment",
    "replica_lost": "the model's process has died and is being started anew",
    "upstream_busy": "the servers behind this one take no more at the moment",
    "draining": "this server is shutting down",
    "deadline_exceeded": "there was no answer within the time that this traffic class allows",
    "model_failed": "the model failed at this request",
}  # what a client reads for a code of the machine's


class App:
    """``__call__`` is the ASGI application. Whoever runs it sets ``draining``, for readiness."""

    def __init__(
        self,
        driver: GatewayDriver,
        keyring: KeyRing,
        facts: FactMaker,
        scenario: Scenario,
        model_name: str,
        metrics: Metrics | None = None,
        encoder: Encoder | None = None,
    ) -> None:
        """``metrics``: told elsewhere of records and pressure, here of what never reaches the gateway."""
        self.draining = False
        self._driver, self._keyring, self._facts, self._model = driver, keyring, facts, model_name
        self.metrics, self.encoder = metrics, encoder
        self._classes, self._limits = scenario.classes, scenario.ingress
        self._upstreams = bool(scenario.upstreams)
        self._memo = Memo()
        self._rooms = _Room()
        self._created = int(time.time())
        self.status: StatusMaker | None = None
        self._pages = None if metrics is None else self._make_pages(scenario, metrics)
        self._routes: dict[str, tuple[tuple[str, ...], Callable[[Exchange], Awaitable[None]]]] = {
            "/v1/chat/completions": (("POST",), self._chat),
            "/v1/completions": (("POST",), self._complete),
            "/v1/embeddings": (("POST",), self._embed),
            "/v1/models": (("GET", "HEAD"), self._models),
            "/healthz": (("GET", "HEAD"), self._alive),
            "/readyz": (("GET", "HEAD"), self._ready),
            "/metrics": (("GET", "HEAD"), self._measure),
            "/admin/cache": (("GET", "HEAD", "POST"), self._cache),
            "/": (("GET", "HEAD"), self._page),
            "/status/events": (("GET",), self._page),
            "/openapi.json": (("GET", "HEAD"), self._describe),
        }

    @property
    def routes(self) -> dict[str, tuple[str, ...]]:
        """Paths to methods."""
        return {path: methods for path, (methods, _) in self._routes.items()}

    @property
    def in_flight(self) -> int:
        """Requests with a good key whose response is not over: reading, waiting or being sent."""
        return self._rooms.taken

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            raise RuntimeError(f"only HTTP is served here, not {scope['type']}")
        exchange = Exchange(scope, receive, send, self._driver.now_ns())
        try:
            await self._route(exchange)
        except RequestError as error:
            self._count(error)
            await exchange.refuse(error)
        except Disconnected:
            return
        except Exception:
            log.exception("request %s failed", exchange.request_id)
            await exchange.fail()

    async def _route(self, exchange: Exchange) -> None:
        if exchange.path not in self._routes:
            raise RequestError("not_found", f"no such path; there are: {', '.join(self._routes)}")
        methods, handler = self._routes[exchange.path]
        if exchange.method not in methods:
            allow = ", ".join(methods)
            error = RequestError("method_not_allowed", f"this path takes {allow}")
            self._count(error)
            return await exchange.refuse(error, None, (b"allow", allow.encode()))
        return await handler(exchange)

    def _count(self, error: RequestError) -> None:
        """A refusal of which no machine hears."""
        if self.metrics is not None:
            self.metrics.refused(error.code)

    # ------------------------------------------------------------ small answers

    async def _alive(self, exchange: Exchange) -> None:
        await exchange.whole(200, b'{"status":"alive"}', [])

    async def _ready(self, exchange: Exchange) -> None:
        if not self._driver.machine.fleet.stats().up:
            raise RequestError("replica_lost", WHY["replica_lost"])
        if self.draining:
            raise RequestError("draining", WHY["draining"])
        await exchange.whole(200, b'{"status":"ready"}', [])

    async def _models(self, exchange: Exchange) -> None:
        self._keyring.authenticate(exchange.header(b"authorization"))
        names = dict.fromkeys((self._model, DEFAULT_MODEL, *((ENCODER_MODEL,) if self.encoder else ())))
        cards = tuple(ModelCard(name, self._created) for name in names)
        await exchange.whole(200, encode_json(ModelList(cards)), [])

    async def _measure(self, exchange: Exchange) -> None:
        self._check_operator(exchange)
        if self.metrics is None:
            raise RequestError("not_found", "nothing is counted here")
        machine, now_ns = self._driver.machine, self._driver.now_ns()
        page = self.metrics.page(now_ns, machine.stats(), machine.fleet.pressures.oldest_ns())
        await exchange.whole(200, page, [], (b"content-type", CONTENT_TYPE))

    async def _page(self, exchange: Exchange) -> None:
        self._check_operator(exchange)
        await self._describe(exchange)

    async def _describe(self, exchange: Exchange) -> None:
        if self._pages is None:
            raise RequestError("not_found", "nothing is counted here")
        await exchange.hand_on(self._pages)

    def _make_pages(self, scenario: Scenario, metrics: Metrics) -> Router:
        maker = self.status = StatusMaker(scenario, self._model, self._driver, metrics, self.encoder is not None)
        feed = Feed(lambda: encode_json(maker.look(self.draining)), lambda: self.draining)
        return pages(feed, document(scenario.ingress, self._model != FAKE_MODEL and not self._upstreams))

    def _check_operator(self, exchange: Exchange) -> None:
        """This machine itself, without a key, or an admin's key: no tenant may read what the others do."""
        if not exchange.is_local:
            check_admin(self._keyring, self._keyring.authenticate(exchange.header(b"authorization")))

    def _check_admin(self, exchange: Exchange) -> None:
        """As for operators, but who shows a key is judged by it, and a write must be nobody's page's."""
        key, kind = exchange.header(b"authorization"), exchange.header(b"content-type")
        if key is None and exchange.is_local:
            if needs_no_key(True, exchange.method, kind, exchange.header(b"origin")):
                return
            why = "no API key: a write without one is taken from this machine only, as application/json, of no web page"
            raise RequestError("unauthorized", why)
        check_admin(self._keyring, self._keyring.authenticate(key))

    async def _cache(self, exchange: Exchange) -> None:
        """Needs no room: a changed price must get through a rush."""
        self._check_admin(exchange)
        if exchange.method == "POST":
            body = await exchange.body(self._limits.max_body_bytes)
            return await exchange.whole(200, flush(self._driver, self._keyring, body), [])
        return await exchange.whole(200, look(self._driver, exchange.query), [])

    # ------------------------------------------------------------ text and vectors

    async def _chat(self, exchange: Exchange) -> None:
        await self._text(exchange, self._read_chat, Wording)

    async def _complete(self, exchange: Exchange) -> None:
        await self._text(exchange, self._read_completion, TextWording)

    async def _text(
        self, exchange: Exchange, read: Callable[[Exchange, str, str, bytes], Asked], wording: type[Wording]
    ) -> None:
        tenant = self._keyring.authenticate(exchange.header(b"authorization"))
        with self._room():
            name = self._class_of(exchange, tenant)
            body = await exchange.body(self._limits.max_body_bytes)
            key = (exchange.path, tenant, name, exchange.tags(), body)
            known = self._memo.find(key)
            if known is None:
                asked = read(exchange, tenant, name, body)
                self._memo.keep(key, asked)
            else:
                rid = self._driver.next_rid()
                now = exchange.request_id, exchange.arrived_ns, exchange.attempt
                facts = self._facts.again(known.facts, rid, *now)
                asked = known._replace(facts=facts)
            await self._answer(exchange, asked, wording)

    def _read_chat(self, exchange: Exchange, tenant: str, name: str, body: bytes) -> Asked:
        ask = decode_chat(body)
        self._check(ask)
        conversation = ask.conversation()
        facts, prompt = self._facts.arrive(
            self._driver.next_rid(), exchange.request_id, tenant, name, conversation, ask.params(),
            ask.token_limit, exchange.arrived_ns, ask.user or ask.safety_identifier or "", exchange.tags(),
            exchange.attempt,
        )
        return Asked(ask, facts, prompt, question_of(conversation), self._facts.said(name, conversation))

    def _read_completion(self, exchange: Exchange, tenant: str, name: str, body: bytes) -> Asked:
        ask = decode_completion(body)
        self._check(ask)
        facts, prompt = self._facts.complete(
            self._driver.next_rid(), exchange.request_id, tenant, name, ask.text, ask.params(),
            ask.token_limit, exchange.arrived_ns, ask.user or "", exchange.tags(), exchange.attempt,
        )
        return Asked(ask, facts, prompt, "", self._facts.said(name, ask.text))

    def _check(self, ask: Sampled) -> None:
        """Whether the model that is served here can do what is asked."""
        check_model(ask.model, self._model, DEFAULT_MODEL)
        if ask.wants_logprobs is not None and self._model == FAKE_MODEL:
            why = "logprobs is not supported here: the fake model has no probabilities"
            raise RequestError("invalid_request", why, "logprobs")
        if ask.wants_logprobs is not None and self._upstreams:
            why = "logprobs is not supported here: other servers answer, in text"
            raise RequestError("invalid_request", why, "logprobs")

    async def _embed(self, exchange: Exchange) -> None:
        """Straight to the encoder: no class, no cache, no overload level. Its limits are those of every request, out of
        one account: tenant's, user's, everybody's."""
        tenant = self._keyring.authenticate(exchange.header(b"authorization"))
        with self._room():
            if self.draining:
                raise RequestError("draining", WHY["draining"])
            ask = decode_embedding(await exchange.body(self._limits.max_body_bytes))
            if self.encoder is None:
                raise RequestError("not_found", "no encoder runs here, so there are no embeddings", "model")
            check_model(ask.model, ENCODER_MODEL)
            tokens = sum(map(self._facts.count, ask.texts))
            charged = self._driver.charge(exchange.request_id, tenant, ask.user or "", tokens)
            if charged.code:
                error = refusal(charged)
                self._count(error)
                return await exchange.refuse(error, charged.retry_after_ns)
            texts = [(self._facts.text_key(tenant, text), text.strip()) for text in ask.texts]
            vectors = await vectors_of(self.encoder, texts, ENCODE_WITHIN_S)
            data = embedding_list(vectors, ask.encoding_format, ENCODER_MODEL, tokens)
            return await exchange.whole(200, data, [])

    def _room(self) -> _Room:
        """A place for one more request while it is read, waits and is sent."""
        if self._rooms.taken >= self._limits.max_in_flight:
            raise RequestError("overloaded", f"{self._rooms.taken} requests are being served already")
        return self._rooms

    def _class_of(self, exchange: Exchange, tenant: str) -> str:
        asked = exchange.header(b"x-doorbuster-class")
        return self._keyring.class_of(tenant, None if asked is None else asked.decode("latin-1"), self._classes)

    async def _answer(self, exchange: Exchange, asked: Asked, wording: type[Wording]) -> None:
        ask, facts = asked.ask, asked.facts
        stream = self._driver.arrive(facts, asked.prompt, ask.drawable(), asked.question, asked.said)
        level = self._driver.machine.overload.level  # a request keeps the level that it met
        words = wording(
            wording.prefix + exchange.request_id, int(time.time()), self._model, facts.prompt_tokens, ask.wants_usage
        )
        if isinstance(stream.end, Answer) and not ask.stream:  # out of a cache: all of it is there
            headers = [(b"x-doorbuster-tier", stream.tier.encode()), (b"x-doorbuster-level", b"%d" % level)]
            headers += provenance(stream.end)
            await exchange.whole(200, words.whole(stream.take(), stream), headers)
            return
        async with Listener(stream, exchange.receive, self._driver.cancel) as listener:
            piece = await listener.read()  # the status depends on whether there is any
            if not ask.stream:
                pieces = [piece]
                while piece and (piece := await listener.read()):
                    pieces.append(piece)
                piece = joined(pieces) if len(pieces) > 1 else pieces[0]
            if listener.gone:
                return
            if isinstance(stream.end, Reject):
                met = (b"x-doorbuster-level", b"%d" % stream.end.level)
                await exchange.refuse(refusal(stream.end), stream.end.retry_after_ns, met)
                return
            headers = [(b"x-doorbuster-tier", stream.tier.encode()), (b"x-doorbuster-level", b"%d" % level)]
            if isinstance(stream.end, Answer):
                headers += provenance(stream.end)
            if ask.stream:
                await exchange.start(200, [EVENT_STREAM, *UNBUFFERED, *headers])
                await send_stream(exchange.send, listener, piece, words, refusal)
            else:
                await exchange.whole(200, words.whole(piece, stream), headers)


class _Room:
    """Entered by each request with a good key, all at once."""

    taken = 0

    def __enter__(self) -> None:
        self.taken += 1

    def __exit__(self, *_: object) -> None:
        self.taken -= 1


def check_model(asked: str, *names: str) -> None:
    """RequestError "not_found" for any other name."""
    if asked not in names:
        raise RequestError("not_found", f"no such model here; ask for {' or '.join(dict.fromkeys(names))}", "model")


def refusal(end: Reject | Charged) -> RequestError:
    """A machine's code in words."""
    if end.code == "rate_limited" and end.retry_after_ns is None:
        return RequestError(end.code, "this request alone is more than this API key's burst: it can never pass")
    return RequestError(end.code, WHY.get(end.code, "the request was refused"))


def provenance(end: Answer) -> list[tuple[bytes, bytes]]:
    """Headers that say where an answer comes from that was computed for somebody else, or earlier."""
    headers: list[tuple[bytes, bytes]] = []
    if end.tier in CACHE_TIERS:
        headers.append((b"x-doorbuster-age-s", f"{end.age_ns / S_NS:.3f}".encode()))
    if end.source:
        headers.append((b"x-doorbuster-source", end.source.encode()))
    if end.cosine_millionths is not None:
        headers.append((b"x-doorbuster-cosine", f"{end.cosine_millionths / 1e6:.6f}".encode()))
    return headers

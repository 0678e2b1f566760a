"""Which operations there are, and how each can end: the part of ``openapi.py`` that a new route changes."""

from __future__ import annotations

from typing import Literal, NamedTuple

ANY = (
    "invalid_request", "headers_too_slow", "uri_too_long", "headers_too_large", "internal_error", "overloaded",
)  # can happen to whatever request, before anybody looks at it
KEY = ("unauthorized",)
OPERATOR = ("unauthorized", "forbidden")
BODY = ("body_too_slow", "body_too_large", "unsupported_encoding")
GATEWAY = (
    "forbidden", "not_found", "context_length_exceeded", "rate_limited", "model_failed", "breaker_open", "replica_lost",
    "upstream_busy", "draining", "deadline_exceeded",
)
ENCODER = ("not_found", "context_length_exceeded", "rate_limited", "breaker_open", "draining", "deadline_exceeded")
TEXT_HEADERS = ("x-request-id", "x-doorbuster-class", "x-doorbuster-tags", "x-stainless-retry-count")


class Operation(NamedTuple):
    """One path under one or two methods. ``body answer event``: names of schemas; ``codes``: of refusals."""

    path: str
    methods: tuple[str, ...]
    name: str
    summary: str
    codes: tuple[str, ...]
    open_to: Literal["keys", "operators", "all"] = "keys"
    body: str = ""
    answer: str = ""
    event: str = ""
    media: str = ""  # of an answer that is no JSON
    headers: tuple[str, ...] = ("x-request-id",)
    takes_limit: bool = False

    @property
    def is_text(self) -> bool:
        """Whether the gateway answers it, from whatever tier."""
        return "x-doorbuster-class" in self.headers


READ = ("GET", "HEAD")
OPERATIONS = (
    Operation(
        "/v1/chat/completions", ("POST",), "createChatCompletion", "Answer a conversation.",
        (*ANY, *KEY, *BODY, *GATEWAY), body="ChatRequest", answer="Completion", event="Chunk", headers=TEXT_HEADERS,
    ),
    Operation(
        "/v1/completions", ("POST",), "createCompletion", "Go on with a text.",
        (*ANY, *KEY, *BODY, *GATEWAY), body="CompletionRequest", answer="TextCompletion", event="TextCompletion",
        headers=TEXT_HEADERS,
    ),
    Operation(
        "/v1/embeddings", ("POST",), "createEmbedding", "Vectors of texts.",
        (*ANY, *KEY, *BODY, *ENCODER), body="EmbeddingRequest", answer="EmbeddingList",
    ),
    Operation("/v1/models", READ, "listModels", "Names to ask for.", (*ANY, *KEY), answer="ModelList"),
    Operation("/healthz", READ, "isAlive", "Whether the process answers.", ANY, open_to="all", answer="Health"),
    Operation(
        "/readyz", READ, "isReady", "Whether new work is taken.", (*ANY, "replica_lost", "draining"), open_to="all",
        answer="Health",
    ),
    Operation(
        "/metrics", READ, "readMetrics", "What happened, for Prometheus.", (*ANY, *OPERATOR, "not_found"),
        open_to="operators", media="text/plain",
    ),
    Operation(
        "/admin/cache", READ, "lookIntoCaches", "What the response caches hold.", (*ANY, *OPERATOR),
        open_to="operators", answer="CachePage", takes_limit=True,
    ),
    Operation(
        "/admin/cache", ("POST",), "flushCaches", "Call answers off.", (*ANY, *OPERATOR, *BODY), open_to="operators",
        body="Flush", answer="Left",
    ),
    Operation(
        "/", READ, "statusPage", "How it goes, for people: load, level, tiers, replicas, latencies.",
        (*ANY, *OPERATOR), open_to="operators", media="text/html",
    ),
    Operation(
        "/status/events", ("GET",), "statusEvents", "What the status page shows, once a second.",
        (*ANY, *OPERATOR), open_to="operators", event="Status",
    ),
    Operation("/openapi.json", READ, "describe", "This document.", ANY, open_to="all", media="application/json"),
)

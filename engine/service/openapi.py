"""``/openapi.json``: the HTTP face in OpenAPI 3.1's words, built from what decodes and encodes it.

Schemas come from the msgspec types themselves, with what their decoders check beyond the types added here; refusals
from ``errors.STATUS_OF_CODE``; limits from the configuration. What JSON Schema cannot say (a context's length, which
classes a key grants) stands in words. Nothing in it is particular to a deployment but its limits, so it needs no key.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.metadata import version
from typing import Any, TypeAlias

import msgspec

from engine.errors import STATUS_OF_CODE
from engine.ingress_config import IngressConfig
from engine.service import completions, openai
from engine.service.admin import MOST_SHOWN, MOST_TAGS, TAG, TAGS_HEADER, CachePage, Flush, Left
from engine.service.openapi_table import OPERATIONS, Operation
from engine.service.status import Health, Status

Json: TypeAlias = dict[str, Any]

REF = "#/components/schemas/{name}"
TYPES = (
    openai.ChatRequest, openai.Completion, openai.Chunk, openai.ModelList, openai.ErrorObject,
    completions.CompletionRequest, completions.TextCompletion, completions.EmbeddingRequest, completions.EmbeddingList,
    Flush, Left, CachePage, Health, Status,
)
NEEDS_STREAM: Json = {
    "if": {"required": ["stream_options"], "properties": {"stream_options": {"type": "object"}}},
    "then": {"required": ["stream"], "properties": {"stream": {"const": True}}},
}
NEEDS_LOGPROBS: Json = {
    "if": {"required": ["top_logprobs"], "properties": {"top_logprobs": {"type": "integer", "minimum": 1}}},
    "then": {"required": ["logprobs"], "properties": {"logprobs": {"const": True}}},
}
ONE_NAME: Json = {"not": {
    "required": ["max_tokens", "max_completion_tokens"],
    "properties": {name: {"type": "integer"} for name in ("max_tokens", "max_completion_tokens")},
}}  # both pass where they agree, which cannot be said here
SAID: Json = {"type": "string"}
ONE_FLUSH: list[Json] = [
    {"required": ["all"], "properties": {
        "all": {"const": True}, **{name: {"type": "null"} for name in ("tenant", "answer_id", "tag", "version")},
    }},
    *({"required": [name], "properties": {"all": {"const": False}, name: SAID, "version": {"type": "null"}}}
      for name in ("tenant", "answer_id")),
    {"required": ["tag"], "properties": {"all": {"const": False}, "tag": SAID}},
]
WORDS: dict[str, str] = {
    "x-request-id": "The request's id: the client's own, if it is 1 to 64 of A-Z a-z 0-9 . _ -, else a new one.",
    "retry-after": "Whole seconds after which it can succeed.",
    "www-authenticate": "Bearer",
    "x-doorbuster-level": "The overload level that the request met: 0 normal to 4 emergency.",
    "x-doorbuster-tier": "Who gave the answer: exact, coalesced, semantic, approximate, fallback or model.",
    "x-doorbuster-age-s": "Age of an answer out of a cache, in seconds.",
    "x-doorbuster-source": "Id of the request that computed the answer, where another did.",
    "x-doorbuster-cosine": "Similarity to the question that was answered, where it was not the same.",
}
LEVEL = "x-doorbuster-level"
ALWAYS = ("x-request-id", "x-doorbuster-tier", "x-doorbuster-level")
PROVENANCE = ("x-doorbuster-tier", "x-doorbuster-level", "x-doorbuster-age-s", "x-doorbuster-source",
              "x-doorbuster-cosine")


def document(limits: IngressConfig, has_logprobs: bool) -> bytes:
    """The whole document as JSON. ``has_logprobs``: whether the model that is served here tells them."""
    paths: dict[str, Json] = {}
    for operation in OPERATIONS:
        for method in operation.methods:
            paths.setdefault(operation.path, {})[method.lower()] = _operation(operation, method, limits)
    return openai.encode_json({
        "openapi": "3.1.0",
        "info": {
            "title": "doorbuster", "version": version("doorbuster"), "license": {"name": "Apache-2.0",
            "identifier": "Apache-2.0"},
            "description": "An OpenAI-compatible server that stays up in a rush. What is not honoured is refused by "
            f"name. A URL has at most {limits.max_url_bytes} bytes, headers have {limits.max_header_bytes} bytes in "
            f"{limits.max_headers} fields.",
        },
        "servers": [{"url": "/"}],
        "security": [{"key": []}],
        "paths": paths,
        "components": {
            "schemas": _schemas(has_logprobs),
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer",
                                        "description": "A key of the key file; it says who asks, and for what."}},
            "parameters": {name: {"name": name, "in": "header", **rest} for name, rest in _headers_in().items()},
        },
    })


def _operation(operation: Operation, method: str, limits: IngressConfig) -> Json:
    out: Json = {
        "operationId": operation.name if method != "HEAD" else f"{operation.name}Head",
        "summary": operation.summary,
        "responses": {"200": _good(operation, method)} | _refusals(operation, bodyless=method == "HEAD"),
    }
    if operation.open_to != "keys":
        out["security"] = [{}] if operation.open_to == "all" else [{"key": []}, {}]  # no key from this machine itself
    parameters: list[Json] = [{"$ref": f"#/components/parameters/{name}"} for name in operation.headers]
    if operation.takes_limit:
        parameters.append({
            "name": "limit", "in": "query", "description": "Entries to list, newest first.",
            "schema": {"type": "integer", "minimum": 0, "maximum": MOST_SHOWN, "default": 0},
        })
    out["parameters"] = parameters
    if operation.body:
        out["requestBody"] = {
            "required": True, "description": f"At most {limits.max_body_bytes} bytes, not compressed.",
            "content": {"application/json": {"schema": _ref(operation.body)}},
        }
    return out


def _good(operation: Operation, method: str) -> Json:
    out: Json = {"description": "Done.", "headers": _headers_out(("x-request-id",))}
    if operation.is_text:
        out["headers"] |= _headers_out(PROVENANCE)
    if method == "HEAD":
        return out
    content: Json = {}
    if operation.answer:
        content["application/json"] = {"schema": _ref(operation.answer)}
    if operation.event:
        out["description"] = (
            f"The answer. In an event stream each event's data is a {operation.event}"
            + (", the last one's is [DONE]; a refusal that comes late is an event with an error." if operation.body
               else ".")
        )
        data = {"type": "string", "contentMediaType": "application/json", "contentSchema": _ref(operation.event)}
        event = {"description": "One event.", "type": "object", "required": ["data"], "properties": {"data": data}}
        content["text/event-stream"] = {"schema": event}
    if operation.media:
        kind = "object" if operation.media == "application/json" else "string"
        content[operation.media] = {"schema": {"type": kind}}
    return out | {"content": content}


def _refusals(operation: Operation, bodyless: bool) -> Json:
    by_status: dict[int, list[str]] = {}
    for code in operation.codes:
        by_status.setdefault(STATUS_OF_CODE[code], []).append(code)
    out: Json = {}
    for status, those in sorted(by_status.items()):
        names: tuple[str, ...] = ("x-request-id",)
        names += ("retry-after",) if status in (429, 503) else ("www-authenticate",) if status == 401 else ()
        one = out[str(status)] = {"description": " or ".join(those), "headers": _headers_out(names)}
        if operation.is_text and status >= 429:  # the machine's own word, if it got that far
            one["headers"] |= {LEVEL: _headers_out([LEVEL])[LEVEL] | {"required": False}}
        if not bodyless:
            these: Json = {"properties": {"error": {"properties": {"code": {"enum": those}}}}}
            one["content"] = {"application/json": {"schema": {"allOf": [_ref("ErrorObject"), these]}}}
    return out


def _headers_out(names: Iterable[str]) -> Json:
    return {
        name: {"description": WORDS[name], "required": name in ALWAYS, "schema": {"type": "string"}} for name in names
    }


def _headers_in() -> dict[str, Json]:
    tag = rf"[ \t]*({TAG.pattern})?[ \t]*"
    return {
        "x-request-id": {"description": WORDS["x-request-id"], "schema": SAID},
        "x-doorbuster-class": {
            "description": "The traffic class, one that the key grants. Without it the key's first class.",
            "schema": SAID,
        },
        TAGS_HEADER: {
            "description": f"What the answer depends on, for flushes by tag: at most {MOST_TAGS}, between commas.",
            "schema": {"type": "string", "pattern": f"^{tag}(,{tag}){{0,{MOST_TAGS - 1}}}$"},
        },
        "x-stainless-retry-count": {
            "description": "How often the client has tried before, 0 to 100; anything else counts as 0.",
            "schema": SAID,
        },
    }


def _ref(name: str) -> Json:
    return {"$ref": REF.format(name=name)}


def _schemas(has_logprobs: bool) -> Json:
    _, schemas = msgspec.json.schema_components(TYPES, ref_template=REF)
    _tighten(schemas["ChatRequest"], openai.NEUTRAL, NEEDS_STREAM, NEEDS_LOGPROBS, ONE_NAME)
    _tighten(schemas["CompletionRequest"], completions.NEUTRAL, NEEDS_STREAM)
    _tighten(schemas["EmbeddingRequest"], {"dimensions": ()})
    _tighten(schemas["StreamOptions"], {"include_obfuscation": (False,)})
    if not has_logprobs:
        _tighten(schemas["ChatRequest"], {"logprobs": (False,), "top_logprobs": (0,)})
        _tighten(schemas["CompletionRequest"], {"logprobs": ()})
    schemas["Flush"]["anyOf"] = ONE_FLUSH
    return schemas


def _tighten(schema: Json, neutral: Mapping[str, tuple[object, ...]], *rules: Json) -> None:
    """What cannot be honoured passes only where it asks for nothing; and what fields say of each other."""
    for name, values in neutral.items():
        schema["properties"][name] = {"enum": [None, *values], "description": "Not supported: nothing else passes."}
    if rules:
        schema["allOf"] = list(rules)

"""``/openapi.json`` is valid, complete and true: against the router, and against a real engine by schemathesis.

Run: ``pytest tests/service/test_openapi.py`` (40 s). schemathesis sends what the document allows and what it forbids
(its examples, coverage and fuzzing phases, from one seed) and holds every answer against it: statuses, headers, content
types, schemas, whether what is valid is taken and what is not refused, whether a key is asked for. Deliberate breaks
that were caught: a method without a route; 0 for false; a status, or a rule of the decoder's, that is not in the
document; ``/v1/embeddings`` without a key.
"""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import schemathesis
from jsonschema import Draft202012Validator
from openapi_spec_validator import validate
from schemathesis.config import SchemathesisConfig
from schemathesis.engine import Status, events, from_schema

from engine.config import ModelConfig
from engine.errors import STATUS_OF_CODE, RequestError
from engine.ingress_config import IngressConfig
from engine.service.completions import decode_completion
from engine.service.openai import decode_chat
from engine.service.openapi import document as make_document
from engine.service.openapi_table import OPERATIONS
from engine.service.similar import Done
from tests.service.conftest import Starter
from tests.service.harness import Engine

MOST_S = 30
EXAMPLES = 8  # of the fuzzing phase, for each operation
SEED = 20261124
REFUSED = "negative_data_rejection"  # it does not know that 413 is a refusal too
TAKEN = "positive_data_acceptance"
INTEGRAL = "expected `int | null`, got `float`"  # 1.0 is an integer to JSON Schema; here it is not


@pytest.fixture(scope="module")
def document(engine: Engine) -> dict[str, Any]:
    with engine.http(None) as client:
        got = client.get("/openapi.json")
    assert got.status_code == 200 and got.headers["content-type"] == "application/json"
    return dict(got.json())


def test_it_is_openapi_3_1(document: dict[str, Any]) -> None:
    assert document["openapi"] == "3.1.0"
    validate(document)


def test_every_route_and_method_is_in_it_and_nothing_else(engine: Engine, document: dict[str, Any]) -> None:
    said = {path: {method.upper() for method in methods} for path, methods in document["paths"].items()}
    assert said == {path: set(methods) for path, methods in engine.inside.app.routes.items()}
    names = [operation["operationId"] for methods in document["paths"].values() for operation in methods.values()]
    assert len(set(names)) == len(names)


def test_every_code_of_a_refusal_is_somewhere_in_it(document: dict[str, Any]) -> None:
    said = {code for operation in OPERATIONS for code in operation.codes}
    assert said == set(STATUS_OF_CODE) - {"method_not_allowed"}, "that one is of a method that is not in it"
    answers = document["paths"]["/v1/chat/completions"]["post"]["responses"]
    assert answers.keys() >= {"200", "400", "401", "403", "404", "408", "413", "415", "429", "500", "503", "504"}


CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
TEXT = {"model": "m", "prompt": "hi"}


@pytest.mark.parametrize(
    "more",
    [{}, {"stream_options": {}}, {"stream": True, "stream_options": {}}, {"stream": False, "stream_options": None},
     {"stream": True, "stream_options": {"include_obfuscation": True}}, {"n": 1}, {"n": 2}, {"n": True}, {"n": None},
     {"presence_penalty": 0.0}, {"presence_penalty": 1}, {"logit_bias": {}}, {"logit_bias": {"5": 1}}, {"store": 0},
     {"response_format": {"type": "text"}}, {"response_format": {"type": "json_object"}}, {"max_tokens": 5},
     {"max_tokens": 5, "max_completion_tokens": 6}, {"max_tokens": None, "max_completion_tokens": 6},
     {"top_logprobs": 2}, {"top_logprobs": 0}, {"top_logprobs": 2, "logprobs": True}, {"logprobs": False}, {"echo": 0},
     {"echo": False}, {"suffix": ""}, {"suffix": "x"}, {"best_of": 2}, {"unknown": 1}, {"temperature": 2.5}],
    ids=str,
)
@pytest.mark.parametrize(
    ("kind", "base", "decode"), [("ChatRequest", CHAT, decode_chat), ("CompletionRequest", TEXT, decode_completion)],
    ids=["chat", "text"],
)
def test_document_and_decoder_agree_on_what_fields_say_of_each_other(
    kind: str, base: dict[str, Any], decode: Callable[[bytes], object], more: dict[str, Any]
) -> None:
    said = json.loads(make_document(IngressConfig(), has_logprobs=True))
    schema = {"$ref": f"#/components/schemas/{kind}", "components": said["components"]}
    body = {**base, **more}
    try:
        taken = bool(decode(json.dumps(body).encode()))
    except RequestError:
        taken = False
    assert Draft202012Validator(schema).is_valid(body) == taken


# ---------------------------------------------------------------- schemathesis


class OneVector:
    """An encoder that takes no time."""

    def encode(self, text_key: bytes, text: str, deadline_s: float, done: Done) -> None:
        done(np.full(384, 384**-0.5, np.float32), "ok")

    def cancel(self, call: object) -> None:
        pass


@pytest.fixture
def roomy(started: Starter) -> Engine:
    """Whose context is longer than any body: that limit is none of the document's. All texts have one vector."""
    engine = started(model=ModelConfig(name="fake", context_tokens=200_000))
    engine.inside.app.encoder = OneVector()
    return engine


def prepared(engine: Engine, document: dict[str, Any], key: str | None) -> Any:
    """The document as schemathesis has it. Where it says "a name", names that exist, or all that came were 404."""
    config = SchemathesisConfig.from_dict({
        "base-url": engine.url, "seed": SEED, "continue-on-failure": True, "workers": 1, "max-time": MOST_S,
        "headers": {"Authorization": f"Bearer {key}"} if key else {},
        "generation": {"max-examples": EXAMPLES, "database": "none"}, "request-timeout": 10,
        "parameters": {"header.x-doorbuster-class": "chat"}, "max-stream-events": 1,
        "phases": {"stateful": {"enabled": False}},
        "operations": [{"include-method": ["GET", "HEAD"], "generation": {"max-examples": 3}}],
    })
    document = copy.deepcopy(document)
    for kind, field, name in (
        ("EmbeddingRequest", "model", "minilm"), ("ChatRequest", "model", "default"),
        ("CompletionRequest", "model", "default"),
        ("Flush", "tenant", "shop"),
    ):
        optional = [] if field == "model" else [None]
        document["components"]["schemas"][kind]["properties"][field] = {"enum": [name, *optional]}
    return schemathesis.openapi.from_dict(document, config=config).exclude(path="/status/events")  # it never ends


def played(schema: Any) -> Iterator[tuple[events.ScenarioFinished, str, Any]]:
    """Each scenario, the id of each of its cases, and what was answered."""
    for event in from_schema(schema).execute():
        assert not isinstance(event, events.NonFatalError | events.FatalError), event
        if isinstance(event, events.ScenarioFinished):
            for case_id, interaction in event.recorder.interactions.items():
                yield event, case_id, interaction


def test_schemathesis_finds_nothing(roomy: Engine, document: dict[str, Any]) -> None:
    statuses: Counter[tuple[str, int]] = Counter()
    faults: list[str] = []
    for event, case_id, interaction in played(prepared(roomy, document, roomy.keys["office"])):
        case = event.recorder.cases[case_id].value
        where = f"{case.method} {case.path}"
        answer = interaction.response
        assert answer is not None, f"{where}: no answer"
        statuses[where, answer.status_code] += 1
        found = [
            f"{check.name}: {check.failure_info and check.failure_info.failure.message}"
            for check in event.recorder.checks.get(case_id, [])
            if check.status != Status.SUCCESS and not (check.name == TAKEN and INTEGRAL in answer.text)
            and not (check.name == REFUSED and answer.status_code == 413)
        ]
        if found or answer.status_code >= 500:
            faults.append(f"{where} {case.headers} {case.body!r}: {answer.status_code} {answer.text[:200]} {found}")
    print("schemathesis:", json.dumps({f"{where} {status}": n for (where, status), n in sorted(statuses.items())}))
    assert not faults, f"{len(faults)} faults: {faults[:5]}"
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/admin/cache"):
        assert statuses[f"POST {path}", 200] > 10 and statuses[f"POST {path}", 400] > 10, "both ways were gone"
        keyless = path == "/admin/cache"  # from this machine itself; what else it takes, test_admin.py asks
        assert bool(statuses[f"POST {path}", 401]) != keyless, "and without a key"
    roomy.quiet()

"""Nobody is answered from another's cache, nor told by what happens that there was one.

Run: python -m pytest tests/service/test_isolation.py -q
"""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from engine.cache_config import SemanticConfig
from engine.config import ClassConfig, GatewayConfig, ModelConfig, PrefixConfig, Scenario, TenantConfig
from engine.events import Arrive, Ended, FindSimilar, GatewayAction, Record, Similar, Submit
from engine.model.blockhash import Hasher
from engine.model.smalllm import small_tokenizer
from engine.model.stepping import SamplingParams
from engine.policy.gateway import Gateway
from engine.service.facts import FactMaker
from engine.units import MS_NS
from tests.service.harness import Engine, body

CHAT = "/v1/chat/completions"
SCENARIO = Scenario(
    name="isolation",
    classes={
        "qa": ClassConfig("standard", caches="semantic", max_tokens=8),
        "tips": ClassConfig("standard", caches="semantic", max_tokens=8),
    },
    model=ModelConfig(name="tiny", context_tokens=400), prefix=PrefixConfig(block_tokens=16),
)
QUESTION = [{"role": "user", "content": "is the kettle in stock"}]


def asked(model: str = "tiny", **changes: Any) -> Arrive:
    maker = FactMaker(small_tokenizer(), Hasher(b"k" * 16, 16), SCENARIO, model)
    ask: dict[str, Any] = {
        "rid": 0, "request_id": "r", "tenant": "shop", "traffic_class": "qa", "messages": QUESTION,
        "params": SamplingParams(), "max_tokens": None, "arrived_ns": 0,
    }
    return maker.arrive(**{**ask, **changes})[0]


@pytest.mark.parametrize(
    "other",
    [
        {"tenant": "bank"}, {"traffic_class": "tips"}, {"model": "tiny-2"}, {"max_tokens": 7},
        {"params": SamplingParams(temperature=0.7, seed=3)}, {"params": SamplingParams(stop=("!",))},
        {"messages": [{"role": "system", "content": "You are rude."}, *QUESTION]},
    ],
)
def test_who_asks_and_how_is_part_of_both_keys(other: dict[str, Any]) -> None:
    mine, theirs = asked(), asked(**other)
    assert mine.exact_key != theirs.exact_key and mine.hard_key != theirs.hard_key
    another = "tenant" in other
    assert (mine.text_key != theirs.text_key) == another, "what is asked is the same; a tenant's vectors are its own"


def test_two_tenants_compute_the_same_question_twice(engine: Engine) -> None:
    question, tiers = body("do two shops share this kettle?"), []
    for tenant in ("shop", "bank", "shop", "bank"):
        with engine.http(tenant, **{"x-doorbuster-class": "chat"}) as client:
            tiers.append(client.post(CHAT, json=question).headers["x-doorbuster-tier"])
    assert tiers == ["model", "model", "exact", "exact"]


@pytest.mark.parametrize("coalesce", [False, True])
@pytest.mark.parametrize("flies", [False, True])
def test_what_happens_to_me_does_not_tell_what_another_has_asked(coalesce: bool, flies: bool) -> None:
    """Not by text, and not by time: the machine does the very same for me, whatever another has in the caches."""
    config = GatewayConfig(
        classes=SCENARIO.classes, tenants={"shop": TenantConfig(), "bank": TenantConfig()},
        semantic=SemanticConfig(coalesce=coalesce),
    )
    alone, beside = Gateway(config), Gateway(config)
    tell(beside, msgspec.structs.replace(asked(), rid=1, request_id="theirs"))
    if not flies:
        beside.handle(5 * MS_NS, Ended(0, "stop", 5, 0, 3, answer_id="a1", answer_bytes=9))
    mine = msgspec.structs.replace(asked(tenant="bank"), request_id="mine")
    sid = 1
    first, second = tell(alone, mine), tell(beside, mine)
    assert plain(second, sid) == plain(first, 0) and any(isinstance(a, Submit) for a in first)
    for gateway, number in ((alone, 0), (beside, sid)):
        end = Ended(number, "stop", 5, 0, 3, answer_id="a2", answer_bytes=9)
        (first if number == 0 else second)[:] = gateway.handle(20 * MS_NS, end)
    assert plain(second, sid) == plain(first, 0)


def tell(gateway: Gateway, ask: Arrive) -> list[GatewayAction]:
    """It arrives, and nothing similar is found."""
    out = gateway.handle(10 * MS_NS, ask)
    for action in list(out):
        if isinstance(action, FindSimilar):
            out += gateway.handle(10 * MS_NS, Similar(ask.rid))
    return out


def plain(actions: list[GatewayAction], sid: int) -> list[GatewayAction]:
    """Without the number of the submission, and without rows that no client sees."""
    return [
        msgspec.structs.replace(action, sid=action.sid - sid) if hasattr(action, "sid") else action
        for action in actions
        if not isinstance(action, Record)
    ]

"""A hit that is computed anew while nobody waits, through the whole engine: real encoder, real process, real HTTP.

Run: python -m pytest tests/service/test_audits.py -q
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from engine.cache_config import SemanticConfig
from sim.twin.replay import replay
from tests.service import harness
from tests.service.harness import body, start

CHAT = "/v1/chat/completions"
CLASSES = {"chat": msgspec.structs.replace(harness.SCENARIO.classes["chat"], caches="semantic")}
OTHERS = {name: cls for name, cls in harness.SCENARIO.classes.items() if name != "chat"}


@pytest.mark.parametrize("identity", ["text", "meaning"])
def test_a_hit_is_audited_live(tmp_path: Path, identity: str) -> None:
    """The fake model repeats the question: by text two wordings never agree, by their vectors they do."""
    semantic = SemanticConfig(
        cosine=0.8, audit_share=1.0, identity=identity, same_answer_cosine=0.8, deadline_ms=5000, coalesce=True,
    )
    with start(tmp_path, classes={**CLASSES, **OTHERS}, semantic=semantic) as engine:
        with engine.http() as client:
            first = client.post(CHAT, json=body("is the slate grey kettle still in stock?"))
            engine.until(lambda: engine.inside.driver.machine.stats().in_flight == 0)
            near = client.post(CHAT, json=body("is the slate grey kettle in stock still?"))
        assert [got.headers["x-doorbuster-tier"] for got in (first, near)] == ["model", "semantic"]
        assert near.json()["choices"] == first.json()["choices"], "the very answer"
        engine.until(lambda: engine.inside.driver.machine.stats().semantic.rule.lessons == 1)
        stats = engine.stats()
        assert stats.jobs.done == 1 and stats.semantic.rule.wrong == (identity == "text")
        assert not engine.call(lambda: dict(engine.inside.driver._held)), "what was held for it is let go"
        with engine.http(None) as client:
            page = client.get("/metrics").text
    verdict = "wrong" if identity == "text" else "right"
    assert f'doorbuster:wrong_hit_audits_total{{tier="semantic",verdict="{verdict}"}} 1.0' in page
    assert replay(tmp_path / "journal" / "gateway-0.ndjson").identical

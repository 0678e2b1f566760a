"""The server on either loop: the choice, and a whole exchange with what is special about the door."""

from __future__ import annotations

import asyncio
import importlib.util
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine.service.auth import KeyRing
from engine.service.loop import LoopName, best_loop, run
from engine.service.server import ServeOptions, running
from tests.service.harness import CHAT, SCENARIO, body


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_either_loop_serves(tmp_path: Path, loop: LoopName) -> None:
    ring, key = KeyRing.single()

    async def scene() -> tuple[str, list[int], str]:
        async with running(SCENARIO, ring, ServeOptions(folder=tmp_path, pin_cores=False)) as engine:
            headers = {"authorization": f"Bearer {key}", "x-doorbuster-class": "chat"}
            async with httpx.AsyncClient(base_url=engine.url, headers=headers, timeout=20, trust_env=False) as client:
                whole = await client.post(CHAT, json=body("on either loop"))
                streamed = await client.post(CHAT, json=body("streamed on either loop", stream=True))
                flood = await client.get("/healthz", headers={"x-a": "a" * 20_000})
                big = await client.post(CHAT, content=b" " * 3_000_000)
                statuses = [got.status_code for got in (whole, streamed, flood, big)]
            said = whole.json()["choices"][0]["message"]["content"]
            assert streamed.text.endswith("data: [DONE]\n\n")
            return type(asyncio.get_running_loop()).__module__, statuses, said

    module, statuses, said = run(scene(), loop)
    assert module.startswith("uvloop") == (loop == "uvloop")
    assert statuses == [200, 200, 431, 413]
    assert said == "on either loop"


def test_asyncio_is_taken_where_there_is_no_uvloop(monkeypatch: pytest.MonkeyPatch) -> None:
    assert best_loop() == "uvloop"

    def nothing(name: str, *_: Any) -> None:
        assert name == "uvloop"

    monkeypatch.setattr(importlib.util, "find_spec", nothing)
    assert best_loop() == "asyncio"

    async def module() -> str:
        return type(asyncio.get_running_loop()).__module__

    assert run(module()).startswith("asyncio")

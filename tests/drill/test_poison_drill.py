"""Bad words among good neighbours on the real model: one request makes the forward raise, one gets logits of no number.

    make drill    (or: python -m pytest -m drill tests/drill/test_poison_drill.py)

Ten requests are in one batch; two of them are bad. Only these two fail; the other eight say to the letter what they
said without them, and the process lives on. ``faulty.py`` is the process; which steps raised is in its journal.

Mutations it caught: the whole batch fails; the culprit is put back for ever; a cleared row gets a token twice.
"""

from __future__ import annotations

import asyncio
import os
import sys
from asyncio.subprocess import Process
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

import httpx
import pytest

from engine.config import BatcherConfig, ExactConfig, ModelConfig, PrefixConfig
from engine.events import Ended, Plan, RunStep, StepFailed
from engine.ledger.journal import open_journal
from sim.twin.replay import replay
from tests.drill.conftest import Publish
from tests.drill.faulty import NAN, RAISES
from tests.drill.rest import at_rest
from tests.service.harness import CHAT, Engine, body, check_error, start

pytestmark = pytest.mark.drill

START_S = 300.0
CHANGES = {
    "model": ModelConfig(name="smollm2", context_tokens=512),
    "batcher": BatcherConfig(step_tokens=128, slots=16, reserved_slots=0, reserved_blocks=0),
    "prefix": PrefixConfig(blocks=512, pinned_blocks=16),
    "exact": ExactConfig(enabled=False),  # the second time is computed again
    "replica_restarts": 0,  # no standby, and no second life
}
GOOD = [f"In one sentence: what is the {thing} good for?" for thing in (
    "kettle", "lamp", "tent", "drill", "blender", "scooter", "heater", "camera",
)]
BAD = [f"Do you deliver to{RAISES} by Friday?", f"Do you deliver to{NAN} by Friday?"]


async def launch(module: str, threads: int) -> Process:
    """In place of ``replicas.launch``; the module's name stays in the command, by which the harness finds it."""
    env = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": str(max(1, threads))}
    command = (sys.executable, "-m", "tests.drill.faulty", module)
    return await asyncio.create_subprocess_exec(*command, stdin=asyncio.subprocess.PIPE, env=env)


def together(engine: Engine, texts: list[str]) -> list[httpx.Response]:
    """All of them in the replica's next batch."""
    with ThreadPoolExecutor(len(texts)) as pool, ExitStack() as stack:
        client = stack.enter_context(engine.http())
        with engine.frozen():
            told = [pool.submit(client.post, CHAT, json=body(text, max_tokens=24)) for text in texts]
            engine.waiting(len(texts))
        return [answer.result() for answer in told]


def said(answers: list[httpx.Response]) -> list[str]:
    assert {answer.status_code for answer in answers} == {200}
    return [answer.json()["choices"][0]["message"]["content"] for answer in answers]


def test_bad_words_fail_alone(tmp_path: Path, publish: Publish, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.service.replicas.launch", launch)
    with start(tmp_path, pin_cores=True, start_s=START_S, **CHANGES) as engine:
        alone = said(together(engine, GOOD))
        mixed = together(engine, [*GOOD[:4], BAD[0], *GOOD[4:], BAD[1]])
        after = said(together(engine, GOOD))
        engine.quiet()
        alive = engine.worker.is_running()
    bad = [mixed.pop(9), mixed.pop(4)]
    path = tmp_path / "journal" / "replica-0.ndjson"
    entries = list(open_journal(path).entries())
    raised = [entry for entry in entries if isinstance(entry.event, StepFailed)]
    rows = [
        sum((a.shape.prefill_rows, a.shape.decode_rows))
        for entry, then in pairwise(entries) if isinstance(entry.event, Plan)
        for a in entry.actions if isinstance(a, RunStep) and isinstance(then.event, StepFailed)
    ]
    failed = [a for entry in entries for a in entry.actions if isinstance(a, Ended) and a.reason == "failed"]
    publish(
        "poison",
        [{
            "requests": 10, "bad": 2, "failed": len(failed), "steps that raised": len(raised),
            "their rows": " ".join(map(str, rows)), "neighbours alike": said(mixed) == alone,
        }],
    )

    for answer in bad:
        check_error(answer, 500, "model_failed")
    assert said(mixed) == alone == after, "neighbours say the same, with bad words beside them and after them"
    assert len(failed) == 2 and alive
    assert 1 <= len(raised) <= 5 and rows[-1] == 1, "halved until it was alone: 10, 5, 3, 2, 1 at most"
    assert replay(path).identical
    assert at_rest(path), "blocks whole"

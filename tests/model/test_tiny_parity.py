"""The tiny model through the replica machine: whatever it batches, cuts, shares and preempts, its tokens are right."""

from __future__ import annotations

import random

import pytest
from transformers import PreTrainedModel

from engine.model.loader import LoadedModel
from tests.model.hand import prompt_of
from tests.model.through_replica import Request, config, differences, through_replica


def sale(seed: int, count: int = 40) -> list[Request]:
    """Prompts of three classes with a common opening each, arriving in bursts, some of them critical."""
    rng = random.Random(seed)
    openings = [prompt_of(1000 + i, length) for i, length in enumerate((32, 50, 64))]
    requests = []
    for i in range(count):
        opening = rng.choice(openings)
        prompt = opening + prompt_of(seed * 100 + i, rng.randint(1, 60))
        requests.append(Request(prompt, rng.randint(1, 30), priority=rng.choice((0, 1, 1, 2)), at_step=8 * (i // 8)))
    return requests


@pytest.mark.parametrize(
    ("seed", "shape"),
    [
        (1, config(blocks=80, slots=8, step_tokens=48)),
        (2, config(blocks=40, slots=12, step_tokens=64)),
        (3, config(blocks=40, slots=6, step_tokens=16)),
        (4, config(blocks=200, slots=16, step_tokens=512)),
    ],
)
def test_tokens_are_those_of_generate(tiny: LoadedModel, plain: PreTrainedModel, seed: int, shape) -> None:
    requests = sale(seed)
    run = through_replica(tiny, requests, shape)
    assert differences(plain, requests, run, eos=2) == []
    assert {e.reason for e in run.ended.values()} <= {"stop", "length"}
    for sid, ended in run.ended.items():
        assert ended.output_tokens == len(run.out.get(sid, [])), "machine and runner count alike"


def test_the_runs_above_do_all_that_can_go_wrong(tiny: LoadedModel) -> None:
    run = through_replica(tiny, sale(2), config(blocks=40, slots=12, step_tokens=64))
    assert run.most_decoding >= 6 and max(run.chunks.values()) >= 2 and run.most_steps > 1
    assert run.shared_in_step and run.preempted_mid_answer
    assert sum(e.cached_tokens for e in run.ended.values()) > 0

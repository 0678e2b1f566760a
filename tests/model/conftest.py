"""What the tests of the live model share: the tiny model, its transformers reference, and a hand that plans steps."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads would slow the tests beside these
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Callable
from functools import cache

import pytest
import torch
from transformers import PreTrainedModel

from engine.model.loader import LoadedModel, load, load_plain, prepare
from tests.model.hand import Hand, hand_on


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> str:
    """Where this run's models are: the CPU, or with ``--device cuda`` the GPU; without one its tests are skipped."""
    chosen: str = pytestconfig.getoption("--device")
    if chosen == "cuda" and not torch.cuda.is_available():
        pytest.skip("--device cuda: there is no CUDA device here, or this torch was built without CUDA")
    return chosen


@pytest.fixture(scope="session")
def tiny(device: str) -> LoadedModel:
    return load(prepare("tiny", lambda line: None), device, "float32")


@pytest.fixture(scope="session")
def plain() -> PreTrainedModel:
    return load_plain(prepare("tiny", lambda line: None))


@pytest.fixture
def hand(tiny: LoadedModel) -> Hand:
    return hand_on(tiny)


@pytest.fixture(scope="session")
def reference(plain: PreTrainedModel) -> Callable[[list[int], int], list[int]]:
    """Greedy output of transformers' own generate(), end token left out."""

    @cache
    def generate(prompt: tuple[int, ...], max_tokens: int) -> list[int]:
        out = plain.generate(torch.tensor([prompt]), max_new_tokens=max_tokens, do_sample=False)
        new: list[int] = out[0, len(prompt) :].tolist()
        return new[:-1] if new[-1] == 2 else new

    return lambda prompt, max_tokens: generate(tuple(prompt), max_tokens)

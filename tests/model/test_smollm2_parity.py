"""SmolLM2 in fp32 through the replica machine gives the tokens of transformers' generate() on the same linears.

Slow: minutes, most of them the reference. Real weights, real prompts, one batch with chunking, prefix hits, sharing
within a step and preemption, each of which is asserted to have happened.
"""

from __future__ import annotations

import csv

import pytest
import torch

from engine.model.folder import ModelFolder, prepare
from engine.model.loader import load, load_plain
from engine.model.smalllm import CORPORA
from engine.model.tokenizer import Tokenizer, load_tokenizer
from tests.model.through_replica import Request, config, differences, through_replica

pytestmark = pytest.mark.slow
COUNT, OUTPUT = 200, 20


@pytest.fixture(scope="module")
def folder() -> ModelFolder:
    return prepare("smollm2", print)


@pytest.fixture(scope="module")
def tokenizer(folder: ModelFolder) -> Tokenizer:
    assert folder.path is not None
    return load_tokenizer(folder.path)


def corpus() -> list[tuple[str, str]]:
    """(class, question), spread evenly over the corpus."""
    with (CORPORA / "questions.csv").open(encoding="utf-8", newline="") as file:
        rows = [(row["traffic_class"], row["text"]) for row in csv.DictReader(file)]
    return [rows[i * len(rows) // COUNT] for i in range(COUNT)]


def requests(tokenizer: Tokenizer) -> list[Request]:
    """Most of them at once; every fourth is critical and comes while the first answers are half said."""
    out = []
    for i, (name, text) in enumerate(corpus()):
        system = (CORPORA / "prompts" / f"{name}.txt").read_text(encoding="utf-8").strip()
        chat = [{"role": "system", "content": system}, {"role": "user", "content": text}]
        ids = tokenizer.encode(tokenizer.render(chat))
        critical = i % 4 == 3
        out.append(Request(ids, OUTPUT + i % 5, name, priority=0 if critical else 1, at_step=10 if critical else 0))
    return out


def test_tokens_are_those_of_generate(folder: ModelFolder, tokenizer: Tokenizer) -> None:
    model = load(folder, threads=2)
    try:
        asked = requests(tokenizer)
        run = through_replica(model, asked, config(blocks=320, slots=12, step_tokens=320))
        cached = sum(ended.cached_tokens for ended in run.ended.values())
        print(
            f"decode rows <= {run.most_decoding}, chunks <= {max(run.chunks.values())}, cached tokens {cached}, "
            f"shared in their step {run.shared_in_step}, preempted in mid-answer {run.preempted_mid_answer}"
        )
        assert len(run.ended) == COUNT and run.most_decoding >= 8 and max(run.chunks.values()) >= 2
        assert cached > 0 and run.shared_in_step > 0 and run.preempted_mid_answer > 0
        assert differences(load_plain(folder), asked, run, eos=tokenizer.eos_ids[0]) == []
    finally:
        torch.set_num_threads(1)


def test_prompts_are_those_of_transformers(folder: ModelFolder, tokenizer: Tokenizer) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder.path)
    for name, question in corpus():
        asked = {"role": "user", "content": question}
        for chat in ([asked], [{"role": "system", "content": name}, asked]):
            text = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            assert tokenizer.render(chat) == text
            ids = theirs.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
            assert tokenizer.encode(tokenizer.render(chat)) == ids
            assert tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert tokenizer.eos_ids == (theirs.eos_token_id,)

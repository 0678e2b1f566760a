"""KV block sizes of the benches: the default on a CPU, the smallest that the kernel takes on CUDA."""

from __future__ import annotations

from engine.config import PrefixConfig
from engine.model import varlen


def block_tokens(device: str) -> int:
    """Tokens a block."""
    return PrefixConfig().block_tokens if device == "cpu" else varlen.BLOCK_TOKENS

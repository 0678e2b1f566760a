"""Content addresses: KV block chains, exact-cache keys, text keys. Keyed BLAKE2b (RFC 7693), 128 bits.

The key is drawn once a run and stands in the journal's header: outsiders cannot aim collisions (vLLM's
GHSA-rm76-4mrf-v9r8), and a replay still sees the same digests. Every field is length-prefixed and tagged with its
purpose, so that a tenant's name can never pass for a model's. Knows nothing of text, torch or policies.
"""

from __future__ import annotations

from array import array
from hashlib import blake2b

DIGEST_BYTES = 16


class Hasher:
    """Digests under one key. ``block_tokens`` is the KV block size that chains are cut into."""

    def __init__(self, key: bytes, block_tokens: int) -> None:
        self.key, self.block_tokens = key, block_tokens

    def digest(self, tag: str, *fields: str | bytes) -> bytes:
        """16 bytes over a tag and any number of fields; no two field lists run together to the same bytes."""
        h = blake2b(key=self.key, digest_size=DIGEST_BYTES)
        for field in (tag, *fields):
            raw = field.encode() if isinstance(field, str) else field
            h.update(len(raw).to_bytes(4, "little"))
            h.update(raw)
        return h.digest()

    def root(self, tenant: str, model: str) -> bytes:
        """Where a tenant's chains start: the authenticated tenant is the salt, nothing that a request says."""
        return self.digest("kv-root", tenant, model)

    def extend(self, parent: bytes, tokens: list[int]) -> bytes:
        """Digest of one full block that follows ``parent``."""
        return blake2b(parent + array("i", tokens).tobytes(), key=self.key, digest_size=DIGEST_BYTES).digest()

    def chain(self, root: bytes, tokens: list[int]) -> tuple[bytes, ...]:
        """One digest for each full block of ``tokens``; a rest that fills no block has none."""
        out: list[bytes] = []
        size = self.block_tokens
        for start in range(0, len(tokens) - size + 1, size):
            root = self.extend(root, tokens[start : start + size])
            out.append(root)
        return tuple(out)

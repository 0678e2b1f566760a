"""What a gateway machine is told of work that it does not schedule: who asks, and how much it takes. Never its text.

Users and chance are digested as ``facts.py`` does it, so that one user has one account whatever is asked for.
"""

from __future__ import annotations

from engine.events import Charge
from engine.model.blockhash import Hasher


def charge_of(hasher: Hasher, rid: int, request_id: str, tenant: str, user: str, tokens: int) -> Charge:
    """``user``: the tenant's own name for who asks, "" = not named. ``tokens``: model tokens, all that it costs."""
    return Charge(rid, tenant, tokens, asker_of(hasher, tenant, user), draw_of(hasher, tenant, request_id))


def asker_of(hasher: Hasher, tenant: str, user: str) -> bytes:
    """Digest of a tenant's user; b"" = nobody is named."""
    return hasher.digest("asker", tenant, user) if user else b""


def draw_of(hasher: Hasher, tenant: str, request_id: str) -> int:
    """Uniform in [0, 2**62): only who has the run's key can tell it from a request's name."""
    return int.from_bytes(hasher.digest("draw", tenant, request_id)[:8], "little") >> 2

"""Who is asking, and in which traffic class: the key file, bearer keys, and what each key grants.

Only SHA-256 digests of keys are kept, and a presented key is compared with every one of them in constant time, so that
neither the file nor a stopwatch gives a key away. Keys are 32 random bytes: a slow password hash would add nothing.
Knows no HTTP beyond the words of the Authorization header (RFC 6750), and no limits: those go to the limiter unread.
"""

from __future__ import annotations

import difflib
import hmac
import json
import re
import secrets
import tomllib
from collections.abc import Iterable, Mapping
from hashlib import sha256
from pathlib import Path

import msgspec

from engine.config import ClassConfig, TenantConfig
from engine.errors import RequestError, UserError
from engine.values import NonNegativeFloat, PositiveFloat, Section

KEY_PREFIX = "db-"
KEY_BYTES = 32
ANOTHER_KEY = "doorbuster keys new NAME    (prints a key once, and the stanza to add)"


class Stanza(Section):
    """One ``[tenants.NAME]`` table of a key file."""

    key_sha256: str
    classes: tuple[str, ...] = ()
    rate_rps: PositiveFloat | None = None
    burst: PositiveFloat | None = None
    tokens_per_s: NonNegativeFloat | None = None
    weight: PositiveFloat = 1.0
    admin: bool = False  # may look into the caches of all tenants, and flush them

    def grant(self) -> TenantConfig:
        """What it may ask for, and how much of it."""
        return TenantConfig(self.classes, self.rate_rps, self.burst, self.tokens_per_s, self.weight)


class KeyRing:
    """Digests to tenants, tenants to what they may do."""

    def __init__(
        self, digests: dict[str, bytes], tenants: dict[str, TenantConfig], admins: frozenset[str] = frozenset()
    ) -> None:
        """``digests``: tenant to the SHA-256 of its key. ``admins``: those who may see and flush what all have."""
        self._digests, self.tenants, self._admins = digests, tenants, admins

    @classmethod
    def load(cls, path: Path, known_classes: Iterable[str]) -> KeyRing:
        """Read a key file; UserError says what is wrong with it, and where."""
        stanzas = _read(path)
        known = list(known_classes)
        digests: dict[str, bytes] = {}
        owners: dict[bytes, str] = {}
        for name, stanza in stanzas.items():
            where = f"{path}: [tenants.{name}]"
            for wanted in stanza.classes:
                if wanted not in known:
                    why = f"the scenario has: {', '.join(known)}"
                    raise UserError(f"no traffic class {wanted!r}", where, why, _near(wanted, known))
            if not re.fullmatch("[0-9a-fA-F]{64}", stanza.key_sha256):
                raise UserError(
                    "key_sha256 is not a SHA-256 digest", where,
                    f"64 hexadecimal digits are wanted, these are {len(stanza.key_sha256)} characters", ANOTHER_KEY,
                )
            digest = bytes.fromhex(stanza.key_sha256)
            if other := owners.get(digest):
                why = "a key says who is asking: it can belong to one tenant only"
                raise UserError(f"the same key_sha256 as [tenants.{other}]", where, why, ANOTHER_KEY)
            owners[digest] = name
            digests[name] = digest
        admins = frozenset(name for name, stanza in stanzas.items() if stanza.admin)
        return cls(digests, {name: stanza.grant() for name, stanza in stanzas.items()}, admins)

    @classmethod
    def single(cls, tenant: str = "local") -> tuple[KeyRing, str]:
        """A ring with one fresh key that opens all classes and is an admin's, and that key: for this machine alone."""
        key = _fresh_key()
        return cls({tenant: _digest(key.encode())}, {tenant: TenantConfig()}, frozenset((tenant,))), key

    def authenticate(self, header: bytes | None) -> str:
        """The tenant whose key stands in ``Authorization: Bearer KEY``; RequestError "unauthorized" else."""
        scheme, _, key = (header or b"").strip().partition(b" ")
        key = key.strip()
        if scheme.lower() != b"bearer" or not key:
            raise RequestError("unauthorized", "no API key: send the header 'Authorization: Bearer KEY'")
        asked, tenant = _digest(key), None
        for name, digest in self._digests.items():  # to the end, found or not: time says nothing about place
            if hmac.compare_digest(asked, digest):
                tenant = name
        if tenant is None:
            raise RequestError("unauthorized", "this API key is not known here")
        return tenant

    @property
    def digests(self) -> dict[str, bytes]:
        """Tenant to the SHA-256 of its key."""
        return self._digests

    @property
    def admins(self) -> frozenset[str]:
        """Tenants whose keys open ``/admin``."""
        return self._admins

    def is_admin(self, tenant: str) -> bool:
        """Whether its key opens ``/admin``."""
        return tenant in self._admins

    def class_of(self, tenant: str, asked: str | None, known: Mapping[str, ClassConfig]) -> str:
        """The traffic class of a request: the one asked for, if granted, else the first that the key file grants.

        A key that grants all without naming any says nothing of what matters: then the first that is not critical.
        """
        named = self.tenants[tenant].classes
        granted = named or tuple(known)
        if asked is None:
            modest = (name for name in granted if known[name].criticality != "critical")
            return granted[0] if named else next(modest, granted[0])
        if asked not in known:
            names = ", ".join(known)
            raise RequestError("invalid_request", f"no such traffic class; known: {names}", "x-doorbuster-class")
        if asked not in granted:
            raise RequestError("forbidden", f"this API key does not grant the class {asked}", "x-doorbuster-class")
        return asked


def new_key(name: str, classes: Iterable[str] = (), admin: bool = False) -> tuple[str, str]:
    """A key, to be shown once, and its stanza for the key file, with the digest only. No classes: all of them."""
    if not name:
        raise UserError("a tenant needs a name", fix="doorbuster keys new NAME")
    key = _fresh_key()
    bare = name if re.fullmatch("[A-Za-z0-9_-]+", name) else json.dumps(name)
    lines = [f"[tenants.{bare}]", f'key_sha256 = "{_digest(key.encode()).hex()}"']
    if granted := list(classes):
        lines.append(f"classes = {json.dumps(granted)}")
    if admin:
        lines.append("admin = true")
    return key, "\n".join(lines) + "\n"


def _fresh_key() -> str:
    return KEY_PREFIX + secrets.token_urlsafe(KEY_BYTES)


def _digest(key: bytes) -> bytes:
    return sha256(key).digest()


def _read(path: Path) -> dict[str, Stanza]:
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError("cannot read the key file", str(path), error.strerror or str(error), ANOTHER_KEY) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError("not valid TOML", str(path), str(error)) from None
    if other := sorted(tree.keys() - {"tenants"}):
        raise UserError(f"{other[0]} is not a known key", str(path), fix="a key file holds [tenants.NAME] tables only")
    tables = tree.get("tenants")
    if not isinstance(tables, dict) or not tables:
        raise UserError("no tenant", str(path), "without a key nobody could ask anything", ANOTHER_KEY)
    return {name: _stanza(path, name, table) for name, table in tables.items()}


def _stanza(path: Path, name: str, table: object) -> Stanza:
    where = f"{path}: [tenants.{name}]"
    known = list(Stanza.__struct_fields__)
    for key in table if isinstance(table, dict) else ():
        if key not in known:
            raise UserError(f"{key} is not a known key", where, f"known here: {', '.join(known)}", _near(key, known))
    try:
        return msgspec.convert(table, Stanza)
    except msgspec.ValidationError as error:
        what, _, at = str(error).partition(" - at `$.")
        raise UserError(f"{at.rstrip('`')}: {what}" if at else what, where, fix=ANOTHER_KEY) from None


def _near(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"take one of: {', '.join(known)}"

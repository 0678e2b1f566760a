"""``/admin/cache``: look at the response caches and flush them, for admin keys and this machine; and clients' tags.

A flush is one ``Invalidate`` event: journalled, replayed, and true of answers that are just being computed. What is
shown are facts about answers, never their texts, nor digests of questions. Knows no HTTP but the two places where
words come in: a query string and a header.
"""

from __future__ import annotations

import heapq
import re
from typing import Annotated, Any
from urllib.parse import parse_qsl

import msgspec
from msgspec import Meta

from engine.errors import RequestError
from engine.events import Invalidate
from engine.policy.exact import Entry
from engine.policy.semantic import SemanticEntry
from engine.service.auth import KeyRing
from engine.service.driver import GatewayDriver
from engine.service.openai import decode_body, encode_json
from engine.units import S_NS
from engine.values import Struct

MOST_SHOWN = 1000  # entries; a page is made between two requests
TAGS_HEADER = "x-doorbuster-tags"
MOST_TAGS = 8
TAG = re.compile("[A-Za-z0-9._:/-]{1,64}")

Word = Annotated[str, Meta(min_length=1, max_length=200)]
Version = Annotated[int, Meta(ge=1, le=2**63 - 1)]


class Look(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The query of a look: how many entries to list, newest first."""

    limit: Annotated[int, Meta(ge=0, le=MOST_SHOWN)] = 0


class Flush(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of a flush. All that is said must hold; ``version`` is the tag's, and counts once."""

    tenant: Word | None = None
    answer_id: Word | None = None
    tag: Word | None = None
    version: Version | None = None
    all: bool = False


class Shown(msgspec.Struct, frozen=True):
    """One entry. ``source``: the id of the request that computed it."""

    cache: str
    answer_id: str
    source: str
    age_s: float
    tags: tuple[str, ...]
    tenant: str


class CachePage(msgspec.Struct, frozen=True):
    """The answer to a look: the machine's ExactStats, SemanticStats (``rule`` in it) and JobStats, in full."""

    exact: dict[str, Any]
    semantic: dict[str, Any]
    jobs: dict[str, Any]
    entries: tuple[Shown, ...]


class Left(msgspec.Struct, frozen=True):
    """The answer to a flush: how many entries left each cache."""

    exact: int
    semantic: int


_flush = msgspec.json.Decoder(Flush).decode


def check_admin(keyring: KeyRing, tenant: str) -> None:
    """RequestError "forbidden" for all other keys."""
    if not keyring.is_admin(tenant):
        raise RequestError("forbidden", "this API key is not an admin's: its stanza in the key file needs admin = true")


def needs_no_key(local: bool, method: str, media_type: bytes | None, origin: bytes | None) -> bool:
    """Whether this machine itself asks, and not a page in its browser: it may look and flush without a key.

    ``local``: a loopback address, no proxy's header, and a loopback name as Host, so that neither a proxy's clients nor
    a page whose name was made to point here (DNS rebinding) pass for it. Any page can send a write anywhere, but none
    with JSON's media type unless it is allowed to beforehand, and that is never said here (Fetch standard: a "simple"
    request needs no leave); and a browser names the page in Origin. What a look answers no foreign page can read.
    """
    if not local or method in ("GET", "HEAD"):
        return local
    return origin is None and (media_type or b"").partition(b";")[0].strip().lower() == b"application/json"


def look(driver: GatewayDriver, query: bytes) -> bytes:
    """A CachePage as JSON; RequestError "invalid_request" names what is wrong with the query."""
    limit = decode_body(_look, query).limit
    stats, answers, now_ns = driver.machine.stats(), driver.machine.answers, driver.now_ns()
    kept: list[Entry | SemanticEntry] = [*answers.exact.entries(), *answers.semantic.entries()] if limit else []
    newest = heapq.nlargest(limit, kept, key=lambda entry: entry.stored_ns)
    shown = tuple(_shown(entry, now_ns) for entry in newest)
    return encode_json(CachePage(_all(stats.exact), _all(stats.semantic), _all(stats.jobs), shown))


def flush(driver: GatewayDriver, keyring: KeyRing, body: bytes) -> bytes:
    """Do what the body says; Left as JSON. RequestError "invalid_request", and nothing is done, where it is unclear."""
    what = _meant(decode_body(_flush, body))
    if what.tenant and what.tenant not in keyring.tenants:
        raise RequestError("invalid_request", "tenant: the key file has no such tenant", "tenant")
    before = driver.machine.stats()
    driver.invalidate(what)
    after = driver.machine.stats()
    return encode_json(Left(
        after.exact.invalidations - before.exact.invalidations,
        after.semantic.invalidations - before.semantic.invalidations,
    ))


def tags_of(header: bytes | None) -> tuple[str, ...]:
    """What the client says that its answer depends on: names between commas, each once; empty ones are none."""
    names = [name.strip(" \t") for name in (header or b"").decode("latin-1").split(",")]
    tags = tuple(dict.fromkeys(name for name in names if name))
    if len(tags) > MOST_TAGS or not all(map(TAG.fullmatch, tags)):
        why = f"{TAGS_HEADER} takes at most {MOST_TAGS} tags between commas, each of 1 to 64 of A-Z a-z 0-9 . _ : / -"
        raise RequestError("invalid_request", why, TAGS_HEADER)
    return tags


def _meant(said: Flush) -> Invalidate:
    named = said.tenant or said.answer_id or said.tag
    if said.version and not said.tag:
        raise RequestError("invalid_request", "version: it is a tag's, so name the tag too", "version")
    if not named and not said.all:
        why = 'nothing said, nothing flushed: name a tenant, an answer_id or a tag, or send {"all": true}'
        raise RequestError("invalid_request", why)
    if named and said.all:
        raise RequestError("invalid_request", "all: it stands alone, without tenant, answer_id, tag and version", "all")
    return Invalidate(said.tenant or "", said.answer_id or "", said.tag or "", said.version or 0)


def _look(query: bytes) -> Look:
    pairs = parse_qsl(query.decode("latin-1"), keep_blank_values=True)
    if len(dict(pairs)) < len(pairs):
        raise RequestError("invalid_request", "the query says one thing twice")
    return msgspec.convert(dict(pairs), Look, strict=False)


def _all(stats: Struct) -> dict[str, object]:
    """Zeros too, which a journal leaves out."""
    fields = msgspec.structs.asdict(stats).items()
    return {name: _all(value) if isinstance(value, Struct) else value for name, value in fields}


def _shown(entry: Entry | SemanticEntry, now_ns: int) -> Shown:
    cache = "exact" if isinstance(entry, Entry) else "semantic"
    age_s = (now_ns - entry.stored_ns) / S_NS
    return Shown(cache, entry.answer_id, entry.source, age_s, entry.tags, entry.tenant)

"""Reads a scenario file: TOML in, a ``Scenario`` out, with every value's origin kept and every mistake explained.

Precedence: default < file < environment (``DOORBUSTER_SET="a.b=c;d.e=f"``) < ``--set``. An unknown key names the
nearest match and its line in the file.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from pathlib import Path
from typing import Any, Literal, TypeGuard, get_args, get_origin, get_type_hints

import msgspec

from engine.config import Scenario
from engine.errors import ScenarioError
from engine.upstream_config import URL
from engine.values import Section

DATA = Path(__file__).resolve().parents[1] / "data"


class Resolved(msgspec.Struct, frozen=True):
    """A scenario and where each of its values came from (``section.key`` to ``default``, ``file``, ...)."""

    scenario: Scenario
    origins: dict[str, str]
    path: str
    text: str


def data_path(*parts: str) -> Path:
    """A file below the project's ``data`` folder, wherever the command was started."""
    return DATA.joinpath(*parts)


def find(name: str) -> Path:
    """``flash-sale`` or a path to the file."""
    given = Path(name)
    if given.is_file():
        return given
    known = sorted(p.stem for p in data_path("scenarios").glob("*.toml"))
    bundled = data_path("scenarios", f"{given.name.removesuffix('.toml')}.toml")
    if given.parent == Path(".") and bundled.is_file():
        return bundled
    raise ScenarioError(
        f"no scenario {name!r}", where=str(data_path("scenarios")), why="neither a file nor the name of one there",
        fix=f"name a file, or one of: {', '.join(known)}{_near(name, known)}",
    )


def load(name: str, sets: tuple[str, ...] = ()) -> Resolved:
    """Read, overlay, check. ``sets`` are ``section.key=value`` texts; raises ScenarioError."""
    path = find(name)
    text = path.read_text()
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ScenarioError(f"not valid TOML: {error}", where=str(path)) from None
    origins: dict[str, str] = {}
    _check_keys(tree, Scenario, "", path, text)
    _mark(tree, "", "file", origins)
    for origin, items in (("environment", _environment()), ("--set", sets)):
        for item in items:
            key = overlay(tree, item)
            _check_keys(tree, Scenario, "", Path(origin), "")
            origins[key] = origin
    try:
        scenario = msgspec.convert(tree, Scenario, strict=False)
    except msgspec.ValidationError as error:
        raise _explained(tree, origins, path, text, str(error)) from None
    if scenario.upstreams:
        scenario = msgspec.structs.replace(scenario, replicas=len(scenario.upstreams))
    _check_sense(scenario, path)
    return Resolved(scenario, origins, str(path), text)


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Every leaf as ``section.key``: what ``resolved.json`` holds."""
    tree = msgspec.to_builtins(value)
    out: dict[str, Any] = {}

    def walk(node: Any, at: str) -> None:
        if isinstance(node, dict):
            for key, child in node.items():
                walk(child, f"{at}.{key}" if at else str(key))
        else:
            out[at] = node

    walk(tree, prefix)
    return out


def _environment() -> tuple[str, ...]:
    return tuple(part for part in os.environ.get("DOORBUSTER_SET", "").split(";") if part.strip())


def overlay(tree: dict[str, Any], item: str) -> str:
    """Lay ``section.key=value`` over a tree of sections; returns the key."""
    key, eq, raw = item.partition("=")
    key = key.strip()
    if not eq or not key:
        raise ScenarioError(f"{item!r} sets nothing", where="--set", fix="write --set section.key=value")
    try:
        value = tomllib.loads(f"v = {raw}")["v"]
    except tomllib.TOMLDecodeError:
        value = raw.strip()  # an unquoted word
    node: Any = tree
    *parents, leaf = key.split(".")
    for part in parents:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise ScenarioError(f"{key}: {part} is a value, not a section", where="--set")
    node[leaf] = value
    return key


def _check_keys(tree: dict[str, Any], kind: type[Section], at: str, path: Path, text: str) -> None:
    hints = get_type_hints(kind)
    for key, value in tree.items():
        name = f"{at}.{key}" if at else key
        if key not in hints:
            line = _line(text, name)
            raise ScenarioError(
                f"{name} is not a known key", where=f"{path}:{line}" if line else str(path),
                why=f"known here: {', '.join(sorted(hints))}", fix=_near(key, list(hints)).strip(" ;") or "remove it",
            )
        hint = hints[key]
        inner = get_args(hint)[-1] if get_origin(hint) is dict else None
        if isinstance(value, dict) and _is_section(inner):
            for child, body in value.items():
                if isinstance(body, dict):
                    _check_keys(body, inner, f"{name}.{child}", path, text)
        elif isinstance(value, dict) and _is_section(hint):
            _check_keys(value, hint, name, path, text)


def _explained(tree: dict[str, Any], origins: dict[str, str], path: Path, text: str, said: str) -> ScenarioError:
    """msgspec does not say which class or profile it means; this finds the first value that does not fit."""
    key, complaint, fix = _mistake(tree, Scenario, "") or ("", said, "")
    below = {origin for name, origin in origins.items() if name.startswith(f"{key}.")}
    below = {origins[key]} if key in origins else below
    if below and "file" not in below:
        return ScenarioError(f"{key}: {complaint}", where=sorted(below)[0], fix=fix)
    line = _line(text, key) if key else None
    return ScenarioError(f"{key or 'scenario'}: {complaint}", where=f"{path}:{line}" if line else str(path), fix=fix)


def _mistake(tree: dict[str, Any], kind: type[Section], at: str) -> tuple[str, str, str] | None:
    """Key, complaint and fix of the first value below ``at`` that does not fit, or None."""
    for key, hint in get_type_hints(kind, include_extras=True).items():
        if key not in tree:
            continue
        value, name = tree[key], f"{at}.{key}" if at else key
        inner = get_args(hint)[-1] if get_origin(hint) is dict else None
        try:
            msgspec.convert(value, hint, strict=False)
        except msgspec.ValidationError as error:
            if isinstance(value, dict) and _is_section(hint):
                return _mistake(value, hint, name)
            if isinstance(value, dict) and _is_section(inner):
                for child, body in value.items():
                    if not isinstance(body, dict):
                        return f"{name}.{child}", "Expected a section of keys", ""
                    if found := _mistake(body, inner, f"{name}.{child}"):
                        others = [other for other in value if other != child]
                        if found[0] == f"{name}.{child}" and others:  # the section itself: its name may be mistyped
                            return found[0], found[1], f"there are: {', '.join(others)}{_near(child, others)}"
                        return found
            if get_origin(hint) is Literal:
                return name, f"{value!r} is not one of {', '.join(map(str, get_args(hint)))}", ""
            return name, str(error).split(" - at")[0], ""
    try:
        msgspec.convert(tree, kind, strict=False)
    except msgspec.ValidationError as error:  # a key is missing
        return at, str(error).split(" - at")[0], ""
    return None


def _is_section(hint: Any) -> TypeGuard[type[Section]]:
    return isinstance(hint, type) and issubclass(hint, Section)


def _check_sense(scenario: Scenario, path: Path) -> None:
    def no(what: str, fix: str = "") -> None:
        raise ScenarioError(what, where=str(path), fix=fix)

    if scenario.shared.url or scenario.sessions.enabled:
        no("[shared] and [sessions] are not wired into the gateway yet", "leave out shared.url and sessions.enabled")
    if not scenario.classes:
        no("no traffic class", "add at least one [classes.NAME] section")
    total = sum(c.share for c in scenario.classes.values())
    if total and abs(total - 1) > 1e-6:
        no(f"the classes' shares add up to {total:g}, not 1")
    for name, cls in scenario.classes.items():
        if cls.brownout_max_tokens and cls.criticality == "critical":
            no(
                f"classes.{name}.brownout_max_tokens: a critical class's answers are never cut short",
                "remove it, or make the class standard or sheddable",
            )
        for file in (cls.system_prompt, cls.fallback):
            if file and not data_path("corpora", file).is_file():
                no(f"classes.{name}: no file {file!r} below data/corpora")
    b, o, p = scenario.batcher, scenario.overload, scenario.prefix
    for name, up in scenario.upstreams.items():
        if not URL.fullmatch(up.url):
            no(f"upstreams.{name}.url: {up.url!r} is no URL", "write http://HOST:PORT, with or without /v1")
        if up.reserved >= up.window:
            no(f"upstreams.{name}: reserved ({up.reserved}) leaves none of the {up.window} places for other classes")
    if b.reserved_slots >= b.slots:
        no(f"batcher.reserved_slots ({b.reserved_slots}) leaves none of the {b.slots} slots for other classes")
    if b.slots >= b.step_tokens:
        no(f"batcher.slots ({b.slots}) leaves no token of batcher.step_tokens ({b.step_tokens}) for a prompt")
    if not o.brownout_share <= o.degraded_share <= o.shed_share:
        no("overload: brownout_share <= degraded_share <= shed_share must hold")
    need = -(-scenario.model.context_tokens // p.block_tokens)
    if p.blocks < need + p.pinned_blocks + b.reserved_blocks:
        no(
            f"prefix.blocks ({p.blocks}) cannot hold one full context ({need}) beside the pinned and reserved blocks",
            f"set prefix.blocks to at least {need + p.pinned_blocks + b.reserved_blocks}",
        )


def _near(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def _line(text: str, dotted: str) -> int | None:
    """Line of ``section.key`` in TOML text; good enough for tables and plain keys."""
    section, _, key = dotted.rpartition(".")
    here = ""
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"\s*\[+([^\]]+)\]+", line):
            here = header.group(1).strip()
            if here == dotted:
                return number
        elif re.match(rf"\s*[\"']?{re.escape(key)}[\"']?\s*=", line) and here == section:
            return number
    return None


def _mark(tree: dict[str, Any], at: str, origin: str, origins: dict[str, str]) -> None:
    for key, value in tree.items():
        name = f"{at}.{key}" if at else key
        if isinstance(value, dict):
            _mark(value, name, origin, origins)
        else:
            origins[name] = origin

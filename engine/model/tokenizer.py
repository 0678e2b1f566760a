"""Text to tokens and back, and chat messages to a prompt, from a model folder's own files.

Imports neither torch nor transformers (the ingress loads it in 0.1 s); a test holds ``render`` and ``encode`` equal to
transformers' ``apply_chat_template``. The template runs in jinja2's sandbox with transformers' settings. Knows nothing
of models. Special tokens stand on both sides of each message, so equal leading messages give equal leading tokens.
"""

from __future__ import annotations

import json
import re
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import tokenizers
from jinja2 import Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from engine.errors import RequestError, UserError

BROKEN = "\ufffd"  # what the bytes of half a character decode to
BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")  # a byte that sentencepiece has no piece for
PLAIN = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))  # bytes that GPT-2's alphabet shows as themselves
OTHERS = [byte for byte in range(256) if byte not in PLAIN]  # the alphabet's letters from U+0100 on, in this order
BYTE_OF = {chr(byte): byte for byte in PLAIN} | {chr(0x100 + at): byte for at, byte in enumerate(OTHERS)}


class Tokenizer:
    """One model's vocabulary and chat template. ``specials`` are the template's variables (``bos_token`` and so on)."""

    def __init__(
        self, raw: tokenizers.Tokenizer, template: str | None, specials: dict[str, str], eos_ids: tuple[int, ...]
    ) -> None:
        self._raw, self._specials, self.eos_ids = raw, specials, eos_ids
        self._template = _compile(template) if template is not None else None
        self.vocab_size: int = raw.get_vocab_size(with_added_tokens=True)
        self._added: dict[int, str] = {token: a.content for token, a in raw.get_added_tokens_decoder().items()}
        decoder = raw.decoder.__getstate__() if raw.decoder is not None else b""
        self._byte_level = b'"ByteLevel"' in decoder
        marks = [re.escape(token.content) for token in raw.get_added_tokens_decoder().values() if token.special]
        self._marks = re.compile("|".join(marks)) if marks else None

    def encode(self, text: str, *, add_special: bool = False) -> list[int]:
        """Tokens of ``text``; special tokens written in it count. ``add_special`` adds the model's own (a bos)."""
        ids: list[int] = self._raw.encode(text, add_special_tokens=add_special).ids
        return ids

    def decode(self, ids: list[int]) -> str:
        """Text of ``ids`` without special tokens; half a character shows as U+FFFD."""
        text: str = self._raw.decode(ids, skip_special_tokens=True)
        return text

    def token_bytes(self, token: int) -> bytes:
        """UTF-8 of one token as it is spelt inside a text, half a character's bytes included; b"" of an unknown id.

        The bytes of a text's tokens make up the text (but for the blank that sentencepiece adds at its start). Unlike
        in ``decode`` a special token has its name.
        """
        if token in self._added:
            return self._added[token].encode()
        word = self._raw.id_to_token(token) or ""
        if self._byte_level and all(letter in BYTE_OF for letter in word):
            return bytes(BYTE_OF[letter] for letter in word)
        if BYTE_TOKEN.fullmatch(word):
            return bytes([int(word[3:5], 16)])
        return word.replace("\u2581", " ").encode()

    def render(self, messages: list[dict[str, str]]) -> str:
        """The prompt that asks for the next assistant message.

        A special token spelt out inside a message is broken up by a space: no client can forge another's turn.
        Raises RequestError when the model has no template, or when the template refuses the messages.
        """
        if self._template is None:
            raise RequestError("invalid_request", "this model has no chat template: use /v1/completions", "model")
        safe = [{key: self._defuse(value) for key, value in message.items()} for message in messages]
        try:
            return self._template.render(messages=safe, add_generation_prompt=True, **self._specials)
        except (TemplateError, TypeError) as error:
            raise RequestError("invalid_request", f"the model's chat template says: {error}", "messages") from error

    def _defuse(self, text: str) -> str:
        return self._marks.sub(lambda m: f"{m[0][0]} {m[0][1:]}", text) if self._marks else text


class Detokenizer:
    """Tokens to text piece by piece; never emits half a character.

    Keeps a short window of tokens, because a token's text can depend on the ones before it. Trailing U+FFFD may be
    the start of a character and are held back, three at most: a character of n bytes is at most n - 1 bytes short.
    """

    WINDOW, CONTEXT = 24, 8

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self._decode = tokenizer, tokenizer.decode
        self._ids: list[int] = []
        self._sent = 0  # characters of the window's text that are out already

    def push(self, ids: list[int]) -> str:
        """The text that is certain now."""
        self._ids += ids
        text = self._decode(self._ids)
        held = min(len(text) - len(text.rstrip(BROKEN)), 3)
        piece = text[self._sent : len(text) - held]
        if len(self._ids) > self.WINDOW:
            self._ids = self._ids[-self.CONTEXT :]
            text = self._decode(self._ids)
        self._sent = len(text) - held
        return piece

    def flush(self) -> str:
        """What was held back: call it once, after the last token."""
        text = self._decode(self._ids)
        piece, self._sent = text[self._sent :], len(text)
        return piece


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a model folder: ``tokenizer.json``, ``tokenizer_config.json`` and a chat template if any."""
    try:
        raw = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the library raises bare Exception
        raise UserError(
            "no usable tokenizer.json", str(folder), str(error), "save the model with a fast tokenizer"
        ) from error
    config = _read_json(folder / "tokenizer_config.json")
    specials = {key: _content(value) for key, value in config.items() if key.endswith("_token") and value}
    try:
        return Tokenizer(raw, _template_text(folder, config), specials, _eos_ids(folder, raw, specials))
    except TemplateError as error:
        raise UserError("the chat template does not compile", str(folder), str(error)) from error


def _template_text(folder: Path, config: dict[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8")
    found = config.get("chat_template")
    if isinstance(found, list):
        found = {entry["name"]: entry["template"] for entry in found}.get("default")
    return found


def _eos_ids(folder: Path, raw: tokenizers.Tokenizer, specials: dict[str, str]) -> tuple[int, ...]:
    for name in ("generation_config.json", "config.json"):
        found = _read_json(folder / name).get("eos_token_id")
        if found is not None:
            return tuple(found) if isinstance(found, list) else (found,)
    token = raw.token_to_id(specials.get("eos_token", ""))
    return () if token is None else (token,)


def _read_json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def _content(token: str | dict[str, Any]) -> str:
    return token if isinstance(token, str) else token["content"]


def _compile(text: str) -> Template:
    # transformers' own tag marks what to train on; for a prompt it means nothing
    text = re.sub(r"({%-?\s*)generation(\s*-?%})", r"\1if true\2", text)
    text = re.sub(r"({%-?\s*)endgeneration(\s*-?%})", r"\1endif\2", text)
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    env.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    env.globals["raise_exception"] = _refuse
    env.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return env.from_string(text)


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)

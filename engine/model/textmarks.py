"""What a question says that its vector hardly shows: numbers by value, "not", names, opposites. For the vetoes.

Runs in the ingress for each question, so it is one pass over the tokens. What leaves here are keyed digests of words,
never words: a machine or a journal cannot tell what was asked. The lists are in ``lexicon.py``.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

from engine.events import TextMarks
from engine.model.blockhash import Hasher
from engine.model.denials import STOPS, Denied, denied_in
from engine.model.lexicon import COLOURS, DATES, DENIALS, NEGATIONS, NOT_UN, PHRASES, POLES, STOP, UNITS, stem
from engine.model.quantities import is_number, quantities_of
from engine.policy.vetoes import DENIED, DOUBTED, MARK_BYTES

_TOKEN = re.compile(r"w/o(?:ut)?\b|[^\W_]+(?:[.,:'][^\W_]+)*|[%€$£]|[.?!,;]", re.IGNORECASE)
_QUOTES = str.maketrans("’‘`´", "'" * 4)
_INSIDE = re.compile(r"[.,:]")
_SIGNS = frozenset("%€$£.?!,;")
_TRADES = frozenset(("instead", "not", "no", "than", "but"))  # "A instead of B": B instead of A is the opposite
_TRADE_POLE, _ORDER_POLE = 1 << 33, 1 << 16


def marks_of(text: str, hasher: Hasher, names: frozenset[str] = frozenset()) -> TextMarks:
    """Marks of one question. ``names``: words, lower case, that are always names, such as those of a catalogue.

    Upper and lower case and white space make no difference, but to names that are known by their capital letter
    alone; nor does punctuation between words, but where it ends a clause. Never raises.
    """
    tokens = _tokens(text)
    words = [token.lower().replace("'", "") for token in tokens]
    quantities, measured = quantities_of(words)
    named = [at for at in _named(tokens, words, names) if at not in measured]
    content = _content(words, measured, named)
    digest = {word: hasher.digest("word", word)[:MARK_BYTES] for word in {*content.values(), *quantities}}
    denied = denied_in(words, content)
    poles = _opposites(words, denied) | _trades(words, content, hasher)
    poles |= {
        -DENIED - int.from_bytes(hasher.digest("word", stem(word[2:]))[:MARK_BYTES], "big")
        for word in content.values()
        if word.startswith("un") and len(word) > 5 and word not in NOT_UN
    }
    poles |= {-DENIED - int.from_bytes(digest[content[at]], "big") for at in denied.surely}
    poles |= {-DOUBTED - int.from_bytes(digest[content[at]], "big") for at in denied.maybe}

    def joined(found: Iterable[str]) -> bytes:
        return b"".join(sorted({digest[word] for word in found}))

    return TextMarks(
        words=joined(content.values()), numbers=joined(quantities), names=joined(content[at] for at in named),
        negations=len(denied.denials), poles=tuple(sorted(poles)),
    )


def _tokens(text: str) -> list[str]:
    found: list[str] = []
    for token in _TOKEN.findall(unicodedata.normalize("NFKC", text).translate(_QUOTES)):
        if token.isalnum() or token[0].isdigit() or len(token) == 1:
            found.append(token)
        elif "/" in token:
            found.append("without")
        else:  # "end.Next"
            found += _INSIDE.split(token)
    return found


def _content(words: Sequence[str], measured: set[int], named: Iterable[int]) -> dict[int, str]:
    """Stems of the words that carry meaning, by their place."""
    kept = set(named)
    return {
        at: stem(word)
        for at, word in enumerate(words)
        if at in kept
        or not (at in measured or len(word) < 2 or word in STOP or (word in NEGATIONS and word not in DENIALS))
    }


def _named(tokens: Sequence[str], words: Sequence[str], names: frozenset[str]) -> list[int]:
    """Places of names: known ones, codes, colours, and words with a capital letter where none is due."""
    letters = [token for token in tokens if token[0].isalpha()]
    shouting = 2 * sum(token[0].isupper() for token in letters) > len(letters)
    found = []
    start = True
    for at, (token, word) in enumerate(zip(tokens, words, strict=True)):
        if word in names or word in COLOURS:
            found.append(at)
        elif not token.isalpha():
            if any(letter.isdigit() for letter in token) and not is_number(word):
                found.append(at)
        elif not (start or shouting) and token[0].isupper() and len(token) > 1 and not _is_common(word):
            found.append(at)
        start = token in STOPS
    return found


def _is_common(word: str) -> bool:
    return word in STOP or word in NEGATIONS or word in DATES or word in UNITS


def _opposites(words: Sequence[str], denied: Denied) -> set[int]:
    """Sides of pairs of opposites; "not on" is off. Where both sides are named, their order counts instead."""
    sides: dict[int, None] = {}
    for at, word in enumerate(words):
        for pole in POLES.get(word) or POLES.get(stem(word)) or ():
            sides.setdefault(-pole if at in denied.turned else pole)
        if at and (words[at - 1], word) in PHRASES:
            sides.setdefault(PHRASES[words[at - 1], word])
    poles = {pole for pole in sides if -pole not in sides}
    if "or" in words:  # "on or off" asks for both
        return poles
    order = list(sides)
    both = [pole for at, pole in enumerate(order) if -pole in order[at + 1 :]]
    return poles | {pole + _ORDER_POLE if pole > 0 else pole - _ORDER_POLE for pole in both}


def _trades(words: Sequence[str], content: Mapping[int, str], hasher: Hasher) -> set[int]:
    """A pole for each "A instead of B", the other side of which is "B instead of A"."""
    poles: set[int] = set()
    for at, word in enumerate(words):
        if word not in _TRADES:
            continue
        before = next((content[place] for place in range(at - 1, -1, -1) if place in content), "")
        after = next((content[place] for place in range(at + 1, len(words)) if place in content), "")
        if before and after and before != after:
            low, high = sorted((before, after))
            pole = _TRADE_POLE + int.from_bytes(hasher.digest("trade", low, high)[:MARK_BYTES], "big")
            poles.add(pole if before == low else -pole)
    return {pole for pole in poles if -pole not in poles}

"""Numbers of a text by value: "10 min", "ten minutes" and "10 mins" are one, "2 weeks" are "14 days".

A quantity is a short text: a kind and a number in the kind's smallest unit ("time:600"), or a bare number ("4312").
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from engine.model.lexicon import CARDINALS, DATES, ORDINALS, SCALES, TIMES, UNITS

_NUMBER = re.compile(r"(\d+(?:[.,]\d+)*)([a-z]*)")
_SIZES = re.compile(r"\d+(?:x\d+)+")
_CLOCK = re.compile(r"(\d{1,2}):(\d\d)([ap]m)?")
_THOUSANDS = re.compile(r"\d{1,3}(?:[.,]\d{3})+")
_ORDINAL_ENDS = frozenset(("st", "nd", "rd", "th"))
_RELATIVE = frozenset(("last", "next", "this", "past", "previous"))
_BEFORE_MONTH = frozenset(("in", "since", "until", "till", "by", "of", "next", "last", "this", "mid"))
_JOINTS = frozenset(("to", "or", "and"))
_PERIODS = frozenset(("week", "month", "year"))


def quantities_of(words: Sequence[str]) -> tuple[list[str], set[int]]:
    """The quantities in order, and the places of the words that they were made of. ``words``: lower case tokens."""
    found: list[str] = []
    used: set[int] = set()
    waiting: list[float] = []  # numbers of a range whose unit comes after the last: "5-7 days"
    at, count = 0, len(words)
    while at < count:
        value, unit, width = _read(words, at)
        if isinstance(value, str):
            found.append(value)
        elif value is not None:
            after = words[at + width] if at + width < count else ""
            if not unit and after in UNITS:
                unit, width = after, width + 1
            if not unit and at and words[at - 1] in "€$£":
                unit = words[at - 1]
            if not unit and _is_range(words, at + width):
                waiting.append(value)
            else:
                found += [_named(number, unit) for number in (*waiting, value)]
                waiting.clear()
        if width:
            used.update(range(at, at + width))
        at += width or 1
    found += [_named(number, "") for number in waiting]
    return found, used


def is_number(word: str) -> bool:
    """Whether a token with a digit is a number, with or without a unit, and not a code such as "b12" or "3d"."""
    if _SIZES.fullmatch(word) or _CLOCK.fullmatch(word):
        return True
    match = _NUMBER.fullmatch(word)
    return match is not None and (not match[2] or match[2] in UNITS or match[2] in _ENDS)


_ENDS = _ORDINAL_ENDS | {"k", "am", "pm", "ish"}


def _read(words: Sequence[str], at: int) -> tuple[float | str | None, str, int]:
    """What begins here: its value (a text where it is complete), its unit if attached, how many words it takes."""
    word = words[at]
    after = words[at + 1] if at + 1 < len(words) else ""
    if word[0].isdigit():
        return _digits(word, after)
    if word in DATES:
        return DATES[word], "", 1
    if word in TIMES:
        return TIMES[word], "", 1
    if word in _RELATIVE and after.removesuffix("s") in _PERIODS:
        return f"{'last' if word in ('past', 'previous') else word}:{after.removesuffix('s')}", "", 2
    if word in ("a", "an", "one"):  # a number only where something is measured: "the other one" is none
        return (1, "", 1) if after in UNITS and UNITS[after][0] in ("time", "weight") else (None, "", 0)
    if word in CARDINALS:
        return _spelt(words, at)
    if word in UNITS and UNITS[word][0] == "time" and len(word) > 3 and not word.startswith("sec"):
        return f"some:{UNITS[word][1]}", "", 1  # "for weeks now"
    if word == "may" and at and words[at - 1] in _BEFORE_MONTH:
        return "date:may", "", 1
    if word in ORDINALS:
        return ORDINALS[word], "", 1
    return None, "", 0


def _digits(word: str, after: str) -> tuple[float | str | None, str, int]:
    if _SIZES.fullmatch(word):
        return f"size:{word}", "", 1
    clock = _CLOCK.fullmatch(word)
    if clock or (word.isdigit() and after in ("am", "pm")) or (word[-2:] in ("am", "pm") and word[:-2].isdigit()):
        hour = int(clock[1]) if clock else int(word.removesuffix("am").removesuffix("pm"))
        half = after if after in ("am", "pm") else word[-2:]
        hour = hour % 12 + 12 * (half == "pm") if half in ("am", "pm") else hour
        return f"clock:{hour * 60 + (int(clock[2]) if clock else 0)}", "", 2 if after in ("am", "pm") else 1
    match = _NUMBER.fullmatch(word)
    if not match or not is_number(word):
        return None, "", 0
    number, tail = match[1], match[2]
    if _THOUSANDS.fullmatch(number):
        value = float(re.sub("[.,]", "", number))
    else:
        whole, _, rest = number.replace(",", ".").partition(".")
        value = float(f"{whole}.{rest.replace('.', '')}" if rest else whole)
    if tail in SCALES:
        return value * SCALES[tail], "", 1
    return value, tail if tail in UNITS else "", 1


def _spelt(words: Sequence[str], at: int) -> tuple[float | str | None, str, int]:
    """ "twenty five", "two hundred and ten" """
    total = CARDINALS[words[at]]
    width, tens = 1, 20 <= total <= 90 and words[at] != "dozen"
    while at + width < len(words):
        word = words[at + width]
        if word in SCALES and word != "k":
            total, tens = total * SCALES[word], True
        elif tens and word in CARDINALS and CARDINALS[word] < (10 if total < 100 else 100):
            total, tens = total + CARDINALS[word], 20 <= CARDINALS[word] <= 90
        else:
            break
        width += 1
    return total, "", width


def _is_range(words: Sequence[str], at: int) -> bool:
    if at < len(words) and words[at] in _JOINTS:
        at += 1
    return at < len(words) and (words[at][0].isdigit() or words[at] in CARDINALS)


def _named(value: float, unit: str) -> str:
    if unit in UNITS:
        kind, size = UNITS[unit]
        return f"{kind}:{value * size:g}" if value * size < 1e6 else f"{kind}:{round(value * size)}"
    return f"{value:.10g}"

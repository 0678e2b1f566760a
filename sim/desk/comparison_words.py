"""A comparison's scores in words: values with units, intervals, and one line a verdict."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, TypeAlias

from engine.units import MS_NS, format_ns

if TYPE_CHECKING:
    from sim.desk.compare import Floor, Score

ALL = "all"
Unit: TypeAlias = Literal["%", "pp", "x", "", "/s", "ms", "level"]


def verdict_line(score: Score, floor: Floor | None = None) -> str:
    """``yes: checkout_help, end to end, p95: +4.1 % (-1.0 to +9.3 %), mark 8 %``."""
    where = "" if score.section == "requests" else f"{score.section}, " if score.section != ALL else "all, "
    times = "" if floor is None or floor.times is None else f"; {floor.times:.1f} times live against live"
    note = f"; {score.note}" if score.note else ""
    word = "yes" if score.ok else "no"
    return f"{word}: {where}{score.what}: {said(score)}, mark {amount(score.mark, score.unit)}{times}{note}"


def said(score: Score) -> str:
    """The difference in words, signed where it has a sign, with its interval."""
    if score.value is None:
        return amount(None, score.unit)
    signed = score.change is not None and score.unit in ("%", "pp")
    text = amount(score.change if signed else score.value, score.unit, "+" if signed else "")
    if score.low is None or score.high is None:
        return text
    sign = "+" if signed else ""
    low, high = (amount(x, score.unit, sign, rough=True) for x in (score.low, score.high))
    return f"{text} ({low.rsplit(' ', 1)[0]} to {high})"


def amount(value: float | None, unit: Unit, sign: str = "", rough: bool = False) -> str:
    """A value with its unit: ``4.1 %``, ``1.2 pp``, ``1.03 x``; ``rough``: no decimals from 10 % on."""
    if value is None:
        return "–"
    if unit == "x":
        return f"{1 + value:.2f} x"
    if unit in ("%", "pp"):
        whole = not sign and abs(value) >= 0.005 and math.isclose(100 * value, round(100 * value))
        digits = 0 if whole or (rough and abs(value) >= 0.1) else 1
        return f"{round(100 * value, digits) + 0.0:{sign}.{digits}f} {unit}"
    if unit == "ms":
        return format_ns(value * MS_NS)
    return f"{value:.3f}" if unit == "" else f"{value:.2f}/s" if unit == "/s" else f"{value:.2f}"

"""Two runs side by side as text: the lines of the comparison, for the terminal and for the report alike.

Every number is formatted here, so that terminal and report never disagree. The difference is twin minus live: relative
for amounts and times, in percentage points for shares. Knows no frame: it reads summaries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from rich import box
from rich.table import Table
from rich.text import Text

from engine.units import MS_NS, format_ns

if TYPE_CHECKING:
    import pandas as pd

    from sim.desk.summary import Quantiles, Summary
    from sim.desk.wrong_hits import Part

NONE = "–"
COUNTS = ("offered", "served", "degraded", "shed")
POINTS = ("p50", "p95", "p99")
REQUESTS, TIERS, REASONS, LEVELS = "requests", "answered by", "not served, by reason", "seconds at overload level"
SHORT = {TIERS: "by ", REASONS: "not served: ", LEVELS: "seconds at level "}

Pair: TypeAlias = tuple["Summary | None", "Summary | None"]
Get: TypeAlias = str | Callable[[Any], Any]  # an attribute's name, dotted if need be, or a function


class Line(NamedTuple):
    """One line of the comparison, ready to print."""

    section: str
    label: str
    live: str
    twin: str
    difference: str


def overall(live: Summary | None, twin: Summary | None) -> list[Line]:
    """The whole run, in reading order; a missing run leaves dashes."""
    pair = (live, twin)
    times = (("first token", "ttft_ms"), ("end to end", "e2e_ms"), ("per output token", "tpot_ms"))
    return [*_amounts(pair), *(line for what, field in times for line in _times("latency", what, pair, field))]


def by_class(live: Summary | None, twin: Summary | None) -> list[Line]:
    """The same for every class; a section a class."""
    return list(_classes((live, twin)))


def class_rows(live: Summary | None, twin: Summary | None) -> list[dict[str, str]]:
    """The classes at a glance: a row a class and run, live above twin."""
    rows = []
    for name in _keys((live, twin), "classes"):
        for who, found in zip(("live", "twin"), _of_class((live, twin), name), strict=True):
            if found is not None:
                row = {"class": name, "run": who}
                row |= {field: str(getattr(found, field)) for field in COUNTS}
                row["in SLO"] = percent(found.slo_attainment)
                for what, q in (("TTFT", found.ttft_ms), ("e2e", found.e2e_ms)):
                    row |= {f"{what} {point}": milliseconds(getattr(q, point)) for point in POINTS[:2]}
                rows.append(row)
    return rows


def wrong_rows(live: Summary | None, twin: Summary | None) -> list[dict[str, str]]:
    """Answers of another question: a row a kind, a column a run; none where no run is labelled."""
    found = {who: s.wrong_hits for who, s in (("live", live), ("twin", twin)) if s is not None and s.wrong_hits}
    rows: dict[str, dict[str, str]] = {}
    for who, wrong in found.items():
        parts = {"of all served": wrong.served, "of answers to a similar question": wrong.similar}
        parts |= {f"of tier {tier}": part for tier, part in wrong.tiers.items() if part.total}
        parts["traps served a wrong answer"] = wrong.traps.wrong
        for label, part in parts.items():
            rows.setdefault(label, {})[who] = part_words(part)
        rows.setdefault("traps served from a cache", {})[who] = f"{wrong.traps.from_cache} of {wrong.traps.asked}"
    return [{"wrong hits (95 % interval)": label, **{who: row.get(who, NONE) for who in found}}
            for label, row in rows.items()]


def part_words(part: Part) -> str:
    """``3 of 41: 7.3 % (1.5 to 19.9)``."""
    rate = part.rate
    if rate.value is None or rate.low is None or rate.high is None:
        return f"{part.count} of {part.total}"
    return f"{part.count} of {part.total}: {percent(rate.value)} ({100 * rate.low:.1f} to {100 * rate.high:.1f})"


def demo_table(live: Summary, twin: Summary) -> Table:
    """Live beside twin in 100 columns: amounts, then classes, then latencies with their ``n``."""
    return _tables((live, twin))


def run_table(summary: Summary) -> Table:
    """One run by itself."""
    return _tables((None, summary))


def milliseconds(value: float | None) -> str:
    """``412.0 ms``, ``1.80 s``; a dash for nothing."""
    return NONE if value is None else format_ns(value * MS_NS)


def percent(value: float | None, form: str = ".1f") -> str:
    """``97.3 %``; a dash for nothing."""
    return NONE if value is None else f"{100 * value:{form}} %"


def _amounts(pair: Pair) -> Iterator[Line]:
    yield _amount(REQUESTS, "offered", pair, "offered")
    yield _amount(REQUESTS, "served", pair, "served")
    yield _amount(REQUESTS, "within SLO, per second", pair, "goodput_rps", ".2f")
    yield _share(REQUESTS, "deflected, of served", pair, "deflection_rate")
    yield _share(REQUESTS, "utilisation", pair, "utilisation")
    for tier in _keys(pair, "tiers"):
        yield _amount(TIERS, tier, pair, _item("tiers", tier))
    for code in _keys(pair, "rejected"):
        yield _amount(REASONS, code, pair, _item("rejected", code))
    for level in _keys(pair, "level_seconds"):
        yield _amount(LEVELS, level, pair, _item("level_seconds", level), ".1f")


def _classes(pair: Pair) -> Iterator[Line]:
    for name in _keys(pair, "classes"):
        here = _of_class(pair, name)
        for field in COUNTS:
            yield _amount(name, field, here, field)
        yield _share(name, "within SLO, of offered", here, "slo_attainment")
        yield from _times(name, "first token", here, "ttft_ms")
        yield from _times(name, "end to end", here, "e2e_ms")


def _tables(pair: Pair) -> Table:
    outer = Table.grid()
    parts = [_amount_table(pair), _class_table(pair), _latency_table(pair)]
    if rows := wrong_rows(*pair):
        parts.insert(1, _wrong_table(rows, alone=not all(pair)))
    for part in parts:
        outer.add_row(part)
    return outer


def _amount_table(pair: Pair) -> Table:
    shown = ("live", "twin", "difference") if all(pair) else ("twin",)
    table = _table("", *(shown if all(pair) else ("",)))
    before = REQUESTS
    for line in _amounts(pair):
        if line.section == REQUESTS and line.live == line.twin == NONE:
            continue
        if line.section != before:
            table.add_section()
        before = line.section
        table.add_row(Text(SHORT.get(line.section, "") + line.label), *(getattr(line, name) for name in shown))
    return table


def _class_table(pair: Pair) -> Table:
    table = _table("class", *_heads(pair, *COUNTS, "in SLO"))
    for name in _keys(pair, "classes"):
        here = _present(pair, _of_class(pair, name))
        counts = [NONE if c is None else str(getattr(c, field)) for field in COUNTS for c in here]
        table.add_row(Text(name), *counts, *(percent(c.slo_attainment if c else None, ".0f") for c in here))
    return table


def _latency_table(pair: Pair) -> Table:
    table = _table("latency", *_heads(pair, "n", *POINTS))
    rows: list[tuple[str, tuple[Any, Any]]] = [(n, _of_class(pair, n)) for n in _keys(pair, "classes")]
    for what, field in (("TTFT", "ttft_ms"), ("e2e", "e2e_ms")):
        for name, of in [*rows, ("all", pair)]:
            found: list[Quantiles | None] = [None if c is None else getattr(c, field) for c in _present(pair, of)]
            counts = [NONE if q is None else str(q.n) for q in found]
            times = [milliseconds(None if q is None else getattr(q, point)) for point in POINTS for q in found]
            table.add_row(Text(f"{what} {name}"), *counts, *times)
        table.add_section()
    return table


def frame_table(frame: pd.DataFrame) -> Table:
    """Any small frame as a table: first column to the left, the rest to the right."""
    table = _table(str(frame.columns[0]), *map(str, frame.columns[1:]))
    for row in frame.itertuples(index=False):
        table.add_row(*(Text(str(value)) for value in row))
    return table


def _wrong_table(rows: list[dict[str, str]], alone: bool) -> Table:
    first, *runs = rows[0]
    table = _table(first, *([""] if alone else runs), widest=36)
    for row in rows:
        table.add_row(*map(Text, row.values()))
    return table


def _table(first: str, *heads: str, widest: int = 22) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column(first, no_wrap=True, overflow="ellipsis", max_width=widest if first else 36)
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    return table


def _heads(pair: Pair, *heads: str) -> list[str]:
    """A column a run; two runs have the name over the first of them."""
    return [text for head in heads for text in (f"{head}\nlive", "\ntwin")] if all(pair) else list(heads)


def _present(pair: Pair, of: tuple[Any, Any]) -> list[Any]:
    """Without the run that is missing; a run without the class stays, as ``None``."""
    return [found for summary, found in zip(pair, of, strict=True) if summary is not None]


def _of_class(pair: Pair, name: str) -> tuple[Any, Any]:
    live, twin = pair
    return live and live.classes.get(name), twin and twin.classes.get(name)


def _keys(pair: Pair, field: str) -> list[str]:
    """Those of both runs, each once, in the first one's order."""
    return list(dict.fromkeys(key for summary in pair if summary is not None for key in getattr(summary, field)))


def _values(pair: tuple[Any, Any], get: Get) -> tuple[Any, Any]:
    live, twin = pair
    of = attrgetter(get) if isinstance(get, str) else get
    return None if live is None else of(live), None if twin is None else of(twin)


def _item(field: str, key: str) -> Get:
    """What a summary's map holds under ``key``; 0 where it has none."""
    return lambda summary: getattr(summary, field).get(key, 0)


def _amount(section: str, label: str, pair: tuple[Any, Any], get: Get, form: str = "d") -> Line:
    live, twin = _values(pair, get)
    texts = [NONE if value is None else format(value, form) for value in (live, twin)]
    return Line(section, label, texts[0], texts[1], _relative(live, twin))


def _share(section: str, label: str, pair: tuple[Any, Any], get: Get) -> Line:
    live, twin = _values(pair, get)
    points = None if live is None or twin is None else round(100 * (twin - live), 1)
    said = NONE if points is None else f"{points:+.1f} pp" if points else "0 pp"
    return Line(section, label, percent(live), percent(twin), said)


def _times(section: str, what: str, pair: tuple[Any, Any], get: Get) -> Iterator[Line]:
    found = _values(pair, get)
    yield _amount(section, f"{what}, n", found, "n")
    for point in POINTS:
        live, twin = _values(found, point)
        if live is not None or twin is not None:
            yield Line(section, f"{what}, {point}", milliseconds(live), milliseconds(twin), _relative(live, twin))


def _relative(live: float | None, twin: float | None) -> str:
    if live is None or twin is None:
        return NONE
    if live == twin:
        return "0 %"  # also where both are 0
    change = round(100 * (twin / live - 1)) if live else None
    return NONE if change is None else f"{change:+d} %" if change else "0 %"

"""Every rule of the semantic cache, measured: ``python -m sim.quality.study --banking77 DIR --out DIR``.

Writes ``study.md`` (both tables), ``study.json`` (the same, exact) and ``pareto.png``. Minutes; the encoder's vectors
are kept between runs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import msgspec

from engine.errors import UserError
from sim.quality.certified import Finding, Point, Split, compare, fixed_curve, rows_without, split
from sim.quality.contest import Contestant, Row, contestants, rows, settings
from sim.quality.fill import Replay
from sim.quality.gptcache import SETTINGS, gptcache_row, peer_python
from sim.quality.meanings import generated, groups_of, templated
from sim.quality.pareto import pareto
from sim.quality.questions import Questions, banking77, own_corpus
from sim.quality.rates import Part
from sim.quality.shipping import gather, ship

SAME_COSINES = (0.95, 0.85)  # the first is the engine's default


class Study(msgspec.Struct, frozen=True):
    """All that was found."""

    rows: list[Row]
    findings: list[Finding]
    curves: dict[str, list[Point]]


def said(text: str) -> None:
    """One line of progress."""
    print(text, file=sys.stderr, flush=True)


def encoded(done: int, of: int) -> None:
    """Progress of the encoder, for texts that it has not seen before."""
    if done % 1024 == 0 or done == of:
        said(f"  encoded {done} of {of}")


def contest(data: Split, train: Questions, test: Questions, entrants: Sequence[Contestant]) -> list[Row]:
    """The first table."""
    found: list[Row] = []
    python = peer_python()
    if python is None:
        said("GPTCache itself is not here, and has no row: make bench-peers brings it")
    for setting in settings(data, train, test, own_corpus(encoded)):
        said(f"all rules: {setting.name}")
        found += rows(entrants, setting)
        if python is not None and setting.name in SETTINGS:
            said(f"GPTCache itself: {setting.name}")
            found.append(gptcache_row(setting, python))
    return found


def certified(
    data: Split, answers: Path | None, vectors: Path | None
) -> tuple[list[Finding], dict[str, list[Point]]]:
    """The second table. ``answers``: the file of generated ones."""
    fit, test = Replay(data.fit), Replay(data.test)
    fixed = fixed_curve(test)
    findings, curve = compare("answers known", fit, test, fixed)
    curves = {"fixed": fixed, "calibrated": curve}
    said("certified: 20 intents unseen")
    findings += compare("20 intents never seen", fit, test, fixed, rows_without(data.fit))[0]
    both = data.fit.and_then(data.test)
    texts = {"templated": templated(both)}
    if answers is not None:
        texts["generated"] = generated(both, answers)
    for (name, given), same in product(texts.items(), SAME_COSINES):
        said(f"certified: {name} answers, grouped at {same}")
        groups = groups_of(given, same, encoded, vectors)
        said(f"  {len(set(groups))} groups of {len(set(given))} different answers")
        fit.show_answers(groups[: len(data.fit)])
        test.show_answers(groups[len(data.fit) :])
        findings += compare(f"{name} answers, grouped at {same}", fit, test, fixed)[0]
    said("certified: answers unknown")
    fit.show_answers([""] * len(data.fit))
    test.show_answers([""] * len(data.test))
    findings += compare("answers unknown", fit, test, fixed)[0]
    return findings, curves


def markdown(study: Study) -> str:
    """Both tables."""
    lines = ["| setting | rule | deflected % | wrong / all % | wrong / hits % | explored % |", "|" + "---|" * 6]
    for row in study.rows:
        cells = (row.deflected, row.wrong_of_all, row.wrong_of_hits, row.explored)
        lines.append(f"| {row.setting} | {row.rule} | " + " | ".join(map(_interval, cells)) + " |")
    lines += [
        "", "| answers | bound % | chosen before: deflected %, bound reached % | on the test: deflected % | "
        "fixed, on the test | ratio |", "|" + "---|" * 6,
    ]  # fmt: skip
    for found in study.findings:
        before = f"{100 * found.before.deflected:.1f}, {100 * found.before.upper:.2f}" if found.before else "none"
        ours, theirs = found.on_test, found.fixed_on_test
        ratio = f"{ours.deflected / theirs.deflected:.2f}" if ours and theirs and theirs.served else "-"
        lines.append(
            f"| {found.name} | {100 * found.bound:g} | {before} | {_deflected(ours)} | {_deflected(theirs)} | {ratio} |"
        )
    return "\n".join(lines) + "\n"


def _interval(part: Part) -> str:
    return f"{100 * part.value:.2f} [{100 * part.low:.2f}, {100 * part.high:.2f}]" if part.total else "-"


def _deflected(point: Point | None) -> str:
    return f"{100 * point.deflected:.1f}" if point else "none"


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m sim.quality.study", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--banking77", type=Path, required=True, metavar="DIR", help="holds train.csv and test.csv")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--answers", type=Path, metavar="JSONL", help="generated answers: text, answer")
    parser.add_argument("--vectors", type=Path, metavar="DIR", help="where the answers' vectors are kept")
    parser.add_argument("--only", choices=("rules", "certified", "fit"), help="fit: print what to ship")
    given = parser.parse_args()
    try:
        train, test = banking77(given.banking77, encoded)
        data = split(train, test)
        if given.only == "fit":
            return _print_fit(data)
        found = [] if given.only == "certified" else contest(data, train, test, contestants())
        findings, curves = (
            ([], {}) if given.only == "rules" else certified(data, given.answers, given.vectors)
        )
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    study = Study(found, findings, curves)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "study.md").write_text(markdown(study))
    (given.out / "study.json").write_bytes(msgspec.json.format(msgspec.json.encode(study)))
    filling = [row for row in found if row.setting == "Banking77, filling" and "unknown + vetoes" not in row.rule]
    if filling:
        title = "Banking77, cache filling from empty: what the neighbours' answers are worth"
        pareto(filling, curves, title).savefig(given.out / "pareto.png", dpi=110)
    print(markdown(study))
    return 0


def _print_fit(data: Split) -> int:
    material = gather(data, *own_corpus(encoded))
    for known in (True, False):
        chosen = ship(material, known)
        print("known" if known else "unknown", chosen.weights, "least:", chosen.least)
    return 0


if __name__ == "__main__":
    sys.exit(main())

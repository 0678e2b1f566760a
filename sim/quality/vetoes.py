"""What the vetoes of the semantic cache catch, and what they cost in good hits: ``python -m sim.quality.vetoes``.

Rule ``fixed`` itself decides, at three thresholds, without vetoes, with each, and with sets of them. A trap is served
when it gets any cached answer, since its own is in no cache. Intervals are Clopper-Pearson's, 95 %, two-sided; the
requests of one table are different texts.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from engine.cache_config import SemanticConfig, Veto
from engine.errors import UserError
from engine.policy.fixed import FixedRule
from sim.quality.questions import is_read
from sim.quality.rates import part
from sim.quality.traps import Lookup, banking77, catalogue_names, corpus

COSINES = (0.95, 0.90, 0.85)
NAMELESS: tuple[Veto, ...] = ("numbers", "negation", "opposites")
SETS: tuple[tuple[Veto, ...], ...] = (
    (), ("numbers",), ("negation",), ("names",), ("opposites",), NAMELESS, SemanticConfig().vetoes,
)  # fmt: skip


class Found(msgspec.Struct, frozen=True):
    """Of ``asked`` lookups: how many were served, and how many of these another answer."""

    asked: int
    served: int
    wrong: int


def judged(lookups: Sequence[Lookup], cosine: float, vetoes: Sequence[Veto], own: bool = False) -> Found:
    """Every lookup by rule ``fixed``. ``own``: a trap's own question is all that the cache holds."""
    rule = FixedRule(SemanticConfig(cosine=cosine, vetoes=tuple(vetoes)))
    served = wrong = 0
    for lookup in lookups:
        near = lookup.own if own else lookup.near
        at = rule.judge(lookup.marks, near, relaxed=False, draw=0).serve
        if at is not None:
            served += 1
            wrong += near[at].answer != lookup.asked.answer
    return Found(len(lookups), served, wrong)


def share(count: int, total: int) -> str:
    """In percent, with its interval."""
    if not total:
        return "none"
    found = part(count, total)
    return f"{count:5d} = {100 * found.value:4.1f} [{100 * found.low:4.1f}, {100 * found.high:4.1f}] %"


def trap_table(traps: Sequence[Lookup]) -> list[str]:
    """Traps served: all, of the half that nobody had read, against the own question alone, and by kind."""
    kinds = sorted({lookup.asked.kind for lookup in traps})
    unseen = [lookup for lookup in traps if not is_read(lookup.asked.question)]
    lines = [f"traps served, of {len(traps)} | of the {len(unseen)} unread | own question only | {' '.join(kinds)}"]
    for cosine in COSINES:
        for vetoes in SETS:
            served = judged(traps, cosine, vetoes).served
            by_kind = " ".join(
                f"{judged([each for each in traps if each.asked.kind == kind], cosine, vetoes).served:{len(kind)}d}"
                for kind in kinds
            )
            lines.append(
                f"{_label(cosine, vetoes)} {share(served, len(traps))} | "
                f"{share(judged(unseen, cosine, vetoes).served, len(unseen))} | "
                f"{share(judged(traps, cosine, vetoes, own=True).served, len(traps))} | {by_kind}"
            )
    return lines


def hit_table(name: str, lookups: Sequence[Lookup]) -> list[str]:
    """What is left of the good hits."""
    lines = [f"{name}, {len(lookups)} lookups: deflected | wrong, of the hits | good hits lost to the vetoes"]
    for cosine in COSINES:
        bare = judged(lookups, cosine, ())
        for vetoes in SETS:
            found = judged(lookups, cosine, vetoes)
            good, lost = bare.served - bare.wrong, bare.served - bare.wrong - (found.served - found.wrong)
            lines.append(
                f"{_label(cosine, vetoes)} {share(found.served, found.asked)} | {share(found.wrong, found.served)} | "
                f"{share(lost, good)}"
            )
    return lines


def _label(cosine: float, vetoes: Sequence[Veto]) -> str:
    return f"{cosine:.2f} {'+'.join(vetoes) or 'none':34s}"


def main() -> int:
    """The tables, on stdout."""
    parser = argparse.ArgumentParser(prog="python -m sim.quality.vetoes", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--banking77", type=Path, metavar="DIR", help="holds train.csv and test.csv")
    parser.add_argument("--names", action="store_true", help="the words of products.csv are known as names")
    given = parser.parse_args()
    try:
        material = corpus(catalogue_names() if given.names else frozenset())
        lines = [*trap_table(material.traps), "", *hit_table("other wordings in the corpus", material.wordings)]
        if given.banking77:
            lines += ["", *hit_table("Banking77, test against train", banking77(given.banking77))]
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())

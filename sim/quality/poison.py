"""What a poisoner reaches: wrong answers planted in the semantic cache, and how many others are served them.

An attacker gets the model to answer some wordings of known questions falsely (how is not modelled), and the cache keeps
that. Then others ask the remaining wordings, Zipf over the questions. Without quarantine each near enough wording is a
victim; with it an entry serves others only after so many of them got an equal answer. ``python -m sim.quality.poison``.
"""

from __future__ import annotations

import argparse
import sys

import msgspec
import numpy as np

from engine.cache_config import SemanticConfig
from engine.errors import UserError
from engine.events import Arrive, Neighbour
from engine.model.index import VectorIndex
from engine.policy.semantic import SemanticCache, SemanticEntry
from sim.quality.questions import Questions, own_corpus

PLANTED, REQUESTS, USERS = 100, 6000, 300
FAR_NS = 1


class Harm(msgspec.Struct, frozen=True):
    """Of ``asked`` requests by others."""

    asked: int
    served: int
    victims: int
    quarantined: int  # entries, in the end


def drill(questions: Questions, quarantine: int, cosine: float = 0.9, seed: int = 1) -> Harm:
    """One attack on one cache."""
    rng = np.random.default_rng(seed)
    cache = SemanticCache(SemanticConfig(quarantine=quarantine, cosine=cosine, ttl_s=1e6, max_entries=100_000))
    index = VectorIndex(questions.vectors.shape[1], "numpy")
    for row in rng.choice(len(questions), PLANTED, replace=False).tolist():
        _keep(cache, index, questions, row, b"eve", f"poison {row}", planted=True)
    groups: dict[str, list[int]] = {}
    for row, label in enumerate(questions.labels):
        groups.setdefault(label, []).append(row)
    named = [groups[label] for label in rng.permutation(list(groups))]
    chances = 1 / np.arange(1, len(named) + 1)
    served = victims = 0
    for number in range(REQUESTS):
        group = named[int(rng.choice(len(named), p=chances / chances.sum()))]
        row, user = group[int(rng.integers(len(group)))], f"user {rng.integers(USERS)}".encode()
        ask = _ask(questions, row, user, number)
        near = index.search(ask.hard_key, questions.vectors[row], 9)
        found = cache.decide(FAR_NS, ask, [Neighbour(*each) for each in near if each[0] != ask.text_key], False)
        if found.hit is not None:
            served += 1
            victims += found.hit.entry.answer_id.startswith("poison")
            continue
        answer = questions.labels[row]
        _keep(cache, index, questions, row, user, answer)
        for with_ in found.compare:
            cache.learn(with_.entry, None, with_.entry.answer_id == answer, user)
    return Harm(REQUESTS, served, victims, cache.stats().quarantined)


def _ask(questions: Questions, row: int, user: bytes, number: int) -> Arrive:
    return Arrive(
        number, f"r{number}", "t", "qa", 0, 5, 4, hard_key=questions.scopes[row].encode(),
        text_key=row.to_bytes(4, "big"), marks=questions.marks[row], asker=user,
    )


def _keep(
    cache: SemanticCache, index: VectorIndex, questions: Questions, row: int, user: bytes, answer: str,
    planted: bool = False,
) -> None:
    ask = _ask(questions, row, user, row)
    text_key = b"planted" + ask.text_key if planted else ask.text_key  # the same wording but for a mark or a blank
    entry = SemanticEntry(ask.hard_key, text_key, answer, 0, ask.request_id, 9, "t", (), ask.marks, user)
    cache.put(entry, FAR_NS)
    index.add(ask.hard_key, text_key, questions.vectors[row])


def main() -> int:
    """A row for each quarantine."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--cosine", type=float, default=0.9)
    given = parser.parse_args()
    try:
        questions, _ = own_corpus()
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{PLANTED} planted, {REQUESTS} requests by {USERS} others, fixed {given.cosine} with vetoes")
    print("quarantine  served from the cache  victims  entries still in quarantine")
    for quarantine in (0, 1, 2):
        harm = drill(questions, quarantine, given.cosine)
        print(f"{quarantine:10d}  {harm.served:21d}  {harm.victims:7d}  {harm.quarantined:27d}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

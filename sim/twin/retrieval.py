"""What a retrieving shop puts before a question: the class's own rules, and the passages that its search found.

The passages of an intent are the first replies of that intent in the corpus, always in the same order: people who ask
about one thing share their prompts up to the question, which is what a prefix cache lives on (RAG). Knows nothing of
how good the search is: every question of an intent finds the same.
"""

from __future__ import annotations

import csv

from engine.config import Scenario
from engine.scenario import data_path

INTRODUCTION = "What our shop's pages say:"


def contexts(scenario: Scenario) -> dict[tuple[str, str], str]:
    """System message by class and intent, for the classes that retrieve."""
    retrieving = {name: cls for name, cls in scenario.classes.items() if cls.retrieved}
    if not retrieving:
        return {}
    with data_path("corpora", "answers.csv").open(newline="", encoding="utf-8") as file:
        replies = {row["answer_id"]: row["answer"] for row in csv.DictReader(file)}
    found: dict[tuple[str, str], dict[str, None]] = {}
    for name in (scenario.workload.corpus, scenario.workload.traps):
        if not name:
            continue
        with data_path("corpora", name).open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                if row["traffic_class"] in retrieving:
                    found.setdefault((row["traffic_class"], row["intent"]), {})[row["answer_id"]] = None
    out = {}
    for (name, intent), answers in found.items():
        passages = [replies[each] for each in answers if each in replies][: retrieving[name].retrieved]
        prompt = retrieving[name].system_prompt
        rules = data_path("corpora", prompt).read_text(encoding="utf-8").strip() if prompt else ""
        listed = "\n".join(f"- {passage}" for passage in passages)
        out[name, intent] = f"{rules}\n\n{INTRODUCTION}\n{listed}".strip()
    return out

"""Retrieved passages in the workload: who asks about one thing shares a prompt up to the question.

Run: python -m pytest tests/sim/test_retrieval.py -q
"""

from __future__ import annotations

from engine.scenario import load
from sim import sale
from sim.desk.frames import requests_frame
from sim.desk.tiers import REFERENCE
from sim.twin import cost
from sim.twin.retrieval import INTRODUCTION, contexts
from sim.twin.workload import flash_sale, twin_arrivals

SETS = ("model.name=fake", "semantic.enabled=false", "exact.enabled=false", "classes.product_qa.retrieved=4")
RAG, BARE = load("flash-sale", SETS), load("flash-sale", SETS[:3])


def test_passages_stand_between_the_rules_and_the_question() -> None:
    asked = [r for r in flash_sale(RAG.scenario, "ci", 10.0, 1) if r.traffic_class == "product_qa"]
    assert len(asked) > 50
    by_intent: dict[str, set[str]] = {}
    for request in asked:
        system, question = request.messages()
        assert (system["role"], question) == ("system", {"role": "user", "content": request.text})
        rules, passages = system["content"].split(INTRODUCTION)
        assert rules.startswith("You are the product adviser") and passages.count("\n- ") == 4
        by_intent.setdefault(request.intent, set()).add(system["content"])
    assert all(len(each) == 1 for each in by_intent.values()) and len(by_intent) > 3
    assert len({text for each in by_intent.values() for text in each}) == len(by_intent)
    other = next(r for r in flash_sale(RAG.scenario, "ci", 10.0, 1) if r.traffic_class == "checkout_help")
    assert other.context == "" and len(other.messages()) == 1


def test_only_who_retrieves_has_a_context_and_nobody_else_asks_differently() -> None:
    assert contexts(BARE.scenario) == {}
    with_, without = (flash_sale(each.scenario, "ci", 10.0, 1) for each in (RAG, BARE))
    assert [(r.at_ns, r.text) for r in with_] == [(r.at_ns, r.text) for r in without]


def test_the_prefix_cache_finds_what_others_had_retrieved() -> None:
    bench = sale.make_bench(RAG, cost.load(REFERENCE))
    requests = [r for r in flash_sale(RAG.scenario, "ci", 3.0, 1) if r.traffic_class == "product_qa"]
    arrivals = {a.ask.request_id: a.ask for a in twin_arrivals(requests, bench._facts, lambda request, most: most)}
    first, second = next(
        (a, b) for a in requests for b in requests if a.intent == b.intent and a.text != b.text
    )
    one, two = arrivals[first.request_id].blocks, arrivals[second.request_id].blocks
    shared = next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))
    assert shared * 16 >= 250, "rules and passages, in whole blocks"
    frame = requests_frame(bench.run(requests, RAG.scenario).requests)
    computed = frame[frame["tier"] == "model"]
    share = computed["cached_tokens"].sum() / computed["prompt_tokens"].sum()
    assert share > 0.5 and len(computed) > 20

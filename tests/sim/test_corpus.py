"""The text corpus holds what its datasheet says.

Above all the skeleton rule: with product names masked, no two questions are the same text, so a semantic cache
that is measured on this corpus meets paraphrases and near misses, never a template with a word exchanged.
"""

import csv
import re
from collections import Counter
from pathlib import Path

CORPORA = Path(__file__).resolve().parents[2] / "data" / "corpora"
WORDS = {"checkout_help": (5, 36), "product_qa": (5, 36), "recommendation": (4, 26)}
MAX_SHARED = 0.6


def read_rows(name: str) -> list[dict[str, str]]:
    with (CORPORA / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def mask_of(products: list[str]) -> re.Pattern[str]:
    """A pattern that finds every product name, the longest first, spelled in any case."""
    names = sorted(products, key=len, reverse=True)
    return re.compile(r"\b(?:" + "|".join(re.escape(name) for name in names) + r")\b", re.IGNORECASE)


def skeleton(text: str, mask: re.Pattern[str]) -> str:
    """The text in lower case with product names masked, punctuation gone and white space folded."""
    kept = [re.sub(r"[^\w\s]", "", part.lower()) for part in mask.split(text)]
    return " ".join(" <product> ".join(kept).split())


def repeated_skeletons(texts: list[str], mask: re.Pattern[str]) -> list[str]:
    return [found for found, times in Counter(skeleton(text, mask) for text in texts).items() if times > 1]


PRODUCTS = [row["product"] for row in read_rows("products.csv")]
QUESTIONS = read_rows("questions.csv")
TRAPS = read_rows("traps.csv")
ANSWERS = {row["answer_id"]: row["answer"] for row in read_rows("answers.csv")}
MASK = mask_of(PRODUCTS)


def test_skeletons_are_unique() -> None:
    assert repeated_skeletons([row["text"] for row in QUESTIONS + TRAPS], MASK) == []


def test_no_question_is_another_with_few_words_exchanged() -> None:
    words = [(row["question_id"], set(skeleton(row["text"], MASK).split())) for row in QUESTIONS]
    close = [
        (one, other)
        for at, (one, mine) in enumerate(words)
        for other, theirs in words[at + 1 :]
        if len(mine & theirs) > MAX_SHARED * len(mine | theirs)
    ]
    assert close == []


def test_skeleton_flags_a_pair_that_differs_in_the_product_only() -> None:
    first, second = PRODUCTS[0], PRODUCTS[1]
    pair = [f"is the {first} in blue?", f"Is  the {second.upper()} in blue??"]
    assert repeated_skeletons(pair, MASK) == ["is the <product> in blue"]
    assert repeated_skeletons([pair[0], f"is the {second} in red?"], MASK) == []


def test_counts_classes_and_ids() -> None:
    assert len(QUESTIONS) >= 1500
    assert len({row["intent"] for row in QUESTIONS}) >= 60
    assert {row["traffic_class"] for row in QUESTIONS} == set(WORDS)
    ids = [row["question_id"] for row in QUESTIONS] + [row["trap_id"] for row in TRAPS]
    assert len(ids) == len(set(ids))


def test_every_answer_has_several_wordings_of_one_intent() -> None:
    groups: dict[str, list[dict[str, str]]] = {}
    for row in QUESTIONS:
        groups.setdefault(row["answer_id"], []).append(row)
    assert min(len(rows) for rows in groups.values()) >= 2
    assert all(len({(row["intent"], row["traffic_class"]) for row in rows}) == 1 for rows in groups.values())
    for rows in groups.values():
        products = {frozenset(found.lower() for found in MASK.findall(row["text"])) for row in rows}
        assert len(products) == 1, f"{rows[0]['answer_id']}: one wording names a product that another does not"


def test_traps_look_like_their_question_and_have_another_answer() -> None:
    by_id = {row["question_id"]: row for row in QUESTIONS}
    assert len(TRAPS) >= 120
    kinds = Counter(row["kind"] for row in TRAPS)
    assert set(kinds) == {"negation", "number", "product", "date", "opposite"}
    assert min(kinds.values()) >= 20
    for trap in TRAPS:
        seed = by_id[trap["question_id"]]
        assert (trap["traffic_class"], trap["intent"]) == (seed["traffic_class"], seed["intent"])
        assert ANSWERS[trap["answer_id"]] != ANSWERS[seed["answer_id"]]


def test_all_answers_are_there_and_differ() -> None:
    named = {row["answer_id"] for row in QUESTIONS + TRAPS}
    assert named == set(ANSWERS)
    assert len(set(ANSWERS.values())) == len(ANSWERS)
    assert all(6 <= len(answer.split()) <= 36 for answer in ANSWERS.values())


def test_an_intent_belongs_to_one_class_and_has_several_questions() -> None:
    classes = {(row["intent"], row["traffic_class"]) for row in QUESTIONS}
    by_intent = Counter(row["intent"] for row in QUESTIONS)
    assert len(classes) == len(by_intent)
    assert min(by_intent.values()) >= 7
    assert all(re.fullmatch(r"[a-z]+(?:_[a-z]+)*", intent) for intent in by_intent)


def test_lengths_in_words() -> None:
    outside = []
    for row in QUESTIONS:
        low, high = WORDS[row["traffic_class"]]
        if not low <= len(row["text"].split()) <= high:
            outside.append(row["question_id"])
    assert outside == []


def test_products_are_distinct_and_asked_about() -> None:
    names = [name.lower() for name in PRODUCTS]
    assert len(names) == len(set(names)) >= 50
    assert not [(one, other) for one in names for other in names if one != other and one in other]
    asked = {found.lower() for row in QUESTIONS for found in MASK.findall(row["text"])}
    assert asked == set(names)
    assert sum(1 for row in QUESTIONS if MASK.search(row["text"])) >= len(QUESTIONS) / 3


def test_popular_list_names_products_of_the_shop() -> None:
    text = (CORPORA / "popular.txt").read_text(encoding="utf-8")
    assert len(text.split()) <= 60
    assert "popular" in text and "not a personal answer" in text
    named = re.findall(r"\bthe ((?:[A-Z]\w+ ?)+)", text)
    assert len(named) == 5
    assert {name.strip() for name in named} <= set(PRODUCTS)


def test_prompts_exist() -> None:
    for name in ("payment_fraud", *WORDS):
        assert len((CORPORA / "prompts" / f"{name}.txt").read_text(encoding="utf-8").split()) > 80
    fraud = (CORPORA / "prompts" / "payment_fraud.txt").read_text(encoding="utf-8")
    assert all(word in fraud for word in ("ALLOW", "REVIEW", "BLOCK"))

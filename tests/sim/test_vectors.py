"""Vectors for the twin: the real encoder's, remembered on disk; and what the twin finds with vectors.

Run: python -m pytest tests/sim/test_vectors.py -q
Mutations it caught: rows left in the order of lengths; zero rows handed out; a file that forgets what it had; another
digest than the encoder's own; text keys of other texts; an encoder that the bench keeps to itself; a vector that is not
dropped; a batch's first text encoded for nothing.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from engine.errors import UserError
from engine.events import DropVector, FindSimilar, Similar, StoreVector
from engine.ledger.journal import open_journal
from engine.model.blockhash import Hasher
from engine.model.encoder_folder import digest_of, find_folder
from engine.model.index import VectorIndex
from engine.scenario import data_path, load
from engine.units import S_NS
from sim import sale
from sim.twin.cost import load as load_calibration
from sim.twin.driver import Lags
from sim.twin.system import TwinSystem
from sim.twin.vectors import semantic_classes, vectors_of
from sim.twin.workload import Request
from tests.equivalence.test_virtual_time import COST, DIMS, ENCODER, TENANTS, scenario, vectors, workload

QUESTION = "Can I still return the jacket I bought in the sale?"
PARAPHRASE = "Is it possible to send back a jacket that was on sale?"
LONG = "where is my parcel " * 60


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that remembers two questions and a text too long for a vector."""
    folder = tmp_path_factory.mktemp("vectors")
    told: list[tuple[int, int]] = []
    found = vectors_of([QUESTION, LONG, PARAPHRASE, QUESTION], lambda *at: told.append(at), folder)
    assert told == [(0, 3), (3, 3)], "each text once"
    assert list(found) == [QUESTION, PARAPHRASE], "a text that is too long has none"
    return folder


def test_each_text_has_its_own_vector(kept: Path) -> None:
    found = vectors_of([PARAPHRASE, QUESTION], folder=kept)
    assert {v.shape for v in found.values()} == {(384,)} and {v.dtype for v in found.values()} == {np.dtype("float32")}
    assert float(found[QUESTION] @ found[QUESTION]) == pytest.approx(1, abs=1e-6)
    assert 0.75 < float(found[QUESTION] @ found[PARAPHRASE]) < 0.99


def test_what_is_known_is_not_computed_again(kept: Path) -> None:
    told: list[tuple[int, int]] = []
    assert vectors_of([LONG], lambda *at: told.append(at), kept) == {}
    assert len(vectors_of([QUESTION, PARAPHRASE], lambda *at: told.append(at), kept)) == 2
    assert told == []


def test_files_are_by_weights_and_whole(kept: Path) -> None:
    assert [path.name for path in kept.iterdir()] == [f"{digest_of(find_folder())}.npz"]


def test_new_texts_are_added_and_a_damaged_file_is_made_again(kept: Path, tmp_path: Path) -> None:
    path = tmp_path / f"{digest_of(find_folder())}.npz"
    path.write_bytes((kept / path.name).read_bytes()[:-100])
    told: list[tuple[int, int]] = []
    first = vectors_of([QUESTION], lambda *at: told.append(at), tmp_path)
    assert told == [(0, 1), (1, 1)]
    np.testing.assert_allclose(first[QUESTION], vectors_of([QUESTION], folder=kept)[QUESTION], atol=1e-5)
    told.clear()
    assert set(vectors_of([QUESTION, "x"], lambda *at: told.append(at), tmp_path)) == {QUESTION, "x"}
    assert told == [(0, 1), (1, 1)], "only the new one"
    assert len(vectors_of([QUESTION, "x"], lambda *at: told.append(at), tmp_path)) == 2
    assert len(told) == 2, "both are kept"


def test_no_text_asks_for_no_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.model.encoder_folder.PACKAGE", "no_such_package")
    assert vectors_of([]) == {}
    with pytest.raises(UserError, match="the encoder's model is not installed") as caught:
        vectors_of([QUESTION])
    assert "semantic.enabled=false" in caught.value.fix


def test_classes_that_need_an_encoder() -> None:
    bundled = load("flash-sale", ("classes.recommendation.caches=exact",)).scenario
    assert semantic_classes(bundled) == ["checkout_help", "product_qa"]
    assert semantic_classes(load("flash-sale", ("semantic.enabled=false",)).scenario) == []


# ---------------------------------------------------------------- what the twin finds with them


class Naive:
    """All vectors under a hard key in a list; sorted anew for each question."""

    def __init__(self) -> None:
        self.rows: dict[bytes, list[tuple[bytes, np.ndarray]]] = {}

    def add(self, hard_key: bytes, text_key: bytes, vector: np.ndarray) -> None:
        self.remove(hard_key, text_key)
        self.rows.setdefault(hard_key, []).append((text_key, vector))

    def remove(self, hard_key: bytes, text_key: bytes) -> None:
        self.rows[hard_key] = [row for row in self.rows.get(hard_key, []) if row[0] != text_key]

    def search(self, hard_key: bytes, vector: np.ndarray, k: int) -> list[tuple[bytes, int]]:
        found = [(key, round(1e6 * sum(float(a) * float(b) for a, b in zip(row, vector, strict=True))))
                 for key, row in self.rows.get(hard_key, [])]
        return sorted(found, key=lambda item: -item[1])[:k]


def test_the_twin_finds_what_the_live_index_finds(tmp_path: Path) -> None:
    """Every list of neighbours in a twin's journal, against the index that live asks and against a plain sort."""
    hasher = Hasher(b"key", 16)
    arrivals = [arrival for *_, arrival in workload(hasher, 4)]
    known = vectors([arrival.ask for arrival in arrivals])
    TwinSystem(
        scenario(), TENANTS, COST, Lags(), arrivals, hasher, tmp_path, encoder=ENCODER, vectors=known
    ).run()
    live, naive = VectorIndex(DIMS), Naive()
    asked: dict[int, FindSimilar] = {}
    lengths: list[int] = []
    for entry in open_journal(tmp_path / "journal" / "gateway-0.ndjson").entries():
        if isinstance(entry.event, Similar) and entry.event.status == "ok":
            ask = asked[entry.event.rid]
            told = [(n.text_key, n.cosine_millionths) for n in entry.event.neighbours]
            assert told == live.search(ask.hard_key, known[ask.text_key], ask.at_most)
            theirs = naive.search(ask.hard_key, known[ask.text_key], ask.at_most)
            assert [key for key, _ in told] == [key for key, _ in theirs]
            assert [cosine for _, cosine in told] == pytest.approx([cosine for _, cosine in theirs], abs=1)
            lengths.append(len(told))
        for action in entry.actions:
            if isinstance(action, FindSimilar):
                asked[action.rid] = action
            elif isinstance(action, StoreVector):
                live.add(action.hard_key, action.text_key, known[action.text_key])
                naive.add(action.hard_key, action.text_key, known[action.text_key])
            elif isinstance(action, DropVector):
                live.remove(action.hard_key, action.text_key)
                naive.remove(action.hard_key, action.text_key)
    assert max(lengths) == scenario().semantic.neighbours and min(lengths) == 0 and len(lengths) > 50


# ---------------------------------------------------------------- the bench hands them over


def test_a_sale_in_the_twin_is_answered_by_a_similar_question(
    kept: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A corpus of two wordings, so that nothing has to be computed: the second gets the first one's answer."""
    (tmp_path / "two.csv").write_text(
        f"traffic_class,intent,answer_id,text\nproduct_qa,returns,a,{QUESTION}\nproduct_qa,returns,a,{PARAPHRASE}\n"
    )
    (tmp_path / "vectors").symlink_to(kept)
    monkeypatch.setenv("DOORBUSTER_CACHE", str(tmp_path))
    sets = ("model.name=fake", "workload.traps=", f"workload.corpus={tmp_path / 'two.csv'}", "semantic.cosine=0.75")
    resolved = load("flash-sale", sets)
    bench = sale.make_bench(resolved, load_calibration(data_path("calibrations", "smollm2-reference.json")))
    requests = [Request(f"r{n}", n * 9 * S_NS, "storefront", "product_qa", "returns", text, "a")
                for n, text in enumerate([QUESTION, PARAPHRASE, QUESTION])]
    view = sale.twin_sale(bench, resolved, requests, 20.0, 1, tmp_path / "run")
    assert list(view.frame["tier"]) == ["model", "semantic", "exact"]
    assert list(view.frame["source"][1:]) == ["r0", "r0"]
    assert 0.75 < view.frame["cosine"][1] < 0.99
    assert list(view.frame["wrong_hit"][1:]) == [False, False]
    cost = bench.calibration.encoder
    assert cost is not None
    assert view.frame["e2e_ns"][1] - view.frame["e2e_ns"][2] == cost.fixed_ns + cost.text_ns + cost.wire_ns

"""Was it the right answer? Labels laid over a frame, the rates counted by hand, and a sale in which labels and tiers
must agree: the same question to the letter is never answered wrongly.

Run: python -m pytest tests/sim/test_wrong_hits.py -q
Mutations it caught: the intent taken for the label; a label of nothing; requests that were not served, or not from a
cache, labelled; stale answers to the same question counted as similar; traps' rate of the served; Wilson's interval;
a live run left without labels; the source lost on the way into the frame.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from scipy import stats

from engine.events import RequestRecord
from engine.scenario import Resolved, data_path, load
from engine.units import MS_NS, S_NS
from sim import sale
from sim.desk.frames import level_frame, read_run, requests_frame
from sim.desk.labels import labelled
from sim.desk.report import RunView, render
from sim.desk.summary import Summary, summarise
from sim.desk.tables import demo_table, run_table, wrong_rows
from sim.desk.wrong_hits import share, wrong_hits
from sim.loadgen import Seen
from sim.twin.cost import load as load_calibration
from sim.twin.vectors import semantic_classes
from sim.twin.workload import Request, flash_sale, read_corpus

SALE = load("flash-sale").scenario


def ask(name: str, label: str, trap: bool = False) -> Request:
    return Request(name, 0, "storefront", "product_qa", "stock", f"text of {name}", label, trap)


def record(name: str, tier: str | None, source: str = "", cosine: float | None = None, **more) -> RequestRecord:
    given = {"outcome": "served", "level": 0, "ttft_ns": MS_NS, "e2e_ns": 2 * MS_NS} | more
    return RequestRecord(
        request_id=name, tenant="storefront", traffic_class="product_qa", arrived_ns=0, tier=tier, source=source,
        cosine_millionths=None if cosine is None else round(cosine * 1e6), **given,
    )


# m: by the model. The others: from a cache, some of another question
ASKED = [
    ask("m", "a"), ask("m2", "b"), ask("same", "a"), ask("rode", "a"), ask("near", "a"), ask("off", "b"),
    ask("stale", "a"), ask("rough", "a"), ask("rough-off", "c"), ask("tip", "z"), ask("shed", "z"),
    ask("trap-model", "t1", True), ask("trap-off", "t2", True), ask("trap-shed", "t3", True), ask("lost", "b"),
]
RECORDS = [
    record("m", "model"), record("m2", "model"),
    record("same", "exact", "m"), record("rode", "coalesced", "m"),
    record("near", "semantic", "m", 0.97), record("off", "semantic", "m", 0.96),
    record("stale", "approximate", "m"),
    record("rough", "approximate", "m", 0.88), record("rough-off", "approximate", "m2", 0.86),
    record("tip", "fallback", "m"), record("shed", None, outcome="rejected", error_code="overloaded", ttft_ns=None),
    record("trap-model", "model"), record("trap-off", "semantic", "m2", 0.98),
    record("trap-shed", None, outcome="rejected", error_code="overloaded", ttft_ns=None),
    record("lost", "semantic", "m", 0.99, outcome="failed", error_code="connection_failed"),
]


def frame(records: list[RequestRecord] = RECORDS) -> pd.DataFrame:
    return labelled(requests_frame(records), ASKED)


def summary(given: pd.DataFrame) -> Summary:
    return summarise(given, SALE, "load", 7, 60.0, level_frame([], 60 * S_NS), 0.5)


def test_a_hit_is_wrong_when_the_labels_differ() -> None:
    found = frame().set_index("request_id")["wrong_hit"].dropna().to_dict()
    assert found == {
        "same": False, "rode": False, "near": False, "off": True, "stale": False, "rough": False, "rough-off": True,
        "trap-off": True,
    }, "the model's own answers, fallbacks, and what was not served have no such word"


def test_what_the_workload_does_not_know_has_no_label() -> None:
    strangers = [record("same", "exact", "gone"), record("who", "semantic", "m", 0.99), record("m", "exact", "bare")]
    found = labelled(requests_frame(strangers), [*ASKED, ask("bare", "")])
    assert found["wrong_hit"].isna().all()
    assert found.set_index("request_id")["trap"].isna().to_dict() == {"same": False, "who": True, "m": False}


def test_intents_stand_as_they_were_seen() -> None:
    given = requests_frame(RECORDS[:2])
    given.loc[0, "intent"] = "seen"
    assert list(labelled(given, ASKED)["intent"]) == ["seen", "stock"]


def test_the_rates_are_those_counted_by_hand() -> None:
    found = wrong_hits(frame())
    assert found is not None
    assert (found.served.count, found.served.total) == (3, 12)
    assert (found.similar.count, found.similar.total) == (3, 5), "a stale answer to the very same question is not one"
    assert {tier: (p.count, p.total) for tier, p in found.tiers.items()} == {
        "exact": (0, 1), "coalesced": (0, 1), "semantic": (2, 3), "approximate": (1, 3),
    }
    assert (found.traps.asked, found.traps.from_cache, found.traps.wrong.count, found.traps.wrong.total) == (3, 1, 1, 3)
    assert summary(frame()).wrong_hit_rate.value == pytest.approx(3 / 8)


def test_nothing_labelled_is_not_nothing_wrong() -> None:
    assert wrong_hits(requests_frame(RECORDS)) is None
    assert wrong_hits(requests_frame([])) is None
    bare = wrong_hits(frame(RECORDS[:2]))
    assert bare is not None and bare.similar.rate.value is None and bare.served.rate.value == 0


def test_intervals_are_clopper_pearsons() -> None:
    """By its definition: the rates at which so many or more, so many or fewer, have a probability of 2.5 %."""
    for count, total in ((0, 30), (3, 41), (41, 41), (1, 500)):
        rate = share(count, total).rate
        assert rate.value == count / total
        assert rate.low is not None and rate.high is not None
        if count:
            assert stats.binom.sf(count - 1, total, rate.low) == pytest.approx(0.025)
        if count < total:
            assert stats.binom.cdf(count, total, rate.high) == pytest.approx(0.025)
    assert share(0, 30).rate.low == 0 and share(41, 41).rate.high == 1


# ---------------------------------------------------------------- shown


def printed(table: object) -> list[list[str]]:
    console = Console(width=100, file=io.StringIO(), color_system=None)
    console.print(table)
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= 100 and "…" not in text
    return [[part.strip() for part in line.split("  ") if part.strip()] for line in text.splitlines()]


def test_the_demos_table_has_both_rates_live_beside_twin() -> None:
    live, twin = summary(frame()), summary(frame(RECORDS[:5]))
    rows = {row[0]: row[1:] for row in printed(demo_table(live, twin)) if row}
    assert rows["wrong hits (95 % interval)"] == ["live", "twin"]
    assert rows["of all served"] == ["3 of 12: 25.0 % (5.5 to 57.2)", "0 of 5: 0.0 % (0.0 to 52.2)"]
    assert rows["of answers to a similar question"] == ["3 of 5: 60.0 % (14.7 to 94.7)", "0 of 1: 0.0 % (0.0 to 97.5)"]
    assert rows["of tier exact"] == ["0 of 1: 0.0 % (0.0 to 97.5)", "0 of 1: 0.0 % (0.0 to 97.5)"]
    assert rows["of tier approximate"] == ["1 of 3: 33.3 % (0.8 to 90.6)", "–"]
    assert rows["traps served a wrong answer"] == ["1 of 3: 33.3 % (0.8 to 90.6)", "0 of 0"]
    assert rows["traps served from a cache"] == ["1 of 3", "0 of 0"]


def test_one_run_has_one_column_and_an_unlabelled_one_no_table() -> None:
    rows = {row[0]: row[1:] for row in printed(run_table(summary(frame()))) if row}
    assert rows["wrong hits (95 % interval)"] == []
    assert rows["of all served"] == ["3 of 12: 25.0 % (5.5 to 57.2)"]
    assert wrong_rows(None, summary(requests_frame(RECORDS))) == []


def test_the_report_shows_it_after_who_answered() -> None:
    levels = level_frame([], 60 * S_NS)
    views = [RunView(summary(f), f, levels, SALE) for f in (frame(), frame(RECORDS[:5]))]
    page = render(views[0], views[1], None, {}, {"Replay of the journals": pd.DataFrame({"journal": ["a"]})})
    headings = [part.partition("</h2>")[0] for part in page.split("<h2>")[1:]]
    assert headings[-3:] == ["Who answered", "Was it the right answer?", "Replay of the journals"]
    assert "3 of 5: 60.0 % (14.7 to 94.7)" in page
    bare = requests_frame(RECORDS)
    plain = render(RunView(summary(bare), bare, levels, SALE), None, None, {}, {})
    assert "Was it the right answer?" not in plain


# ---------------------------------------------------------------- a whole sale


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> tuple[Resolved, list[Request], RunView, Path]:
    """The bundled sale in the twin, with made-up vectors: questions of one answer are near, and so are some others."""
    sets = ("model.name=fake", "semantic.cosine=0.88", "semantic.vetoes=[]", "overload.enabled=false")
    resolved = load("flash-sale", sets)
    bench = sale.make_bench(resolved, load_calibration(data_path("calibrations", "smollm2-reference.json")))
    corpus = read_corpus(resolved.scenario)
    rng = np.random.default_rng(3)
    topics: dict[str, np.ndarray] = {}
    vectors: dict[bytes, np.ndarray] = {}
    for q in (q for name in semantic_classes(resolved.scenario) for q in corpus[name]):
        topic = topics.setdefault(q.answer_id, rng.normal(size=384))
        mixed = topic + 3 * topics.setdefault(q.intent, rng.normal(size=384)) + 0.2 * rng.normal(size=384)
        vectors[bench._facts.text_key("storefront", q.text)] = (mixed / np.linalg.norm(mixed)).astype(np.float32)
    bench._vectors = vectors
    requests = flash_sale(resolved.scenario, "ci", 30.0, 5)
    folder = tmp_path_factory.mktemp("sale")
    return resolved, requests, sale.twin_sale(bench, resolved, requests, 14.0, 5, folder), folder


def test_the_same_question_is_never_answered_wrongly(
    twin: tuple[Resolved, list[Request], RunView, Path]
) -> None:
    """By construction: equal to the letter is equal in label. If not, labels or sources are mixed up."""
    _, requests, view, _ = twin
    by_id = {r.request_id: r for r in requests}
    same = view.frame[view.frame["wrong_hit"].notna() & view.frame["cosine"].isna()]
    assert set(same["tier"]) >= {"exact", "coalesced"} and len(same) > 60
    assert not same["wrong_hit"].any()
    assert all(by_id[row.request_id].text == by_id[row.source].text for row in same.itertuples())
    similar = view.frame[view.frame["cosine"].notna() & (view.frame["outcome"] == "served")]
    assert similar["wrong_hit"].notna().all()
    assert set(similar["wrong_hit"]) == {True, False}, "the made-up vectors mix some questions up"


def test_the_summary_and_the_file_say_what_the_frame_says(
    twin: tuple[Resolved, list[Request], RunView, Path]
) -> None:
    _, requests, view, folder = twin
    wrong = view.summary.wrong_hits
    assert wrong is not None
    assert wrong.served.count == view.frame["wrong_hit"].sum() > 0
    assert wrong.served.total == view.summary.served
    assert sum(part.count for part in wrong.tiers.values()) == wrong.served.count == wrong.similar.count
    assert wrong.traps.asked == sum(r.trap for r in requests) > 0
    pd.testing.assert_frame_equal(read_run(folder).frame, view.frame)


def test_a_live_run_is_labelled_the_same_way(
    twin: tuple[Resolved, list[Request], RunView, Path], tmp_path: Path
) -> None:
    """The twin's records as an engine's ledger, and clients that saw what it says."""
    resolved, requests, view, folder = twin
    for name in ("ledger", "journal"):
        (tmp_path / name).symlink_to(folder / name)
    seen = []
    for row in view.frame.itertuples():
        status, code = (200, None) if row.outcome == "served" else (503, "overloaded")
        end_ns = int(row.e2e_ns)
        seen.append(Seen(
            row.request_id, row.traffic_class, row.intent, int(row.arrived_ns), 0, status, end_ns, end_ns,
            error_code=code,
        ))
    live = sale.record_live(resolved, requests, seen, 0, 0, 14.0, 5, tmp_path)
    assert live.summary.wrong_hits == view.summary.wrong_hits
    columns = ["request_id", "tier", "wrong_hit", "cosine", "source", "trap", "intent"]
    pd.testing.assert_frame_equal(live.frame[columns], view.frame[columns])

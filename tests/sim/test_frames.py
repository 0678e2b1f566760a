"""Records become the frame of the contract; what the client saw wins; a run comes back from disk as it was."""

import msgspec
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from engine.errors import JournalError
from engine.events import LevelRecord, RequestRecord
from engine.units import MS_NS, S_NS
from sim.desk.frames import level_frame, read_records, read_run, requests_frame, write_run
from sim.desk.series import bin_s, quantiles, queue_age, rates, slowest, tier_counts

COLUMNS = (
    "request_id tenant traffic_class intent arrived_ns tier outcome error_code level cosine wrong_hit prompt_tokens "
    "cached_tokens output_tokens ttft_ns e2e_ns queue_ns lateness_ns replica source trap"
)


def record(request_id: str, at_ms: int, tier: str | None = "model", outcome: str = "served", **more) -> RequestRecord:
    given = {"tenant": "local", "traffic_class": "product_qa", "level": 0, "ttft_ns": 40 * MS_NS, "e2e_ns": 90 * MS_NS}
    if tier == "model":
        given["replica"] = 0
    return RequestRecord(request_id=request_id, arrived_ns=at_ms * MS_NS, tier=tier, outcome=outcome, **given | more)


def seen(*rows: dict) -> pd.DataFrame:
    usual = {"intent": "ask", "scheduled_ns": 0, "ttft_ns": None, "e2e_ns": None, "lateness_ns": 0, "status": 200}
    return pd.DataFrame([usual | row for row in rows])


# ---------------------------------------------------------------- requests


def test_a_record_becomes_a_row_with_the_columns_of_the_contract():
    full = record("a", 1500, tier="semantic", level=2, cosine_millionths=953_000, prompt_tokens=120, cached_tokens=64,
                  output_tokens=20, queue_ns=7, error_code="overloaded", replica=3, source="z")
    frame = requests_frame([full, LevelRecord(5, 1)], start_ns=500 * MS_NS)
    assert " ".join(frame.columns) == COLUMNS
    row = frame.iloc[0]
    assert row.dropna().to_dict() == {
        "request_id": "a", "tenant": "local", "traffic_class": "product_qa", "arrived_ns": 1000 * MS_NS,
        "tier": "semantic", "outcome": "served", "error_code": "overloaded", "level": 2, "cosine": 0.953,
        "prompt_tokens": 120, "cached_tokens": 64, "output_tokens": 20, "ttft_ns": 40 * MS_NS, "e2e_ns": 90 * MS_NS,
        "queue_ns": 7, "replica": 3, "source": "z",
    }
    assert len(frame) == 1


def test_dtypes_do_not_depend_on_what_is_missing():
    some = requests_frame([record("a", 0)], seen({"request_id": "a"}, {"request_id": "b", "status": 0}))
    none = requests_frame([])
    assert list(some.dtypes) == list(none.dtypes)
    assert str(some["ttft_ns"].dtype) == "Int64" and str(some["tier"].dtype) == "string"


def test_rows_stand_in_order_of_arrival_and_ties_keep_their_order():
    frame = requests_frame([record("late", 9), record("x", 3), record("a", 3), record("first", 1)])
    assert list(frame["request_id"]) == ["first", "x", "a", "late"]
    assert list(frame.index) == [0, 1, 2, 3]


def test_what_the_client_saw_replaces_the_gateways_view_where_it_is_known():
    client = seen(
        {"request_id": "a", "intent": "stock", "scheduled_ns": 95 * MS_NS, "ttft_ns": 55 * MS_NS, "e2e_ns": 101 * MS_NS,
         "lateness_ns": 4 * MS_NS},
        {"request_id": "b", "scheduled_ns": 199 * MS_NS},
    )
    frame = requests_frame([record("a", 1100), record("b", 1200), record("c", 1300)], client, S_NS)
    a, b, c = (frame.loc[i] for i in range(3))
    assert (a.intent, a.arrived_ns, a.ttft_ns, a.e2e_ns, a.lateness_ns) == (
        "stock", 95 * MS_NS, 55 * MS_NS, 101 * MS_NS, 4 * MS_NS,
    )
    assert (b.arrived_ns, b.ttft_ns, b.e2e_ns) == (199 * MS_NS, 40 * MS_NS, 90 * MS_NS)
    assert (c.arrived_ns, c.ttft_ns) == (300 * MS_NS, 40 * MS_NS) and pd.isna(c.intent) and pd.isna(c.lateness_ns)
    assert list(frame["outcome"]) == ["served"] * 3


def test_requests_that_only_the_client_knows_of_count_as_failed():
    client = seen(
        {"request_id": "refused", "status": 0, "traffic_class": "recommendation"},
        {"request_id": "hung", "status": None},
        {"request_id": "forbidden", "status": 403},
        {"request_id": "full", "status": 503},
        {"request_id": "draining", "status": 503, "error_code": "draining"},
        {"request_id": "teapot", "status": 418},
        {"request_id": "ghost", "status": 200, "e2e_ns": 5},
    )
    frame = requests_frame([], client).set_index("request_id")
    assert set(frame["outcome"]) == {"failed"}
    assert frame["error_code"].to_dict() == {
        "refused": "connection_failed", "hung": "connection_failed", "forbidden": "forbidden", "full": "overloaded",
        "draining": "draining", "teapot": "http_418", "ghost": "unrecorded",
    }
    assert frame.loc["refused", "traffic_class"] == "recommendation" and frame.loc["hung", "traffic_class"] == "unknown"
    assert frame.loc["ghost", "e2e_ns"] == 5


def test_an_answer_that_never_reached_its_client_was_not_served():
    shed = record("shed", 2, None, "rejected", error_code="overloaded")
    client = seen(
        {"request_id": "cut", "scheduled_ns": 1, "status": 0}, {"request_id": "shed", "scheduled_ns": 2, "status": 503},
        {"request_id": "broke", "scheduled_ns": 3, "error_code": "model_failed"},
    )
    frame = requests_frame([record("cut", 1), shed, record("broke", 3), record("fine", 4)], client)
    assert list(frame["outcome"]) == ["failed", "rejected", "failed", "served"]
    assert list(frame["error_code"].fillna("")) == ["connection_failed", "overloaded", "model_failed", ""]


def test_a_client_that_names_a_request_twice_is_refused():
    with pytest.raises(ValueError, match="'a' is there twice"):
        requests_frame([record("a", 0)], seen({"request_id": "a"}, {"request_id": "a"}))


# ---------------------------------------------------------------- levels


def test_levels_are_a_step_function_over_the_run():
    records = [LevelRecord(8 * S_NS, 2), record("a", 0), LevelRecord(6 * S_NS, 1), LevelRecord(30 * S_NS, 3)]
    frame = level_frame(records, duration_ns=10 * S_NS, start_ns=5 * S_NS)
    assert frame.to_numpy().tolist() == [[0, 0], [S_NS, 1], [3 * S_NS, 2], [10 * S_NS, 2]]


def test_a_level_from_before_the_start_holds_at_the_start():
    records = [LevelRecord(1 * S_NS, 3), LevelRecord(2 * S_NS, 1), LevelRecord(7 * S_NS, 0)]
    frame = level_frame(records, duration_ns=10 * S_NS, start_ns=5 * S_NS)
    assert frame.to_numpy().tolist() == [[0, 1], [2 * S_NS, 0], [10 * S_NS, 0]]
    assert level_frame([], 3).to_numpy().tolist() == [[0, 0], [3, 0]]


# ---------------------------------------------------------------- run folders


def test_a_run_comes_back_as_it_was(tmp_path):
    records = [record("a", 1100), LevelRecord(1200 * MS_NS, 2, "product_qa", 7), record("b", 1300, None, "cancelled")]
    frame = requests_frame(records, seen({"request_id": "a", "scheduled_ns": 99 * MS_NS}), S_NS)
    write_run(tmp_path, frame, records, duration_ns=2 * S_NS, start_ns=S_NS)
    run = read_run(tmp_path)
    pd.testing.assert_frame_equal(run.frame, frame)
    assert run.records == records
    assert (run.start_ns, run.duration_ns) == (S_NS, 2 * S_NS)
    assert run.levels.to_numpy().tolist() == [[0, 0], [200 * MS_NS, 2], [2 * S_NS, 2]]
    assert pq.read_schema(tmp_path / "requests.parquet").names == COLUMNS.split()


def test_a_run_never_overwrites_a_run(tmp_path):
    frame = requests_frame([record("a", 1)])
    write_run(tmp_path, frame, [record("a", 1)], S_NS)
    before = (tmp_path / "ledger" / "records.ndjson").read_bytes()
    with pytest.raises(FileExistsError):
        write_run(tmp_path, frame, [], S_NS)
    assert (tmp_path / "ledger" / "records.ndjson").read_bytes() == before


def test_a_ledger_that_the_engine_wrote_is_left_alone(tmp_path):
    write_run(tmp_path, requests_frame([record("a", 1)]), None, S_NS)
    assert not (tmp_path / "ledger").exists() and read_run(tmp_path).records == []


def test_a_torn_last_record_is_cut_and_damage_before_it_is_an_error(tmp_path):
    records = [record("a", 1), record("b", 2)]
    write_run(tmp_path, requests_frame(records), records, S_NS)
    path = tmp_path / "ledger" / "records.ndjson"
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    assert read_run(tmp_path).records == records[:1]
    path.write_bytes(b"{}\n" + whole)
    with pytest.raises(JournalError, match="record 1 is damaged"):
        read_run(tmp_path)


def test_the_records_of_several_workers_are_one_run(tmp_path):
    """Worker 1 dies at level 2, and its second life begins at 0: it does not stay at 2 for ever."""
    files = {
        "records-0": [record("a", 1, e2e_ns=8 * MS_NS), LevelRecord(20 * MS_NS, 1), LevelRecord(60 * MS_NS, 0)],
        "records-1": [record("b", 3, e2e_ns=2 * MS_NS), LevelRecord(30 * MS_NS, 2), record("c", 35, e2e_ns=5 * MS_NS)],
        "records-1-life-2": [record("d", 50, e2e_ns=0), LevelRecord(70 * MS_NS, 3)],
    }
    (tmp_path / "ledger").mkdir()
    for name, rows in files.items():
        (tmp_path / "ledger" / f"{name}.ndjson").write_bytes(b"".join(msgspec.json.encode(r) + b"\n" for r in rows))
    write_run(tmp_path, requests_frame([]), None, 100 * MS_NS)
    run = read_run(tmp_path)
    told = [r.request_id if isinstance(r, RequestRecord) else r.level for r in run.records]
    assert told == ["b", "a", 1, 2, "c", "d", 0, 3]
    assert read_records(tmp_path) == run.records
    steps = [[0, 0], [20, 1], [30, 2], [40, 1], [60, 0], [70, 3], [100, 3]]
    assert run.levels.to_numpy().tolist() == [[at_ms * MS_NS, level] for at_ms, level in steps]


def test_no_run_is_said_in_words(tmp_path):
    with pytest.raises(JournalError, match="no such run"):
        read_run(tmp_path)


# ---------------------------------------------------------------- quantiles


def test_quantiles_are_of_type_7_and_ignore_what_is_missing():
    found = quantiles(pd.Series([4, 1, None, 3, 2], dtype="Int64"))
    assert (found["p50"].value, found["p95"].value) == (2.5, pytest.approx(3.85))
    assert quantiles(pd.Series([], dtype="Int64"))["p50"].value is None


def test_a_p99_needs_two_hundred():
    assert quantiles(pd.Series(np.arange(199.0)))["p99"].value is None
    assert quantiles(pd.Series(np.arange(200.0)))["p99"].value == pytest.approx(197.01)


def test_an_interval_stands_between_order_statistics():
    """n = 10, median: P(B <= 1) = 0.011 and P(B <= 8) = 0.989, so ranks 2 and 9; p95 has no upper bound."""
    found = quantiles(pd.Series(np.arange(1.0, 11.0)))
    assert (found["p50"].low, found["p50"].high) == (2, 9)
    assert found["p95"].high is None and found["p95"].low == 8
    assert quantiles(pd.Series([7.0]))["p50"].low is None


@pytest.mark.parametrize(("q", "name"), [(0.5, "p50"), (0.9, "p90")])
def test_intervals_cover_the_truth_in_95_of_100_cases(q, name):
    rng = np.random.default_rng(5)
    truth = -np.log(1 - q)
    found = [quantiles(pd.Series(rng.exponential(size=80)), (q,))[name] for _ in range(600)]
    inside = np.mean([(f.low is None or f.low <= truth) and (f.high is None or truth <= f.high) for f in found])
    assert 0.94 <= inside <= 0.99


# ---------------------------------------------------------------- waiting


def brute_age(waits: list[tuple[int, int]], bin_ms: int, bins: int) -> list[int]:
    """Millisecond by millisecond: the age of the oldest that waits, its greatest value in each bin."""
    out = [0] * bins
    for t in range(1, bins * bin_ms + 1):
        ages = [t - s for s, e in waits if s < t <= e]
        out[(t - 1) // bin_ms] = max([out[(t - 1) // bin_ms], *ages])
    return out


def test_queue_age_equals_a_reference_that_looks_every_millisecond():
    rng = np.random.default_rng(11)
    records, waits = [], {"critical": [], "other": []}
    for i in range(120):
        name = "critical" if rng.random() < 0.4 else "other"
        at, queue, e2e = (int(n) for n in 50 * rng.integers((0, 0, 14), (80, 14, 30)))  # often to the edge of a bin
        kind = rng.choice(["model", "vain", "fallback", "exact", "coalesced", "door", "broken", "held"])
        common = {"traffic_class": name, "e2e_ns": e2e * MS_NS}
        if kind in ("model", "broken"):
            tier, outcome = ("model", "served") if kind == "model" else (None, "cancelled")
            more = {"queue_ns": queue * MS_NS, "ttft_ns": (queue + 1) * MS_NS, "replica": 0}
            waits[name].append((at, at + queue))
        elif kind == "held":  # stopped in its prefill
            tier, outcome, more = None, "rejected", {"queue_ns": (queue + 1) * MS_NS, "ttft_ns": None, "replica": 0}
            waits[name].append((at, at + queue + 1))
        elif kind == "vain":
            tier, outcome, more = None, "rejected", {"ttft_ns": None, "replica": 0}
            waits[name].append((at, at + e2e))
        elif kind == "fallback":
            tier, outcome, more = "fallback", "served", {"ttft_ns": e2e * MS_NS, "replica": 0}
            waits[name].append((at, at + e2e))
        elif kind == "door":
            tier, outcome, more = None, "rejected", {"ttft_ns": None}
        else:
            tier, outcome, more = str(kind), "served", {}
        records.append(record(str(i), at, tier, outcome, **common | more))
    frame = requests_frame(records)
    found = queue_age(frame, 250 * MS_NS)
    bins = -(-int((frame["arrived_ns"] + frame["e2e_ns"]).max()) // (250 * MS_NS))
    for name, times in waits.items():
        mine = found[found["traffic_class"] == name]
        assert (mine["age_ns"] // MS_NS).tolist() == brute_age(times, 250, bins)
        assert mine["at_ns"].tolist() == [i * 250 * MS_NS for i in range(bins)]


def test_queue_age_of_nothing_is_nothing():
    assert queue_age(requests_frame([])).empty
    idle = queue_age(requests_frame([record("a", 0, "exact")]))
    assert idle["age_ns"].tolist() == [0]


# ---------------------------------------------------------------- the other series


def test_rates_count_arrivals_when_they_arrive_and_ends_when_they_end():
    records = [
        record("a", 500, e2e_ns=S_NS), record("b", 900, e2e_ns=3 * S_NS), record("c", 2500, "fallback", e2e_ns=MS_NS),
        record("d", 2600, None, "rejected", ttft_ns=None, e2e_ns=MS_NS), record("e", 2700, e2e_ns=60 * S_NS),
    ]
    found = rates(requests_frame(records), duration_s=4.0)
    assert found["offered"].tolist() == [2, 0, 3, 0]
    assert found["served"].tolist() == [0, 1, 1, 2]  # one that ends after the run counts in its last second
    assert found["rejected"].tolist() == [0, 0, 1, 0] and found["fallback"].tolist() == [0, 0, 1, 0]
    assert rates(requests_frame(records), 4.0, width_s=2)["offered"].tolist() == [1.0, 1.5]


def test_bins_are_round_and_few():
    assert [bin_s(s) for s in (1, 240, 241, 3600, 1e6)] == [1, 1, 2, 30, 4167]


def test_tier_counts_add_up_to_what_was_offered():
    lost = [record("c", 0, None, "rejected"), record("d", 0, "model", "failed")]
    records = [record("a", 0), record("b", 0, "exact"), *lost]
    found = tier_counts(requests_frame(records))
    assert found.loc["product_qa"].to_dict() == {
        "exact": 1, "coalesced": 0, "semantic": 0, "approximate": 0, "fallback": 0, "model": 1, "not served": 2,
    }


def test_the_slowest_are_split_into_stages_that_add_up():
    records = [
        record("fast", 0, e2e_ns=50 * MS_NS), record("gone", 0, None, "rejected", e2e_ns=S_NS),
        record("slow", 0, queue_ns=30 * MS_NS, ttft_ns=70 * MS_NS, e2e_ns=300 * MS_NS),
    ]
    found = slowest(requests_frame(records), 2)
    assert found["request_id"].tolist() == ["slow", "fast"]
    assert found.loc[0, ["queue_ms", "prefill_ms", "rest_ms", "e2e_ms"]].tolist() == [30, 40, 230, 300]
    assert len(slowest(requests_frame(records), 1)) == 1

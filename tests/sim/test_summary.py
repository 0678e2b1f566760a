"""The summary against numbers counted by hand, its keys against the contract, and the verdict's ways to say no."""

import io
import json

import msgspec
import pandas as pd
import pytest
from rich.console import Console
from rich.table import Table

from engine.config import ClassConfig, Scenario
from engine.events import LevelRecord, RequestRecord
from engine.units import MS_NS, S_NS
from sim.desk.frames import level_frame, requests_frame
from sim.desk.series import turned_away
from sim.desk.summary import Summary, demo_table, summarise, verdict
from sim.desk.tables import by_class, class_rows, overall, run_table

SALE = Scenario(
    name="flash-sale",
    classes={
        "checkout": ClassConfig(criticality="critical", slo_ttft_ms=1000, slo_e2e_ms=2000, caches="none"),
        "question": ClassConfig(criticality="standard", slo_ttft_ms=1000, slo_e2e_ms=2000),
        "tips": ClassConfig(criticality="sheddable", slo_ttft_ms=1000, slo_e2e_ms=2000, fallback="tips.txt"),
    },
)
MINUTE = [LevelRecord(20 * S_NS, 1), LevelRecord(25 * S_NS, 2), LevelRecord(40 * S_NS, 3), LevelRecord(50 * S_NS, 0)]


def row(cls: str, tier: str | None, outcome: str = "served", ttft: int | None = 10, e2e: int = 20, **more):
    return RequestRecord(
        request_id="r", tenant="local", traffic_class=cls, arrived_ns=0, outcome=outcome, level=0, tier=tier,
        ttft_ns=None if ttft is None else ttft * MS_NS, e2e_ns=e2e * MS_NS, **more,
    )


def gone(cls: str, code: str, outcome: str = "rejected"):
    return row(cls, None, outcome, None, error_code=code)


RECORDS = [
    row("checkout", "model", ttft=100, e2e=500, output_tokens=5),
    row("checkout", "model", ttft=1000, e2e=2000, output_tokens=1),  # within, to the millisecond
    row("checkout", "model", ttft=1001, e2e=1500, output_tokens=11),  # too late
    row("question", "exact"),
    row("question", "coalesced"),
    row("question", "semantic"),
    row("question", "approximate"),
    row("question", "model", ttft=900, e2e=2001),  # too late at the end
    gone("question", "overloaded"),
    gone("question", "deadline_exceeded"),
    gone("question", "rate_limited"),
    gone("question", "model_failed", "failed"),
    row("tips", "fallback", error_code="overloaded"),
    row("tips", "fallback", error_code="deadline_exceeded"),
    row("tips", None, "cancelled", None),
]


def summary(records=RECORDS, kind="live", **more) -> Summary:
    given = {"frame": requests_frame(records), "levels": level_frame(MINUTE, 60 * S_NS), "utilisation": 0.9} | more
    return summarise(given["frame"], SALE, kind, 7, 60.0, given["levels"], given["utilisation"], replicas=2)


# ---------------------------------------------------------------- the numbers


def test_counts_are_those_made_by_hand():
    found = summary()
    assert (found.scenario, found.kind, found.seed, found.duration_s) == ("flash-sale", "live", 7, 60)
    assert found.replicas == 2
    assert (found.offered, found.served) == (15, 10)
    assert found.tiers == {"exact": 1, "coalesced": 1, "semantic": 1, "approximate": 1, "fallback": 2, "model": 4}
    assert found.deflection_rate == 0.4  # a fallback is no deflection
    assert found.goodput_rps == pytest.approx(8 / 60)
    assert found.utilisation == 0.9


def test_what_was_not_served_is_counted_by_code_and_nothing_is_lost():
    found = summary()
    assert found.rejected == {
        "cancelled": 1, "deadline_exceeded": 1, "model_failed": 1, "overloaded": 1, "rate_limited": 1,
    }
    assert found.offered == found.served + sum(found.rejected.values())
    assert found.offered == sum(c.offered for c in found.classes.values())


def test_classes_are_counted_one_by_one():
    found = summary().classes
    assert list(found) == ["checkout", "question", "tips"]
    as_rows = {n: (c.offered, c.served, c.degraded, c.shed, c.slo_attainment) for n, c in found.items()}
    assert as_rows == {
        "checkout": (3, 3, 0, 0, pytest.approx(2 / 3)),
        "question": (9, 5, 1, 2, pytest.approx(4 / 9)),
        "tips": (3, 2, 2, 0, pytest.approx(2 / 3)),
    }


def test_latencies_are_those_of_served_requests_in_milliseconds():
    found = summary()
    assert (found.classes["checkout"].ttft_ms.p50, found.classes["checkout"].ttft_ms.n) == (1000, 3)
    assert found.classes["checkout"].e2e_ms.p95 == pytest.approx(1500 + 0.9 * 500)
    assert (found.e2e_ms.n, found.e2e_ms.p50, found.e2e_ms.p99) == (10, 20, None)
    assert (found.tpot_ms.n, found.tpot_ms.p50) == (2, pytest.approx((400 / 4 + 499 / 10) / 2))


def test_a_p99_comes_with_two_hundred_requests():
    assert summary(RECORDS[:1] * 199).ttft_ms.p99 is None
    assert summary(RECORDS[:1] * 200).ttft_ms.p99 == 100


def test_seconds_at_each_level_add_up_to_the_run():
    assert summary().level_seconds == {"0": 30, "1": 5, "2": 15, "3": 10, "4": 0}
    assert summary(levels=level_frame([], 60 * S_NS)).level_seconds == {"0": 60, "1": 0, "2": 0, "3": 0, "4": 0}


def test_wrong_hits_are_unknown_until_they_are_labelled():
    assert summary().wrong_hit_rate.value is None
    frame = requests_frame(RECORDS)
    frame.loc[frame["tier"].isin(["exact", "semantic", "approximate"]).fillna(False), "wrong_hit"] = False
    frame.loc[(frame["tier"] == "semantic").fillna(False), "wrong_hit"] = True
    found = summary(frame=frame).wrong_hit_rate
    assert found.value == pytest.approx(1 / 3)
    assert (found.low, found.high) == pytest.approx((0.0084, 0.9057), abs=1e-4)  # Clopper-Pearson


def test_an_empty_run_and_an_unknown_class_make_a_summary_too():
    empty = summary([])
    assert (empty.offered, empty.deflection_rate, empty.classes["tips"].slo_attainment) == (0, None, None)
    stray = summary([row("surprise", "model")])
    assert stray.classes["surprise"].served == 1 and stray.goodput_rps == 0  # nobody promised it anything


# ---------------------------------------------------------------- the contract


def test_the_json_is_the_contract_and_comes_back():
    found = summary()
    raw = msgspec.json.encode(found)
    tree = json.loads(raw)
    assert " ".join(tree) == (
        "scenario kind seed duration_s offered served goodput_rps deflection_rate wrong_hit_rate tiers rejected "
        "classes ttft_ms e2e_ms tpot_ms replicas utilisation level_seconds wrong_hits"
    )
    assert list(tree["wrong_hit_rate"]) == ["value", "low", "high"]
    assert " ".join(tree["classes"]["tips"]) == "offered served degraded shed slo_attainment ttft_ms e2e_ms"
    for quantiles in (tree["ttft_ms"], tree["e2e_ms"], tree["tpot_ms"], tree["classes"]["tips"]["ttft_ms"]):
        assert list(quantiles) == ["p50", "p95", "p99", "n"]
    assert msgspec.json.decode(raw, type=Summary) == found


# ---------------------------------------------------------------- side by side


def printed(table: Table) -> str:
    console = Console(width=100, file=io.StringIO(), color_system=None)
    console.print(table)
    return console.file.getvalue()


def shown(live: Summary, twin: Summary) -> str:
    return printed(demo_table(live, twin))


def test_the_demo_table_fits_100_columns_and_says_what_matters():
    many = [row("checkout", "model", ttft=100 + i, e2e=10_000 + i) for i in range(250)]
    text = shown(summary(many + RECORDS), summary(RECORDS, "twin"))
    assert max(map(len, text.splitlines())) <= 100 and "…" not in text
    rows = {line.split("  ")[0].strip(): line.split() for line in text.splitlines() if line.strip()}
    assert rows["offered"][1:] == ["265", "15", "-94", "%"]
    assert rows["by fallback"][2:] == ["2", "2", "0", "%"]
    assert rows["not served: rate_limited"][3:5] == ["1", "1"]
    assert rows["checkout"][1:7] == ["253", "3", "253", "3", "0", "0"]
    assert " ".join(rows["TTFT checkout"][2:]) == "253 3 225.0 ms 1.00 s 338.4 ms 1.00 s 348.5 ms –"
    assert rows["e2e all"][2:4] == ["260", "10"]
    assert "wrong hits" not in text  # nothing was labelled


def test_a_class_name_is_no_markup():
    odd = [row("[red]x[/red]", "model"), gone("tips", "[bold]"), *RECORDS]
    text = shown(summary(odd), summary(odd))
    assert text.count("[red]x[/red]") == 3 and "not served: [bold]" in text


def test_one_run_by_itself_has_one_column():
    text = printed(run_table(summary()))
    rows = {line.split("  ")[0].strip(): line.split() for line in text.splitlines() if line.strip()}
    assert rows["offered"] == ["offered", "15"] and rows["tips"] == ["tips", "3", "2", "2", "0", "67", "%"]
    assert "live" not in text and "twin" not in text


def test_differences_are_relative_for_amounts_and_in_points_for_shares():
    live, twin = summary(RECORDS), summary([*RECORDS, row("question", "exact"), row("tips", "model")], "twin")
    found = {(line.section, line.label): line.difference for line in overall(live, twin)}
    assert found["requests", "offered"] == "+13 %"  # 15 to 17
    assert found["requests", "deflected, of served"] == "+1.7 pp"  # 4 of 10 to 5 of 12
    assert found["requests", "utilisation"] == "0 pp"
    assert found["answered by", "semantic"] == "0 %"
    found = {(line.section, line.label): line.difference for line in by_class(live, twin)}
    assert found["tips", "served"] == "+50 %" and found["checkout", "shed"] == "0 %"


def test_a_missing_run_leaves_dashes():
    found = {line.label: line for line in overall(None, summary())}
    assert (found["offered"].live, found["offered"].twin, found["offered"].difference) == ("–", "15", "–")
    assert [r["run"] for r in class_rows(None, summary())] == ["twin"] * 3
    assert [r["run"] for r in class_rows(summary(), summary())] == ["live", "twin"] * 3


# ---------------------------------------------------------------- the verdict

HELD = [
    row("checkout", "model"), row("checkout", "model", ttft=9000, e2e=9999),  # slow, but the model's
    row("question", "model"), gone("question", "overloaded"), row("tips", "fallback", error_code="overloaded"),
]


def judged(records, levels=MINUTE, scenario=SALE):
    return verdict(requests_frame(records), level_frame(levels, 60 * S_NS), scenario)


def test_a_sale_that_held():
    found = judged(HELD)
    assert found.ok, found.lines
    assert found.lines == [
        "yes: the overload level reached 3; level 2 after 25.0 s",
        "yes: of 1 sheddable requests 1 fell back and 0 were shed",
        "yes: checkout (critical): all 2 answered by the model, none rejected",
    ]
    assert found.sentence.startswith("The sale held")


@pytest.mark.parametrize(
    ("records", "levels", "words"),
    [
        (HELD, MINUTE[:1], "the overload level never rose above 1"),
        ([*HELD[:4], row("tips", "model")], MINUTE, "of 1 sheddable requests 0 fell back and 0 were shed"),
        ([*HELD[:4], row("tips", "fallback", error_code="model_failed")], MINUTE, "0 fell back"),
        ([*HELD, row("checkout", "exact")], MINUTE, "1 of 3 answered by another tier than the model (exact 1)"),
        ([*HELD, gone("checkout", "rate_limited")], MINUTE, "1 of 3 not served (rate_limited 1)"),
        ([*HELD, gone("checkout", "model_failed", "failed")], MINUTE, "1 of 3 not served (model_failed 1)"),
        ([*HELD, row("checkout", None, "cancelled")], MINUTE, "1 of 3 not served (cancelled 1)"),
        (HELD[2:], MINUTE, "checkout (critical) had no request"),
    ],
)
def test_each_way_not_to_hold(records, levels, words):
    found = judged(records, levels)
    assert not found.ok
    no = [line for line in found.lines if line.startswith("no: ")]
    assert len(no) == 1 and words in no[0]
    assert words in found.sentence and "no:" not in found.sentence


def test_level_2_and_one_shed_request_are_enough():
    records = [*HELD[:4], gone("tips", "deadline_exceeded")]
    assert judged(records, MINUTE[:2]).ok
    assert not judged([*HELD[:4], gone("tips", "rate_limited")], MINUTE[:2]).ok  # the limiter is no overload


def test_a_scenario_without_a_critical_class_cannot_hold():
    only = Scenario(name="x", classes={"tips": SALE.classes["tips"]})
    assert "no: the scenario has no critical class" in judged(HELD, scenario=only).lines


def test_turned_away_counts_by_class_and_reason() -> None:
    """Mutation: fallbacks counted as served; a class that lost nobody left out."""
    rows = [
        ("a", "served", "model", None), ("a", "rejected", None, "overloaded"),
        ("b", "served", "fallback", "overloaded"), ("b", "served", "exact", None), ("b", "cancelled", None, None),
    ]
    live = pd.DataFrame(rows, columns=["traffic_class", "outcome", "tier", "error_code"]).astype("string")
    found = turned_away(live, live[:1], ["c", "a", "b"])
    assert found.to_numpy().tolist() == [
        ["c", "none", "", 0, 0], ["a", "rejected", "overloaded", 1, 0],
        ["b", "cancelled", "unknown", 1, 0], ["b", "fallback", "overloaded", 1, 0],
    ]

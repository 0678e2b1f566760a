"""Figures say what the data say: titles, lines, bars and limits are read back from the matplotlib objects."""

import io

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from engine.config import ClassConfig, Scenario
from engine.events import LevelRecord, RequestRecord
from engine.units import MS_NS, S_NS
from sim.desk import plots
from sim.desk.frames import level_frame, requests_frame
from sim.desk.look import LIVE, SLO, TIER_COLOURS, TWIN, plain, style, take_heading

ODD = "$x^{ <b>é🛒"
SALE = Scenario(
    name="sale",
    classes={
        "checkout": ClassConfig(criticality="critical", slo_ttft_ms=1500, slo_e2e_ms=3000, caches="none"),
        "question": ClassConfig(criticality="standard", slo_ttft_ms=2000, slo_e2e_ms=4000),
        ODD: ClassConfig(criticality="sheddable", slo_ttft_ms=4000, slo_e2e_ms=8000, fallback="tips.txt"),
    },
)
LEVELS = [LevelRecord(8 * S_NS, 1), LevelRecord(9 * S_NS, 3), LevelRecord(15 * S_NS, 0)]
DURATION_S = 20


def sale(seed: int, n: int = 400) -> list[RequestRecord]:
    """A made-up sale: a spike from 8 to 14 s in which the queue grows, caches answer, and the sheddable give way."""
    rng = np.random.default_rng(seed)
    out = []
    for i in range(n):
        name = str(rng.choice(list(SALE.classes), p=[0.3, 0.4, 0.3]))
        at_ms = float(rng.uniform(8_000, 14_000) if rng.random() < 0.7 else rng.uniform(0, DURATION_S * 1000))
        crowded = 8_000 < at_ms < 15_000
        common = {
            "request_id": f"{ODD}-{i}", "tenant": "local", "traffic_class": name, "arrived_ns": int(at_ms * MS_NS),
            "level": 3 * crowded, "prompt_tokens": 80,
        }
        if name != "checkout" and rng.random() < 0.3:
            tier = str(rng.choice(["exact", "coalesced", "semantic", "approximate"]))
            out.append(RequestRecord(outcome="served", tier=tier, ttft_ns=0, e2e_ns=MS_NS, **common))
        elif name == ODD and crowded:
            code = {"error_code": "overloaded", "ttft_ns": MS_NS, "e2e_ns": MS_NS}
            out.append(RequestRecord(outcome="served", tier="fallback", **code, **common))
        elif name == "question" and crowded and rng.random() < 0.5:
            out.append(RequestRecord(outcome="rejected", error_code="overloaded", e2e_ns=MS_NS, **common))
        else:
            queue = int(rng.gamma(2, 150 if crowded else 20) * MS_NS)
            ttft = queue + int(rng.uniform(50, 150) * MS_NS)
            e2e = ttft + int(rng.uniform(500, 1500) * MS_NS)
            times = {"queue_ns": queue, "ttft_ns": ttft, "e2e_ns": e2e, "output_tokens": 20, "replica": 0}
            out.append(RequestRecord(outcome="served", tier="model", **times, **common))
    return out


@pytest.fixture(scope="module")
def frames():
    return requests_frame(sale(1)), requests_frame(sale(2))


LEVEL_FRAME = level_frame(LEVELS, DURATION_S * S_NS)


def all_figures(live, twin) -> list[Figure]:
    levels = [None if frame is None else LEVEL_FRAME for frame in (live, twin)]
    return [
        plots.timeline(live, twin, *levels, SALE.classes),
        plots.latency_ecdf(live, twin, SALE),
        plots.tiers_by_class(live, twin),
        plots.waterfall(live if live is not None else twin),
    ]


def lines(axis, colour: str) -> list:
    return [line for line in axis.lines if to_hex(line.get_color()) == colour.lower()]


# ---------------------------------------------------------------- all of them


@pytest.mark.parametrize("missing", ["none", "live", "twin"])
def test_every_figure_is_drawn_without_a_warning_whichever_run_is_missing(frames, missing):
    live, twin = frames
    for figure in all_figures(None if missing == "live" else live, None if missing == "twin" else twin):
        assert isinstance(figure, Figure)
        figure.savefig(io.BytesIO(), format="svg")  # warnings are errors: no missing glyph, no broken markup
        assert figure.get_suptitle()
        for axis in figure.axes:
            has_x = axis.get_xlabel() or axis.get_shared_x_axes().get_siblings(axis) != [axis]
            assert has_x or not axis.axison


def test_an_empty_run_still_makes_figures():
    empty = requests_frame([])
    for figure in all_figures(empty, empty):
        figure.savefig(io.BytesIO(), format="svg")


def test_drawing_changes_neither_the_frames_nor_the_process(frames):
    before = [frame.copy() for frame in frames]
    with mpl.rc_context():
        mpl.rcdefaults()
        settings = dict(mpl.rcParams)
        all_figures(*frames)
        assert dict(mpl.rcParams) == settings
    for frame, copy in zip(frames, before, strict=True):
        assert frame.equals(copy)


def test_style_is_for_those_who_ask():
    with mpl.rc_context():
        style()
        assert mpl.rcParams["axes.spines.top"] is False and mpl.rcParams["svg.fonttype"] == "path"


def test_text_from_outside_has_no_markup_and_no_strange_glyph():
    assert plain(ODD) == r"\$x^{ <b>??"
    assert plain("a" * 50, 10) == "a" * 8 + ".."
    assert plain("tab\there") == "tab?here"


def test_a_page_can_take_the_title_off_and_set_it_itself(frames):
    figure = all_figures(*frames)[1]
    title, names = take_heading(figure)
    assert "came nearest to its SLO" in title and names == ["live", "twin"]
    assert figure.get_suptitle() == ""
    assert not {"live", "twin"} & {text.get_text() for text in figure.texts}
    assert figure.get_supylabel() == "share of served requests"


# ---------------------------------------------------------------- one by one


def test_the_timeline_shows_load_level_waiting_and_losses(frames):
    live, twin = frames
    figure = plots.timeline(live, twin, LEVEL_FRAME, level_frame([], DURATION_S * S_NS), SALE.classes)
    load, level, *queues, lost = figure.axes
    assert len(queues) == len(SALE.classes)
    offered, served_twin, served_live = (line.get_ydata() for line in load.lines)
    assert offered[:-1].sum() == len(live)
    assert served_live[:-1].sum() == (live["outcome"] == "served").sum()
    assert served_twin[:-1].sum() == (twin["outcome"] == "served").sum()
    assert [to_hex(line.get_color()) for line in load.lines[1:]] == [TWIN.lower(), LIVE]  # live lies over twin
    assert lines(level, LIVE)[0].get_xydata().tolist() == [[0, 0], [8, 1], [9, 3], [15, 0], [20, 0]]
    assert set(lines(level, TWIN)[0].get_ydata()) == {0}
    for axis, (name, cls) in zip(queues, SALE.classes.items(), strict=True):
        slo = lines(axis, SLO)[0]
        assert set(slo.get_ydata()) == {cls.slo_ttft_ms / 1000} and slo.get_linestyle() == "--"
        assert axis.get_ylim()[1] > cls.slo_ttft_ms / 1000 and axis.get_ylabel() == "s"
        for colour, frame in ((LIVE, live), (TWIN, twin)):
            mine = frame[frame["traffic_class"] == name]
            assert lines(axis, colour)[0].get_ydata().max() == pytest.approx(mine["queue_ns"].max() / S_NS)
    gone = ((live["outcome"] != "served") | (live["tier"] == "fallback").fillna(False)).sum()
    assert lines(lost, LIVE)[0].get_ydata()[:-1].sum() == gone
    assert lost.get_xlabel() == "seconds since the start" and lost.get_xlim() == (0, DURATION_S)


def test_a_timeline_without_losses_has_a_flat_line_on_a_round_axis(frames):
    calm = frames[0][frames[0]["tier"] == "model"]
    figure = plots.timeline(calm, None, LEVEL_FRAME, None, SALE.classes)
    assert figure.axes[-1].get_ylim() == (0, 1)


def test_the_timelines_title_is_computed(frames):
    live, twin = frames
    figure = plots.timeline(live, twin, LEVEL_FRAME, level_frame([], DURATION_S * S_NS), SALE.classes)
    title, _ = take_heading(figure)
    at = (live["arrived_ns"] // S_NS).value_counts().max()
    away = [
        round(100 * ((f["outcome"] != "served") | (f["tier"] == "fallback").fillna(False)).mean()) for f in (live, twin)
    ]
    assert title == (
        f"At a peak of {at} requests per second, live reached level 3 and turned away {away[0]} %; "
        f"twin reached level 0 and turned away {away[1]} % (fallbacks counted)"
    )


def test_the_latency_figure_is_an_ecdf_of_served_requests_with_the_slo(frames):
    live, twin = frames
    figure = plots.latency_ecdf(live, twin, SALE)
    assert len(figure.axes) == 2 * len(SALE.classes)
    first, end = figure.axes[2], figure.axes[3]  # of the questions, some of which were not served
    served = live[(live["traffic_class"] == "question") & (live["outcome"] == "served")]
    x, y = lines(end, LIVE)[0].get_data()
    assert sorted(x[1:]) == pytest.approx(sorted(served["e2e_ns"] / MS_NS)) and (y[0], y[-1]) == (0, 1)
    assert y[1:] == pytest.approx(np.arange(1, len(served) + 1) / len(served))
    assert f"live {len(served)}, twin" in end.get_title(loc="left")
    assert set(lines(first, SLO)[0].get_xdata()) == {2000} and set(lines(end, SLO)[0].get_xdata()) == {4000}
    assert {axis.get_xscale() for axis in figure.axes} == {"log"}
    for axis in figure.axes:  # nothing that was drawn lies outside
        drawn = np.concatenate([line.get_xdata() for line in lines(axis, LIVE) + lines(axis, TWIN)])
        assert axis.get_xlim()[0] <= drawn.min() and drawn.max() <= axis.get_xlim()[1]
    formatter = first.xaxis.get_major_formatter()
    assert [formatter(ms) for ms in (1, 100, 1000)] == ["1 ms", "100 ms", "1 s"]


def test_a_long_ecdf_is_thinned_but_keeps_its_ends():
    n = 5000
    x, y = plots._ecdf(np.arange(1.0, n + 1))
    assert len(x) <= plots.ECDF_POINTS + 1
    assert (x[0], x[-1], y[0], y[-1]) == (1, n, 0, 1)
    assert y[1:] == pytest.approx(x[1:] / n)


def test_the_latency_title_names_the_class_nearest_to_its_slo():
    def served(name: str, ttft_ms: int) -> RequestRecord:
        return RequestRecord(
            request_id="r", tenant="t", traffic_class=name, arrived_ns=0, outcome="served", level=0, tier="model",
            ttft_ns=ttft_ms * MS_NS, e2e_ns=2 * ttft_ms * MS_NS,
        )

    live = requests_frame([served("checkout", 1200), served("question", 1500), served(ODD, 100)])
    twin = requests_frame([served("checkout", 900), served("question", 1900)])
    title, _ = take_heading(plots.latency_ecdf(live, twin, SALE))
    words = "checkout came nearest to its SLO; p95 to the first token: live 1.20 s, twin 0.90 s, SLO 1.5 s"
    assert title == words  # 80 % of its SLO; question is at 75 %


def test_tier_bars_add_up_live_above_twin(frames):
    live, twin = frames
    figure = plots.tiers_by_class(live, twin, ["question", "never seen"])
    axis = figure.axes[0]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["question", plain(ODD), "checkout"]
    rows: dict[float, list] = {}
    for bar in axis.patches:
        rows.setdefault(round(bar.get_y() + bar.get_height() / 2, 3), []).append(bar)
    assert len(rows) == 2 * len(SALE.classes)
    assert all(sum(bar.get_width() for bar in bars) == pytest.approx(100) for bars in rows.values())
    first = rows[min(rows)]
    mine = live[live["traffic_class"] == "question"]
    exact = [bar.get_width() for bar in first if to_hex(bar.get_facecolor()) == TIER_COLOURS["exact"].lower()]
    assert exact == pytest.approx([100 * (mine["tier"] == "exact").fillna(False).mean()])
    assert axis.yaxis_inverted()
    names = [text.get_text() for text in axis.texts if text.get_text() in ("live", "twin")]
    assert names == ["live", "twin"] * len(SALE.classes)
    assert "%" in axis.get_xlabel()
    share = [round(100 * (f["tier"] == "model").fillna(False).mean()) for f in (live, twin)]
    assert f"{share[0]} % of all requests (live) and {share[1]} %" in take_heading(figure)[0]


def test_the_waterfall_stacks_stages_up_to_the_end(frames):
    live, _ = frames
    figure = plots.waterfall(live, n=4)
    axis = figure.axes[0]
    ends = [bar.get_x() + bar.get_width() for bar in axis.patches[-4:]]
    slowest = live[live["outcome"] == "served"]["e2e_ns"].sort_values(ascending=False).head(4) / S_NS
    assert ends == pytest.approx(slowest.tolist())
    queues = [bar.get_width() for bar in axis.patches[:4]]
    assert queues == pytest.approx((live.loc[slowest.index, "queue_ns"] / S_NS).tolist())
    assert axis.yaxis_inverted() and axis.get_xlabel().startswith("seconds")
    assert f"{slowest.min():.2f} to {slowest.max():.2f} s" in take_heading(figure)[0]

"""The prefix cache's gain over the share of a prompt that was seen before, as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

from sim.desk.look import LIVE, LOST, styled


class ShareRow(NamedTuple):
    """Medians at one share."""

    share: float  # of the shareable part of the prompt
    cached_tokens: int
    ttft_on_ms: float
    ttft_off_ms: float
    whole_on_ms: float
    whole_off_ms: float


def draw_shares(rows: list[ShareRow], prompt_tokens: int, new_tokens: int, path: Path) -> None:
    """Written as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _figure(rows, prompt_tokens, new_tokens).savefig(path, dpi=150)


@styled
def _figure(rows: list[ShareRow], prompt_tokens: int, new_tokens: int) -> Figure:
    figure = Figure(figsize=(7.4, 3.0), layout="constrained")
    shares = [100 * row.cached_tokens / prompt_tokens for row in rows]
    panels = (
        ("to the first token", [row.ttft_on_ms for row in rows], [row.ttft_off_ms for row in rows]),
        (f"to the last of {new_tokens} tokens", [row.whole_on_ms for row in rows], [row.whole_off_ms for row in rows]),
    )
    for axis, (words, on, off) in zip(figure.subplots(1, 2), panels, strict=True):
        axis.plot(shares, off, color=LOST, marker="o", markersize=3, label="without the cache")
        axis.plot(shares, on, color=LIVE, marker="o", markersize=3, label="with the cache")
        gain = f"{off[-1] / on[-1]:.1f} x at {shares[-1]:.0f} %"
        axis.set(title=f"Time {words}, ms: {gain}", xlabel="prompt tokens found in the cache, %", ylim=(0, None))
        axis.legend(loc="lower left")
    figure.suptitle(f"A prompt of {prompt_tokens} tokens, over how much of it was seen before", x=0.008, ha="left")
    return figure

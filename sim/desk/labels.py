"""Was an answer out of a cache the right one? The workload knows: two requests may share an answer if labels are equal.

An answer that the model computed for the asker is no hit, a fallback is none either; both stay without a word. So does
a hit whose source the workload does not know. Labels are the corpus's ``answer_id``: same reply, not same intent.
"""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from sim.desk.series import DEFLECTED, equals
from sim.twin.workload import Request


def labelled(frame: pd.DataFrame, requests: list[Request]) -> pd.DataFrame:
    """The frame with ``intent``, ``trap`` and, for answers out of a cache, ``wrong_hit`` filled from the workload."""
    asked = {r.request_id: r for r in requests}
    labels = {r.request_id: r.label for r in requests if r.label}
    out = frame.copy()
    out["intent"] = frame["intent"].fillna(_of(frame, {i: r.intent for i, r in asked.items()}, "string"))
    out["trap"] = _of(frame, {i: r.trap for i, r in asked.items()}, "boolean")
    mine = _of(frame, labels, "string")
    theirs = frame["source"].map(labels).astype("string")
    hit = equals(frame["outcome"], "served") & frame["tier"].isin(DEFLECTED)
    out["wrong_hit"] = (mine != theirs).astype("boolean").where(hit)  # NA where either label is
    return out


def _of(frame: pd.DataFrame, values: Mapping[str, object], dtype: str) -> pd.Series:
    return frame["request_id"].map(values).astype(dtype)

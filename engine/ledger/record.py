"""Every kind of record that a ledger holds, in one versioned union. The engine's own kinds are those of ``records.py``.

Times are integer nanoseconds on the driver's clock. A kind's place in ``KINDS`` is its number on disk: append only,
never reorder. A field may be added with a default; anything else raises ``SCHEMA_VERSION``.
"""

from __future__ import annotations

from typing import Literal

from engine.records import BackgroundRecord, BreakerRecord, LevelRecord, RequestRecord
from engine.values import Struct

SCHEMA_VERSION = 1


class StepRecord(Struct):
    """One ``StepDone`` of a replica with the shape it cost by; ``StepShape`` says what the counts mean."""

    at_ns: int  # when it was done
    replica: int
    step: int
    steps: int = 1
    prefill_tokens: int = 0
    prefill_rows: int = 0
    decode_rows: int = 0
    decode_kv_tokens: int = 0
    attention_area: int = 0
    forward_ns: int = 0
    sample_ns: int = 0


class FeedbackRecord(Struct):
    """What a client thought of an answer. ``event_id`` is the client's: a second sending is the same event."""

    event_id: str
    at_ns: int  # when it was received
    tenant: str
    request_id: str
    verdict: Literal["good", "bad"]
    user: str = ""
    session: str = ""
    reason: str = ""


class ClickRecord(Struct):
    """What a shopper did. ``amount_cents`` of a purchase, in the shop's currency."""

    event_id: str
    at_ns: int
    tenant: str
    action: Literal["view", "click", "cart", "buy"]
    user: str = ""
    session: str = ""
    item: str = ""
    request_id: str = ""
    amount_cents: int = 0


class LossRecord(Struct):
    """``count`` records of ``kind`` found no room just before ``from_seq``, the place of this record in the log."""

    from_seq: int
    count: int
    kind: str


LogRecord = (
    RequestRecord | StepRecord | LevelRecord | BreakerRecord | BackgroundRecord
    | FeedbackRecord | ClickRecord | LossRecord
)

KINDS: tuple[type[LogRecord], ...] = (
    RequestRecord, StepRecord, LevelRecord, BreakerRecord, BackgroundRecord, FeedbackRecord, ClickRecord, LossRecord,
)
KIND_OF: dict[type[LogRecord], int] = {kind: number for number, kind in enumerate(KINDS)}

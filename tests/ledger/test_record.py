"""Records survive both codecs, in order; a bad one takes no other with it. ``pytest tests/ledger/test_record.py``
"""

from __future__ import annotations

from random import Random

import msgspec
import pyarrow as pa
import pytest

from engine.ledger.columns import schema_of, to_batch, to_rows
from engine.ledger.payload import ARROW, ARROW_FROM_ROWS, ROWS, batches, decode, encodable, encode
from engine.ledger.record import KIND_OF, KINDS, LogRecord, LossRecord
from engine.records import LedgerRecord, RequestRecord
from tests.ledger.trace import click, mixed, request


@pytest.mark.parametrize("count", [1, 2, ARROW_FROM_ROWS - 1, ARROW_FROM_ROWS, 3000])
def test_any_batch_comes_back(count: int) -> None:
    rows = mixed(Random(count), count)
    codec, payload = encode(rows)
    assert codec == (ARROW if count >= ARROW_FROM_ROWS else ROWS)
    assert decode(codec, count, payload) == rows
    found = {place: row for b in batches(codec, count, payload)
             for place, row in zip(b.places, to_rows(b.kind, b.columns), strict=True)}
    assert [found[n] for n in range(count)] == rows


def test_every_kind_of_the_engine_has_its_number_and_none_moved() -> None:
    names = ["RequestRecord", "StepRecord", "LevelRecord", "BreakerRecord", "BackgroundRecord", "FeedbackRecord",
             "ClickRecord", "LossRecord"]
    assert [kind.__name__ for kind in KINDS] == names  # on disk: append only
    assert set(LedgerRecord.__args__) <= set(KIND_OF) == set(LogRecord.__args__)


def test_a_column_that_is_unknown_or_missing_is_no_error() -> None:
    rows = [request(Random(n), n) for n in range(5)]
    batch = to_batch(RequestRecord, rows)
    younger = batch.append_column("colour", pa.array(["red"] * 5))
    assert to_rows(RequestRecord, younger) == rows
    older = batch.drop_columns(["answer_id", "replica"])
    assert to_rows(RequestRecord, older) == [msgspec.structs.replace(r, answer_id="", replica=None) for r in rows]
    assert schema_of(RequestRecord).field("ttft_ns").nullable and not schema_of(RequestRecord).field("e2e_ns").nullable


@pytest.mark.parametrize("count", [3, 600])
def test_a_record_that_cannot_be_written_is_a_loss_and_takes_no_other(count: int) -> None:
    rows: list[LogRecord] = [click(n) for n in range(count)]
    rows[1] = msgspec.structs.replace(click(1), item="\ud800")
    rows[2] = msgspec.structs.replace(request(Random(0), 2), e2e_ns=1 << 70)
    with pytest.raises((ValueError, OverflowError)):
        encode(rows)
    found = encodable(rows, 100)
    assert found[1] == LossRecord(101, 1, "ClickRecord") and found[2] == LossRecord(102, 1, "RequestRecord")
    codec, payload = encode(found)
    assert decode(codec, count, payload) == [rows[0], *found[1:3], *rows[3:]]

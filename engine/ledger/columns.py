"""Records of one kind as an Arrow batch, and back. One column a field, by name; one schema a kind.

Strings that repeat become dictionaries, decided batch by batch: under half of the rows distinct. One schema a kind and
not one wide schema, because a column costs about 100 bytes a batch even where every row is null.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import msgspec
import pyarrow as pa

from engine.ledger.record import LogRecord

TYPE_OF: dict[type, pa.DataType] = {int: pa.int64(), str: pa.string(), bool: pa.bool_(), float: pa.float64()}


@cache
def schema_of(kind: type[LogRecord]) -> pa.Schema:
    """The plain schema of a kind, without dictionaries: what a view's file has."""
    hints = get_type_hints(kind)
    names = [field.name for field in msgspec.structs.fields(kind)]
    return pa.schema([pa.field(name, _arrow_type(hints[name]), nullable=_is_optional(hints[name])) for name in names])


def _is_optional(hint: Any) -> bool:
    return get_origin(hint) in (Union, UnionType) and NoneType in get_args(hint)


def _arrow_type(hint: Any) -> pa.DataType:
    if _is_optional(hint):
        hint = next(arg for arg in get_args(hint) if arg is not NoneType)
    if hint not in TYPE_OF:
        hint = type(get_args(hint)[0])  # a Literal of strings or ints
    return TYPE_OF[hint]


def to_batch(kind: type[LogRecord], rows: Sequence[LogRecord]) -> pa.RecordBatch:
    """``rows``, all of ``kind`` and at least one, as a batch of ``len(rows)``."""
    schema, arrays = schema_of(kind), []
    for field, column in zip(schema, zip(*map(msgspec.structs.astuple, rows), strict=True), strict=True):
        array = pa.array(column, field.type)
        if field.type == pa.string() and len(set(column)) * 2 < len(rows):
            array = array.dictionary_encode()
        arrays.append(array)
    return pa.record_batch(arrays, schema.names)


def to_rows(kind: type[LogRecord], batch: pa.RecordBatch) -> list[LogRecord]:
    """Back to records. A field that the batch lacks takes its default; a column that the kind lacks is passed over."""
    names = [name for name in schema_of(kind).names if name in batch.schema.names]
    columns = [batch.column(name).to_pylist() for name in names]
    if names == schema_of(kind).names:
        return [kind(*row) for row in zip(*columns, strict=True)]
    return [kind(**dict(zip(names, row, strict=True))) for row in zip(*columns, strict=True)]

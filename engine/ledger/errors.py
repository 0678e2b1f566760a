"""What a ledger tells a person when it cannot be opened or read."""

from __future__ import annotations

from engine.errors import UserError


class LedgerError(UserError):
    """A ledger that is damaged before its tail, of a later version, or held by another process."""


class NotRecorded(Exception):
    """The record that was waited for is not in the log: the ring was full, or the ledger was closed without room."""

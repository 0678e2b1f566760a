"""One replica, several gateways: what of its words is whose, and what one that comes late must be told.

The machine says everything once, to all. A gateway takes ``acked_sid`` for its own highest submission seen, so each
gets the ``Pressure`` with that. Pure: sockets are the endpoint's business.
"""

from __future__ import annotations

import msgspec

from engine.events import SID_BITS, KvEvents, Pressure, ReplicaWord
from engine.model.wire import Output


def part_of(output: Output, gateway: int) -> Output:
    """What the gateway of this index is to hear: of its own submissions, and of what concerns none."""
    return Output(
        [_said_to(event, gateway) for event in output.events if _concerns(event, gateway)],
        [said for said in output.tokens if said[0] >> SID_BITS == gateway],
        [said for said in output.logprobs if said[0] >> SID_BITS == gateway],
    )


def _concerns(event: ReplicaWord, gateway: int) -> bool:
    return isinstance(event, Pressure | KvEvents) or event.sid >> SID_BITS == gateway


def _said_to(event: ReplicaWord, gateway: int) -> ReplicaWord:
    if not isinstance(event, Pressure):
        return event
    seen = event.acked_sids or (event.acked_sid,)
    own = next((sid for sid in seen if sid >> SID_BITS == gateway), -1)
    return msgspec.structs.replace(event, acked_sid=own, acked_sids=())


class Board:
    """What every gateway must know, for those that were not there when it was said."""

    def __init__(self) -> None:
        self._pressure: Pressure | None = None
        self._replica = 0
        self._blocks: dict[bytes, None] = {}  # that can be found in the prefix cache

    def post(self, output: Output) -> None:
        """Said to all who are there."""
        for event in output.events:
            if isinstance(event, Pressure):
                self._pressure = event
            elif isinstance(event, KvEvents):
                self._replica = event.replica
                for digest in event.removed:
                    self._blocks.pop(digest, None)
                self._blocks.update(dict.fromkeys(event.stored))

    def read(self, gateway: int) -> Output:
        """All of it, as the gateway of this index is to hear it."""
        events: list[ReplicaWord] = []
        if self._pressure is not None:
            events.append(_said_to(self._pressure, gateway))
        if self._blocks:
            events.append(KvEvents(self._replica, tuple(self._blocks)))
        return Output(events)

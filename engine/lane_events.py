"""What a lane and whoever speaks to its upstream tell each other, beside what a replica's machine says too.

Part of the seam, like ``events.py``. Text and HTTP stay with the driver: a lane learns that a token came, and how a
request ended.
"""

from __future__ import annotations

from typing import Literal

from engine.events import Abort, Drain, ReplicaWord, Submit, Wake
from engine.values import Struct

DoneReason = Literal["stop", "length", "aborted", "failed", "lost", "busy", "refused"]


class Heard(Struct):
    """The first token of a request that runs has come."""

    sid: int


class Done(Struct):
    """A request that ran is over; exactly one for each Dispatch.

    "lost": not the request's fault, and nobody has heard anything. "busy": the upstream takes no more at the moment.
    "refused": it will never take this one.
    """

    sid: int
    reason: DoneReason
    output_tokens: int = 0
    cached_tokens: int = 0  # of the prompt, as far as the upstream says so
    retry_after_ns: int = 0  # "busy": how long it asked us to wait


class Dispatch(Struct):
    """Send it now."""

    sid: int


class Recall(Struct):
    """Nobody wants it any more: hang up. Its Done follows."""

    sid: int


LaneEvent = Submit | Abort | Heard | Done | Drain | Wake
LaneAction = Dispatch | Recall | ReplicaWord

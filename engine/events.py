"""Everything that crosses the seam between a machine and its driver: events in, actions out. Facts, never payload.

Two machines (``policy/gateway.py``, ``policy/replica.py``) are told the time and one event, and answer with actions.
Neither sees a token, a vector, a socket or a clock. Text stays with the driver; machines know it by digest.

Times are integer nanoseconds on the driver's clock; ``*_tokens`` are model tokens; digests are 16 bytes.
``rid`` numbers a request in its gateway, ``sid`` a submission to a replica, ``answer_id`` a finished text.
"""

from __future__ import annotations

from typing import Literal

from engine.hardware import Chunk as Chunk
from engine.hardware import EndReason as EndReason
from engine.hardware import Filled as Filled
from engine.hardware import Grow as Grow
from engine.hardware import Plan as Plan
from engine.hardware import RunStep as RunStep
from engine.hardware import SeqEnd as SeqEnd
from engine.hardware import SeqStart as SeqStart
from engine.hardware import StepDone as StepDone
from engine.hardware import StepFailed as StepFailed
from engine.hardware import StepShape as StepShape
from engine.kept import Entry as Entry
from engine.kept import KeptQuestion as KeptQuestion
from engine.kept import Remember as Remember
from engine.kept import SemanticEntry as SemanticEntry
from engine.kept import TagVersion as TagVersion
from engine.kept import TextMarks as TextMarks
from engine.records import BackgroundRecord as BackgroundRecord
from engine.records import BreakerRecord as BreakerRecord
from engine.records import LedgerRecord as LedgerRecord
from engine.records import LevelRecord as LevelRecord
from engine.records import Outcome as Outcome
from engine.records import RequestRecord as RequestRecord
from engine.records import Tier as Tier
from engine.values import Struct

Criticality = Literal["critical", "standard", "sheddable"]
PRIORITY: dict[str, int] = {"critical": 0, "standard": 1, "sheddable": 2}
SID_BITS = 40  # a submission's id: its gateway's index, then so many bits that count its submissions


# ---------------------------------------------------------------- requests, as a gateway learns of them


class Arrive(Struct):
    """A request whose bytes were read, whose key was checked and whose text was tokenised."""

    rid: int
    request_id: str  # the client's name for it, or one that the ingress made
    tenant: str
    traffic_class: str
    arrived_ns: int  # first byte at the ingress; ages count from here
    prompt_tokens: int
    max_tokens: int
    exact_key: bytes = b""  # digest of tenant scope, model, parameters, conversation; b"" = never answer from a cache
    hard_key: bytes = b""  # the same without the question: what must be equal before similarity counts
    text_key: bytes = b""  # digest of the only user turn; b"" = several turns, or none: not for FindSimilar
    blocks: tuple[bytes, ...] = ()  # hash chain over the prompt's full KV blocks, tagged with the tenant
    pinned_blocks: int = 0  # how many leading blocks are the class's own system prompt
    marks: TextMarks = TextMarks()  # of the only user turn
    draw: int = 0  # a number that nobody can foresee, uniform in [0, 2**62): for what is left to chance
    asker: bytes = b""  # digest of the user whom the tenant names; b"" = nobody is named
    tags: tuple[str, ...] = ()  # what an answer depends on, beside what its class says: Invalidate names them
    attempt: int = 0  # 0 = a first try, by the client's own word


class Charge(Struct):
    """Work for a tenant that no machine schedules (embeddings), out of the same limits; Charged follows at once."""

    rid: int
    tenant: str
    tokens: int  # model tokens; all that it costs
    asker: bytes = b""  # as in Arrive
    draw: int = 0  # as in Arrive


class Cancel(Struct):
    """The client has gone away."""

    rid: int


class Neighbour(Struct):
    """An answered question and its cosine to the one asked."""

    text_key: bytes
    cosine_millionths: int


class Similar(Struct):
    """Answer to FindSimilar: nearest first. All but "ok" are misses; "late" and "failed" speak of the encoder."""

    rid: int
    neighbours: tuple[Neighbour, ...] = ()
    status: Literal["ok", "late", "failed", "unfit"] = "ok"  # unfit: too long to have a vector


class Likeness(Struct):
    """An answer kept under the same hard key, and its cosine to the one asked about."""

    answer_id: str
    cosine_millionths: int


class Placed(Struct):
    """Answer to PlaceAnswer: the nearest other answers, nearest first. Not ``known``: its text has no vector."""

    hard_key: bytes
    answer_id: str
    near: tuple[Likeness, ...] = ()
    known: bool = True


class Invalidate(Struct):
    """These answers may not serve any more, nor those that are just being computed. All that is said must hold.

    With ``version`` only once for each: a version of the tag that is not above the last one says nothing new.
    """

    tenant: str = ""  # "" = all
    answer_id: str = ""
    tag: str = ""
    version: int = 0


class Drain(Struct):
    """Stop taking work; finish what runs."""


class Wake(Struct):
    """The moment named by ``next_wake_ns`` has come."""


# ---------------------------------------------------------------- between gateway and replica


class Submit(Struct):
    """Compute an answer. The gateway's action and the replica's event; exactly one Ended follows."""

    sid: int
    rid: int
    tenant: str
    traffic_class: str
    priority: int  # 0 critical, 1 standard, 2 sheddable
    sent_ns: int
    start_by_ns: int  # dropped with reason "deadline" when not yet scheduled by then
    prompt_tokens: int
    max_tokens: int
    blocks: tuple[bytes, ...] = ()
    pinned_blocks: int = 0
    replica: int = 0


class Abort(Struct):
    """Stop computing ``sid``. Unknown ids are no-ops; a known one still gets its Ended."""

    sid: int


class FirstToken(Struct):
    """``sid`` has produced its first token."""

    sid: int
    queue_ns: int = 0  # from Submit to the first step that held it
    cached_tokens: int = 0


class Ended(Struct):
    """The one end of a Submit. ``answer_*`` are filled in by the driver, which has the text."""

    sid: int
    reason: EndReason
    computed_tokens: int = 0  # prompt tokens computed for it, recomputation after a preemption included
    cached_tokens: int = 0  # prompt tokens found in the prefix cache at first admission
    output_tokens: int = 0
    queue_ns: int = 0
    preemptions: int = 0
    answer_id: str = ""
    answer_bytes: int = 0


class Waiting(Struct):
    """Requests of one class that no step has held yet. Age = now - oldest_ns, true at any later moment."""

    traffic_class: str
    count: int
    oldest_ns: int


class Pressure(Struct):
    """What a replica tells its gateways, once a step at most and only when it changed."""

    replica: int
    acked_sid: int  # the highest submission seen: a gateway adds its own younger ones
    running: int
    waiting: tuple[Waiting, ...] = ()
    queued_tokens: int = 0  # prompt tokens waiting or in prefill
    free_blocks: int = 0  # free or evictable
    backlog_tokens: tuple[int, ...] = ()  # by priority: prompt tokens to compute, as far as they are not cached
    prefill_tps: int = 0  # prompt tokens a second when it has more than it can do; 0 = not known yet
    closed_until_ns: int = 0  # an upstream that has said no: nothing is sent there before
    acked_sids: tuple[int, ...] = ()  # where several gateways submit: the highest of each one; else ()


class KvEvents(Struct):
    """What became findable in a replica's prefix cache since its last word, and what no longer is; net of both."""

    replica: int
    stored: tuple[bytes, ...] = ()
    removed: tuple[bytes, ...] = ()


class ReplicaLost(Struct):
    """A replica has died, its queue and caches with it. An Ended, "lost", follows for each of its submissions."""

    replica: int
    for_good: bool = False  # it has died too often: nobody starts it anew


class ReplicaBack(Struct):
    """It has been started anew, empty."""

    replica: int


# ---------------------------------------------------------------- what else a gateway asks for


class FindSimilar(Struct):
    """Look up the nearest answered questions under the same hard key; waits for Similar."""

    rid: int
    hard_key: bytes
    text_key: bytes
    at_most: int


class StoreVector(Struct):
    """From now on this question, whose vector FindSimilar brought, can be found under its keys."""

    hard_key: bytes
    text_key: bytes


class DropVector(Struct):
    """From now on it cannot."""

    hard_key: bytes
    text_key: bytes


class PlaceAnswer(Struct):
    """Compare the text kept as ``answer_id`` with the others under this hard key; Placed follows, some time.

    Others are compared with it from then on, until DropPlace.
    """

    hard_key: bytes
    answer_id: str


class DropPlace(Struct):
    """No other answer under this hard key is compared with it any more; unknown ones are no-ops."""

    hard_key: bytes
    answer_id: str


class Hold(Struct):
    """Keep what ``rid`` brought, though it has its answer: it may be computed once more, for nobody."""

    rid: int


class Release(Struct):
    """No longer."""

    rid: int


class Attach(Struct):
    """Stream the tokens of submission ``sid`` to ``rid`` too, from its first token on."""

    rid: int
    sid: int


class Answer(Struct):
    """The good end of a request. Tiers "model" and "coalesced" have streamed; the others send ``answer_id`` now."""

    rid: int
    tier: Tier
    answer_id: str = ""
    level: int = 0
    age_ns: int = 0  # of a cached answer
    source: str = ""  # the request_id that computed a cached answer
    cosine_millionths: int | None = None


class Reject(Struct):
    """The other end of a request: a code of ``errors.STATUS_OF_CODE``."""

    rid: int
    code: str
    level: int = 0
    retry_after_ns: int | None = None


class Charged(Struct):
    """Answer to Charge. Without a code it was charged and may begin; else nothing was, and it may not."""

    rid: int
    code: str = ""  # of ``errors.STATUS_OF_CODE``
    retry_after_ns: int | None = None


class StoreAnswer(Struct):
    """Keep the finished text of submission ``sid`` under ``answer_id``."""

    answer_id: str
    sid: int


class DropAnswer(Struct):
    """Nobody refers to ``answer_id`` any more."""

    answer_id: str


class Record(Struct):
    """Append to the ledger."""

    record: LedgerRecord


ReplicaWord = FirstToken | Ended | Pressure | KvEvents
GatewayEvent = (
    Arrive | Charge | Similar | Placed | Invalidate | Remember | ReplicaWord | ReplicaLost | ReplicaBack | Cancel | Wake
    | Drain
)
Upkeep = StoreAnswer | DropAnswer | StoreVector | DropVector | PlaceAnswer | DropPlace
GatewayAction = FindSimilar | Submit | Attach | Abort | Answer | Reject | Charged | Hold | Release | Upkeep | Record
ReplicaEvent = Submit | Abort | StepDone | StepFailed | Plan | Drain | Wake
ReplicaAction = RunStep | ReplicaWord

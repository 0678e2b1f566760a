"""The response caches together: the same request's answer, a similar question's answer, and who still needs which text.

One text may be referred to by entries of both caches; it is dropped when the last of them has left. Comparisons wait
here until both answers are known well enough to say whether they are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from engine.config import GatewayConfig
from engine.events import (
    Arrive,
    DropAnswer,
    DropPlace,
    DropVector,
    Ended,
    Invalidate,
    KeptQuestion,
    Neighbour,
    PlaceAnswer,
    Placed,
    Remember,
    StoreAnswer,
    StoreVector,
    TextMarks,
    Upkeep,
)
from engine.policy.exact import Entry, ExactCache
from engine.policy.flights import Flight
from engine.policy.identity import Identities
from engine.policy.invalidation import Invalidations
from engine.policy.jobs import Job
from engine.policy.rules import Key, Lesson
from engine.policy.semantic import Comparison, Decision, SemanticCache, SemanticEntry
from engine.values import Struct

PENDING = 1000  # comparisons that wait for a vector


class Open(Struct):
    """A comparison whose outcome is not known yet. ``job``: an audit's; else a request was computed beside an entry."""

    entry: SemanticEntry
    lesson: Lesson | None
    asker: bytes
    hard_key: bytes
    job: Job | None = None
    ended: Ended | None = None


class Outcome(Struct):
    """``right``: both answers say the same; None = cannot be told."""

    open: Open
    right: bool | None


class Answers:
    """Exact and semantic cache of one gateway."""

    def __init__(self, config: GatewayConfig, awaited: Callable[[Key], bool] = lambda key: False) -> None:
        """``awaited``: whether a question is being computed, and is to be found meanwhile."""
        self._awaited = awaited
        self.exact = ExactCache(config.exact)
        self.identities = Identities(config.semantic)
        self.semantic = SemanticCache(config.semantic, self.identities.of)
        self.invalidations = Invalidations()
        self._semantic = config.semantic.enabled
        self._tags = {name: cls.depends_on for name, cls in config.classes.items()}
        self._pending: dict[tuple[bytes, str], list[Open]] = {}  # by hard key, and the newer answer's id
        self._outcomes: list[Outcome] = []

    def tags_of(self, ask: Arrive) -> tuple[str, ...]:
        """What its answer depends on."""
        own = self._tags[ask.traffic_class]
        return own if not ask.tags else tuple(dict.fromkeys((*own, *ask.tags)))

    def same(self, now_ns: int, key: bytes, stale_ok: bool) -> Entry | None:
        """The answer to the very same request."""
        return self.exact.get(now_ns, key, stale_ok) if key else None

    def similar(
        self, now_ns: int, ask: Arrive, near: Sequence[Neighbour], relaxed: bool,
        flying: Callable[[Key], TextMarks | None],
    ) -> Decision:
        """The answer to a question that means the same, there or on its way."""
        return self.semantic.decide(now_ns, ask, near, relaxed, flying)

    def keep(self, now_ns: int, flight: Flight, has_vector: bool, ended: Ended) -> list[Upkeep]:
        """A finished answer: into the caches that its class uses, and what the driver has to do for it."""
        ask, tags = flight.ask, flight.tags
        out: list[Upkeep] = []
        if self.invalidations.spoiled(flight.since, ask.tenant, tags):
            return out
        kept = self.exact.put(
            now_ns, flight.key or ask.exact_key, ended.answer_id, ended.answer_bytes, ask.request_id,
            ended.output_tokens, ask.tenant, tags,
        )
        if has_vector:
            entry = SemanticEntry(
                ask.hard_key, ask.text_key, ended.answer_id, now_ns, ask.request_id, ended.output_tokens, ask.tenant,
                tags, ask.marks, ask.asker,
            )
            self.semantic.put(entry, now_ns)
            out.append(StoreVector(ask.hard_key, ask.text_key))  # anew: it may have been dropped since it took off
        if kept or has_vector:
            out.append(StoreAnswer(ended.answer_id, ended.sid))
        if has_vector and self.identities.kind == "meaning" and not self.identities.of(ask.hard_key, ended.answer_id):
            out.append(PlaceAnswer(ask.hard_key, ended.answer_id))
        return out + self.let_go()

    # ------------------------------------------------------------ comparisons

    def compare(self, flight: Flight, with_: Comparison, ended: Ended) -> None:
        """A request was computed and kept though something similar was there: do both answers say the same?"""
        entry, asked = with_.entry, flight.ask
        lesson = Lesson(entry.key, with_.cosine_millionths, right=False, audit=False) if with_.lesson else None
        self._compare(Open(entry, lesson, asked.asker, asked.hard_key), ended, flight.since)

    def audit(self, job: Job, entry: SemanticEntry, ended: Ended) -> None:
        """A hit was computed anew, and that was kept."""
        lesson = Lesson(
            entry.key, job.cosine_millionths, right=False, audit=True, approximate=job.tier == "approximate"
        )
        self._compare(Open(entry, lesson, b"", job.ask.hard_key, job, ended), ended, job.since)

    def _compare(self, open_: Open, ended: Ended, since: int) -> None:
        """What was called off ``since`` may well say something else now: that is no error."""
        if self.invalidations.spoiled(since, open_.entry.tenant, open_.entry.tags):
            return self._settle(open_, None)
        right = self.identities.same(open_.entry.answer_id, Placed(open_.hard_key, ended.answer_id))
        key = open_.hard_key, ended.answer_id
        kept = self.semantic.refers_to(ended.answer_id, open_.hard_key) and not self.identities.of(*key)
        if right is None and self.identities.kind == "meaning" and kept and len(self._pending) < PENDING:
            self._pending.setdefault(key, []).append(open_)  # its vector was asked for when it was kept
        else:
            self._settle(open_, right)
        return None

    def placed(self, event: Placed) -> None:
        """An answer's vector has been compared with those of the answers that are kept."""
        opens = self._pending.pop((event.hard_key, event.answer_id), [])
        rights = [self.identities.same(open_.entry.answer_id, event) for open_ in opens]
        if self.semantic.refers_to(event.answer_id, event.hard_key):
            self.identities.place(event)
        for open_, right in zip(opens, rights, strict=True):
            self._settle(open_, right)

    def _settle(self, open_: Open, right: bool | None) -> None:
        if right is not None:
            lesson = open_.lesson
            if lesson is not None and right:
                lesson = Lesson(lesson.key, lesson.cosine_millionths, True, lesson.audit, lesson.approximate)
            self.semantic.learn(open_.entry, lesson, right, open_.asker)
        self._outcomes.append(Outcome(open_, right))

    def outcomes(self) -> list[Outcome]:
        """Comparisons that have come out since the last call."""
        out, self._outcomes = self._outcomes, []
        return out

    # ------------------------------------------------------------ leaving

    def invalidate(self, what: Invalidate) -> list[Upkeep] | None:
        """Let go of all that is meant, and of what is being computed of it, once it is there. None: it was no news."""
        if not self.invalidations.take(what):
            return None
        self.exact.invalidate(what)
        self.semantic.invalidate(what)
        return self.let_go()

    def let_go(self, texts: Iterable[str] = (), questions: Iterable[SemanticEntry] = ()) -> list[Upkeep]:
        """What nobody needs any more: of what has left since the last call, and of these."""
        gone = dict.fromkeys((*texts, *self.exact.drain_dropped()))
        keys: dict[Key, None] = {}
        places: dict[tuple[bytes, str], None] = {}
        for entry in (*questions, *self.semantic.drain_dropped()):
            gone[entry.answer_id] = keys[entry.key] = places[entry.hard_key, entry.answer_id] = None
        out: list[Upkeep] = [DropVector(*key) for key in keys if not self.found(key)]
        for hard_key, answer_id in places if self.identities.kind == "meaning" else ():
            if not self.semantic.refers_to(answer_id, hard_key):
                self.identities.forget(hard_key, answer_id)
                out.append(DropPlace(hard_key, answer_id))
        for answer_id in gone:
            if not self.semantic.refers_to(answer_id) and not self.exact.refers_to(answer_id):
                out.append(DropAnswer(answer_id))
        return out

    def found(self, question: Key) -> bool:
        """Whether its vector is still needed: it is answered, or being answered."""
        return self.semantic.holds(*question) or self._awaited(question)

    # ------------------------------------------------------------ from one life to the next

    def kept(self) -> Remember:
        """All that is kept, as ``remember`` wants it; not what the semantic cache's rule has learned."""
        group_of = self.identities.of if self.identities.kind == "meaning" else lambda *_: ""
        similar = [
            KeptQuestion(e, kept.agreed, kept.trusted, group_of(e.hard_key, e.answer_id))
            for kept in self.semantic.kept() for e in (kept.entry,)
        ]
        return Remember(tuple(self.exact.entries()), tuple(similar), self.invalidations.versions())

    def remember(self, now_ns: int, what: Remember) -> list[Upkeep]:
        """Take back what is young enough, has room and was not called off since the start; let go of the rest."""
        self.invalidations.take_back(what.versions)
        for entry in what.exact:
            if not self.invalidations.spoiled(0, entry.tenant, entry.tags):
                self.exact.take_back(now_ns, entry)
        for kept in what.similar if self._semantic else ():
            if not self.invalidations.spoiled(0, kept.entry.tenant, kept.entry.tags):
                self.semantic.take_back(kept, now_ns)
        entries = [kept.entry for kept in what.similar]
        out = self.let_go((entry.answer_id for entry in what.exact), entries)
        return out + self._regroup(what.similar) if self.identities.kind == "meaning" else out

    def _regroup(self, similar: tuple[KeptQuestion, ...]) -> list[Upkeep]:
        """Answers into the groups that they were in; those that had none yet are to be compared."""
        out: dict[Upkeep, None] = {}
        for kept in similar:
            hard_key, answer_id = kept.entry.hard_key, kept.entry.answer_id
            if not self.semantic.refers_to(answer_id, hard_key) or self.identities.of(hard_key, answer_id):
                continue
            if kept.group:
                self.identities.take_back(hard_key, answer_id, kept.group)
            else:
                out[PlaceAnswer(hard_key, answer_id)] = None
        return list(out)

    def check(self) -> None:
        """Invariants."""
        self.exact.check()
        self.semantic.check()
        self.invalidations.check()
        self.identities.check({(entry.hard_key, entry.answer_id) for entry in self.semantic.entries()})
        assert not self._outcomes, "outcomes: taken within the event that brought them"

"""Semantic cache: may the answer to a similar question serve this one? It knows the entries; a ``Rule`` decides.

Hard key apart from similarity: who asks and under what context must be equal (an index of its own per hard key), only
what they ask may differ. Single-turn questions only. Under overload a sheddable class accepts the rule's relaxed
standard and older answers. An entry in quarantine serves nobody but its own asker, and is no evidence, until enough
others got an equal answer. Holds facts about answers; vectors and neighbours are the driver's. Cosines are millionths.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

from engine.cache_config import SemanticConfig
from engine.events import Arrive, Invalidate, KeptQuestion, Neighbour, TextMarks
from engine.events import SemanticEntry as SemanticEntry
from engine.policy.choice import rule_of
from engine.policy.rules import DRAWS, Candidate, Key, Lesson, RuleStats
from engine.policy.tags import TagIndex, meant
from engine.units import s_to_ns
from engine.values import Struct

EXPIRED_PER_PUT = 2  # more than a put adds, so what nobody asks for again leaves too


class SemanticHit(Struct):
    """An entry that may serve, and how near it is; with ``audit`` it is to be computed anew and compared."""

    entry: SemanticEntry
    cosine_millionths: int
    approximate: bool  # by the relaxed standard, or past its time to live
    audit: bool = False


class Ride(Struct):
    """A question that is just being computed, and would serve."""

    key: Key
    cosine_millionths: int


class Comparison(Struct):
    """An entry whose answer is to be held against the one that is computed now; ``lesson``: for the rule too."""

    entry: SemanticEntry
    cosine_millionths: int
    lesson: bool


class Decision(Struct):
    """At most one of ``hit`` and ``ride``; neither is a miss. ``compare``: for the rule, and one out of quarantine."""

    hit: SemanticHit | None = None
    ride: Ride | None = None
    compare: tuple[Comparison, ...] = ()


class SemanticStats(Struct):
    """``asked`` = hits + approximate_hits + rides + misses."""

    entries: int
    asked: int
    hits: int
    approximate_hits: int
    misses: int
    rule: RuleStats
    rides: int = 0
    quarantined: int = 0  # entries, now
    invalidations: int = 0


class SemanticCache:
    """Entries by hard key and text key; the driver's index holds a vector for each of them."""

    def __init__(self, config: SemanticConfig, identity: Callable[[bytes, str], str] = lambda _, answer_id: answer_id
    ) -> None:
        """``identity``: answers to which it gives the same name, under a hard key, say the same; "" = not known."""
        self._config, self._identity = config, identity
        self.rule = rule_of(config)
        self._ttl_ns = s_to_ns(config.ttl_s)
        self._keep_ns = self._ttl_ns + s_to_ns(config.stale_s)
        self._audits = round(config.audit_share * DRAWS)
        self._near_enough = round(config.approximate_cosine * 1_000_000)
        self._entries: OrderedDict[Key, SemanticEntry] = OrderedDict()  # least recently used first
        self._tagged: TagIndex[Key] = TagIndex()
        self._agreed: dict[Key, tuple[bytes, ...]] = {}  # who else got an equal answer; entries in quarantine only
        self._references: dict[str, dict[bytes, int]] = {}  # answer id -> hard key -> entries
        self._dropped: list[SemanticEntry] = []
        self._hits = self._approximate = self._rides = self._misses = self._invalidations = 0

    def decide(
        self, now_ns: int, ask: Arrive, neighbours: Sequence[Neighbour], relaxed: bool,
        flying: Callable[[Key], TextMarks | None] = lambda key: None,
    ) -> Decision:
        """What the rule makes of the nearest questions. ``flying``: marks of one that may be waited for, or None."""
        near: list[Candidate] = []
        under_way: set[Key] = set()
        suspect: Comparison | None = None
        for neighbour in neighbours:  # nearest first
            key = (ask.hard_key, neighbour.text_key)
            cosine = neighbour.cosine_millionths
            entry = self._entries.get(key)
            age_ns = now_ns - entry.stored_ns if entry is not None else self._keep_ns + 1
            servable = age_ns <= (self._keep_ns if relaxed else self._ttl_ns)
            if not servable and (marks := flying(key)) is not None:
                under_way.add(key)  # perhaps a new answer in place of an old one
                near.append(Candidate(key, cosine, "", marks))
                continue
            if entry is None or age_ns > self._keep_ns:
                continue  # it left while the question was under way
            if not self._trusted(entry, ask.asker):
                if suspect is None and cosine >= self._near_enough:
                    suspect = Comparison(entry, cosine, lesson=False)
                continue
            said_here = self._identity(entry.hard_key, entry.answer_id)
            near.append(Candidate(key, cosine, said_here, entry.marks, servable))
        said = self.rule.judge(ask.marks, near, relaxed, ask.draw // DRAWS)
        if said.serve is None:
            self._misses += 1
            compare = () if suspect is None else (suspect,)
            beside = near[said.compare] if said.compare is not None else None
            if beside is not None and beside.key not in under_way:
                compare = (*compare, Comparison(self._entries[beside.key], beside.cosine_millionths, lesson=True))
            return Decision(compare=compare)
        chosen = near[said.serve]
        if chosen.key in under_way:
            self._rides += 1
            return Decision(ride=Ride(chosen.key, chosen.cosine_millionths))
        entry = self._entries[chosen.key]
        self._entries.move_to_end(chosen.key)
        approximate = said.approximate or now_ns - entry.stored_ns > self._ttl_ns
        self._hits += not approximate
        self._approximate += approximate
        return Decision(SemanticHit(entry, chosen.cosine_millionths, approximate, self.is_audited(ask)))

    def is_audited(self, ask: Arrive) -> bool:
        """Whether chance has it that its hit is looked at."""
        return ask.draw % DRAWS < self._audits

    def entry(self, key: Key) -> SemanticEntry | None:
        """The answer to this very question."""
        return self._entries.get(key)

    def _trusted(self, entry: SemanticEntry, asker: bytes) -> bool:
        return entry.key not in self._agreed or bool(asker and asker == entry.asker)

    def learn(self, entry: SemanticEntry, lesson: Lesson | None, right: bool, asker: bytes) -> None:
        """A comparison with the entry's answer has come out; ``asker`` got the other one."""
        if lesson is not None:
            self.rule.learn(lesson)
            if entry.key not in self._entries:
                self.rule.forget(entry.key)  # it has left meanwhile
        agreed = self._agreed.get(entry.key)
        if agreed is None or not right or not asker or asker == entry.asker or asker in agreed:
            return
        if self._entries[entry.key].answer_id != entry.answer_id:
            return
        if len(agreed) + 1 >= self._config.quarantine:
            del self._agreed[entry.key]
        else:
            self._agreed[entry.key] = (*agreed, asker)

    def put(self, entry: SemanticEntry, now_ns: int) -> None:
        """Keep an answered question, in place of an older answer to the very same one."""
        key = entry.key
        under = self._references.setdefault(entry.answer_id, {})
        under[entry.hard_key] = under.get(entry.hard_key, 0) + 1
        old = self._entries.get(key)
        agreed = self._agreed_anew(old, entry)
        if old is not None:
            self._drop(old, again=old.answer_id == entry.answer_id)  # its text may go, its vector stays
        self._entries[key] = entry
        self._tagged.add(key, entry.tags)
        if len(agreed) < self._config.quarantine:
            self._agreed[key] = agreed
        for _ in range(EXPIRED_PER_PUT):
            oldest = next(iter(self._entries.values()))
            if now_ns - oldest.stored_ns > self._keep_ns:
                self._drop(oldest)
        while len(self._entries) > self._config.max_entries:
            self._drop(next(iter(self._entries.values())))

    def take_back(self, kept: KeptQuestion, now_ns: int) -> bool:
        """An entry of a former life, no less in quarantine than it was. False: too old, or there is one already."""
        entry = kept.entry
        if entry.key in self._entries or now_ns - entry.stored_ns > self._keep_ns:
            return False
        self.put(entry, now_ns)
        if kept.trusted or len(kept.agreed) >= self._config.quarantine:
            self._agreed.pop(entry.key, None)
        else:
            self._agreed[entry.key] = kept.agreed
        return True

    def kept(self) -> list[KeptQuestion]:
        """All, least recently used first, as ``take_back`` wants them; not what the rule has learned."""
        isolates = self._config.quarantine > 0
        return [
            KeptQuestion(entry, self._agreed.get(key, ()), isolates and key not in self._agreed)
            for key, entry in self._entries.items()
        ]

    def _agreed_anew(self, old: SemanticEntry | None, entry: SemanticEntry) -> tuple[bytes, ...]:
        """Who has agreed with an entry when it takes another one's place: nobody, if it says something else."""
        if old is None or old.answer_id != entry.answer_id:
            return ()
        agreed = self._agreed.get(entry.key)
        if agreed is None:
            return (b"",) * self._config.quarantine  # out of quarantine it was, and it stays
        return agreed if old.asker in (b"", entry.asker, *agreed) else (*agreed, old.asker)

    def invalidate(self, what: Invalidate) -> int:
        """Let go of all that is meant; how many there were."""
        keys = self._tagged.keys(what.tag) if what.tag else list(self._entries)
        gone = [e for key in keys if meant(what, (e := self._entries[key]).tenant, e.tags, e.answer_id)]
        for entry in gone:
            self._drop(entry)
        self._invalidations += len(gone)
        return len(gone)

    def holds(self, hard_key: bytes, text_key: bytes) -> bool:
        """Is there an answer to this question?"""
        return (hard_key, text_key) in self._entries

    def entries(self) -> list[SemanticEntry]:
        """All, least recently used first."""
        return list(self._entries.values())

    def refers_to(self, answer_id: str, hard_key: bytes | None = None) -> bool:
        """Does an entry still need this text? With a hard key: one under that."""
        under = self._references.get(answer_id)
        return under is not None and (hard_key is None or hard_key in under)

    def drain_dropped(self) -> list[SemanticEntry]:
        """Entries that left since the last call: their vectors may go, and their texts if nobody else needs them."""
        out, self._dropped = self._dropped, []
        return out

    def stats(self) -> SemanticStats:
        """Size now, counters since the start."""
        asked = self._hits + self._approximate + self._rides + self._misses
        return SemanticStats(
            len(self._entries), asked, self._hits, self._approximate, self._misses, self.rule.stats(), self._rides,
            len(self._agreed), self._invalidations,
        )

    def check(self) -> None:
        """Invariants."""
        references: dict[str, dict[bytes, int]] = {}
        for key, entry in self._entries.items():
            assert key == entry.key, "an entry lies under its own key"
            under = references.setdefault(entry.answer_id, {})
            under[entry.hard_key] = under.get(entry.hard_key, 0) + 1
        assert references == self._references, "every answer is referenced as often as entries name it"
        assert len(self._entries) <= self._config.max_entries, "never more entries than allowed"
        assert all(key in self._entries for key in self._agreed), "quarantine: only of entries that are there"
        assert all(len(who) < self._config.quarantine for who in self._agreed.values()), "quarantine ends in time"
        self._tagged.check({key: entry.tags for key, entry in self._entries.items()})
        self.rule.check()

    def _drop(self, entry: SemanticEntry, again: bool = False) -> None:
        """``again``: the same answer takes its place, so that what was learned of it stays true."""
        del self._entries[entry.key]
        self._tagged.remove(entry.key, entry.tags)
        self._agreed.pop(entry.key, None)
        if not again:
            self.rule.forget(entry.key)
        self._unreference(entry)
        self._dropped.append(entry)

    def _unreference(self, entry: SemanticEntry) -> None:
        under = self._references[entry.answer_id]
        under[entry.hard_key] -= 1
        if not under[entry.hard_key]:
            del under[entry.hard_key]
            if not under:
                del self._references[entry.answer_id]

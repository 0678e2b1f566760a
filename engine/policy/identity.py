"""Do two answers say the same? By their digests where texts repeat, else by clusters of the answers' own vectors.

Canned and retrieved answers repeat to the letter. A model's own words do not: there an answer joins the group of the
nearest group leader that is near enough (leader clustering, Hartigan 1975), and otherwise leads one of its own. That
two answers with near vectors say the same is a proxy; what it is worth was measured (``sim/quality/README.md``). A text
that several hard keys have is in a group under each: what one tenant's answers are near to is no news to another's.
"""

from __future__ import annotations

from engine.cache_config import SemanticConfig
from engine.events import Likeness, Placed


class Identities:
    """Groups of the answers that are kept. ``""`` stands for: not known, or not yet."""

    def __init__(self, config: SemanticConfig) -> None:
        self.kind = config.identity
        self._least = round(config.same_answer_cosine * 1_000_000)
        self._groups: dict[tuple[bytes, str], str] = {}
        """(Hard key, answer id) -> its group there, named by its first leader; "meaning" only."""

    def of(self, hard_key: bytes, answer_id: str) -> str:
        """Answers of one name under a hard key say the same."""
        match self.kind:
            case "text":
                return answer_id
            case "meaning":
                return self._group(hard_key, answer_id)
            case "unknown":
                return ""

    def place(self, placed: Placed) -> None:
        """An answer that is kept has been compared with the others."""
        key = placed.hard_key, placed.answer_id
        if self.kind == "meaning" and placed.known and not self._group(*key):
            group = self._join(placed.hard_key, placed.near) or placed.answer_id
            self._groups[key] = group

    def take_back(self, hard_key: bytes, answer_id: str, group: str) -> None:
        """It was in this group in a former life."""
        self._groups.setdefault((hard_key, answer_id), group)

    def _group(self, hard_key: bytes, answer_id: str) -> str:
        return self._groups.get((hard_key, answer_id), "")

    def _join(self, hard_key: bytes, near: tuple[Likeness, ...]) -> str:
        for like in near:
            if like.cosine_millionths < self._least:
                break
            group = self._group(hard_key, like.answer_id)
            if group and (group == like.answer_id or not self._group(hard_key, group)):  # a leader, or has lost his
                return group
        return ""

    def same(self, kept: str, placed: Placed) -> bool | None:
        """Whether the kept answer says what the placed one does; None = cannot be told."""
        if kept == placed.answer_id:
            return True
        if self.kind == "text":
            return False
        hard_key = placed.hard_key
        group, other = self._group(hard_key, kept), self._group(hard_key, placed.answer_id)
        if group and other:
            return group == other
        if not group or not placed.near:
            return None
        return any(
            like.cosine_millionths >= self._least and self._group(hard_key, like.answer_id) == group
            for like in placed.near
        )

    def forget(self, hard_key: bytes, answer_id: str) -> None:
        """Nobody keeps it under this hard key any more; others may keep it under theirs. Unknown ones are no-ops.

        A client's tags are part of the hard key: one popular answer could be under new ones for ever.
        """
        self._groups.pop((hard_key, answer_id), None)

    def __len__(self) -> int:
        """Places that have a group."""
        return len(self._groups)

    def check(self, kept: set[tuple[bytes, str]]) -> None:
        """Invariants. ``kept``: hard keys and the answers that are kept under them."""
        assert self._groups.keys() <= kept, "groups: only of answers that are kept, each under its own hard key"

"""Do two answers say the same? By their digests where texts repeat, else by clusters of the answers' own vectors.

Canned and retrieved answers repeat to the letter. A model's own words do not: there an answer joins the group of the
nearest group leader that is near enough (leader clustering, Hartigan 1975), and otherwise leads one of its own. That
two answers with near vectors say the same is a proxy; what it is worth was measured (``sim/quality/README.md``).
"""

from __future__ import annotations

from engine.cache_config import SemanticConfig
from engine.events import Likeness, Placed


class Identities:
    """Groups of the answers that are kept. ``""`` stands for: not known, or not yet."""

    def __init__(self, config: SemanticConfig) -> None:
        self.kind = config.identity
        self._least = round(config.same_answer_cosine * 1_000_000)
        self._groups: dict[str, str] = {}  # answer id -> its group, named by its first leader; "meaning" only

    def of(self, answer_id: str) -> str:
        """Answers of one name say the same."""
        match self.kind:
            case "text":
                return answer_id
            case "meaning":
                return self._groups.get(answer_id, "")
            case "unknown":
                return ""

    def place(self, placed: Placed) -> None:
        """An answer that is kept has been compared with the others."""
        if self.kind == "meaning" and placed.known and placed.answer_id not in self._groups:
            self._groups[placed.answer_id] = self._join(placed.near) or placed.answer_id

    def _join(self, near: tuple[Likeness, ...]) -> str:
        for like in near:
            if like.cosine_millionths < self._least:
                break
            group = self._groups.get(like.answer_id, "")
            if group and (group == like.answer_id or group not in self._groups):  # a leader, or one who has lost his
                return group
        return ""

    def same(self, kept: str, placed: Placed) -> bool | None:
        """Whether the kept answer says what the placed one does; None = cannot be told."""
        if kept == placed.answer_id:
            return True
        if self.kind == "text":
            return False
        group, other = self._groups.get(kept), self._groups.get(placed.answer_id)
        if group is not None and other is not None:
            return group == other
        if group is None or not placed.near:
            return None
        return any(
            like.cosine_millionths >= self._least and self._groups.get(like.answer_id) == group for like in placed.near
        )

    def forget(self, answer_id: str) -> None:
        """Nobody keeps it any more; unknown ones are no-ops."""
        self._groups.pop(answer_id, None)

    def check(self, kept: dict[str, int]) -> None:
        """Invariants."""
        assert all(answer_id in kept for answer_id in self._groups), "groups: only of answers that are kept"

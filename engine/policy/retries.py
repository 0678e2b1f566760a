"""How many second tries a tenant may have computed when it is busy: a share of its first ones, and a few for a start.

Without a budget every refusal comes back two or three times, and a short overload feeds itself. The form is Finagle's
``RetryBudget``: first tries pay in, second tries draw out. Whole numbers, no clock: a tenant that sends nothing new has
nothing to try again. That a try is not the first one is the client's own word (OpenAI's libraries say it); who lies
gains a place in a queue that overload control watches all the same.
"""

from __future__ import annotations

from engine.config import RetryConfig
from engine.values import Struct

ONE = 1_000_000


class RetryStats(Struct):
    """Since the start: tries that were not the first, and those of them that the budget refused."""

    seen: int = 0
    refused: int = 0


class RetryBudget:
    """One balance a tenant, in millionths of a try."""

    def __init__(self, config: RetryConfig) -> None:
        self._share, self._most = round(config.budget_share * ONE), config.budget_most * ONE
        self._balances: dict[str, int] = {}  # of tenants that have keys: few
        self._seen = self._refused = 0

    def arrived(self, tenant: str, attempt: int) -> None:
        """A request has come; ``attempt`` 0 is a first try."""
        if attempt:
            self._seen += 1
        else:
            self._balances[tenant] = min(self._most, self._balances.get(tenant, self._most) + self._share)

    def take(self, tenant: str) -> bool:
        """One more try, if there is budget for it."""
        balance = self._balances.get(tenant, self._most)
        if balance < ONE:
            self._refused += 1
            return False
        self._balances[tenant] = balance - ONE
        return True

    def stats(self) -> RetryStats:
        """A snapshot."""
        return RetryStats(self._seen, self._refused)

    def check(self) -> None:
        """Invariants."""
        assert all(0 <= balance <= self._most for balance in self._balances.values()), "balances: nothing to the most"

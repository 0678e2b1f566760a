"""What can be set about the state that several gateways share through Redis, and about the sessions kept in it."""

from __future__ import annotations

from engine.units import ms_to_ns, s_to_ns
from engine.values import Positive, PositiveFloat, Section


class SharedConfig(Section):
    """Redis, where several gateways share limits and exact answers. Without a ``url`` each has its own."""

    url: str = ""  # redis://[user:password@]host[:port][/database], rediss:// with TLS, unix:///path; "" = none
    prefix: str = "doorbuster"  # of all keys: two sales on one server stay apart
    budget_ms: Positive = 50  # a call that takes longer is given up: what Redis is for can do without it
    tick_us: Positive = 500  # commands of so long travel together: 80 us of Python a round trip, 18 in a batch
    max_waiting: Positive = 10_000  # calls without a reply; more are refused at once
    gateways: Positive = 1  # that share: while Redis is away each lets through its part of the limits
    lease_ms: Positive = 8_000  # a gateway that computes an answer for all is waited for so long
    poll_ms: Positive = 20  # a gateway that waits for another's answer looks so often
    answer_ttl_s: PositiveFloat = 300.0  # of an exact answer
    compress_bytes: Positive = 1024  # larger answers are compressed: below that it saves nothing

    @property
    def budget_ns(self) -> int:
        """Longest call."""
        return ms_to_ns(self.budget_ms)


class SessionsConfig(Section):
    """Conversations kept on the server, so that a client sends its new turn only."""

    enabled: bool = False
    ttl_s: PositiveFloat = 1800.0  # after the last turn: a shopper who comes back within half an hour goes on
    max_sessions: Positive = 50_000  # in one gateway's memory
    max_bytes: Positive = 256 << 20  # in one gateway's memory
    max_turns: Positive = 32  # of one session; the oldest go first
    session_bytes: Positive = 64 * 1024  # of one session's turns; the oldest go first: a context is far smaller
    turn_ms: Positive = 35_000  # whoever has a turn loses it then: the default `timeout_ms` and 5 s to write it down

    @property
    def ttl_ns(self) -> int:
        """Lifetime after the last write."""
        return s_to_ns(self.ttl_s)

    @property
    def turn_ns(self) -> int:
        """How long a turn may be held."""
        return ms_to_ns(self.turn_ms)

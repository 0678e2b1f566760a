"""All replicas of one gateway: who is there, who is trusted, who is least busy, and what is on its way to whom.

Each replica has a breaker of its own; a replica that has died is not asked until it is back. Whoever takes a seat gives
it back once: when the flight lands, or when its last rider has left, for a replica that hangs never says a word.
"""

from __future__ import annotations

from engine.config import GatewayConfig
from engine.events import Arrive, Ended, Pressure
from engine.policy.breaker import Breaker, BreakerStats, Verdict, spread
from engine.policy.flights import Flight, Seat
from engine.policy.pressure import Pressures
from engine.policy.router import Router, RouterStats
from engine.units import S_NS
from engine.values import Struct

GOOD = ("stop", "length")
BROKEN = ("failed", "lost")


class FleetStats(Struct):
    """Breakers by replica, the router's account, and the replicas that are there."""

    breakers: tuple[BreakerStats, ...]
    router: RouterStats
    up: tuple[int, ...]


class Fleet:
    """Owned by one Gateway."""

    def __init__(self, config: GatewayConfig) -> None:
        count, cuts = config.replicas, config.breaker.open_jitter
        self.breakers = [Breaker(config.breaker, spread(config.index * count + n, cuts)) for n in range(count)]
        self.router = Router(config.router, count, config.block_tokens)
        self.pressures = Pressures()
        self._up = dict.fromkeys(range(count))  # a set, in order

    def take(self, now_ns: int, ask: Arrive) -> Seat | None:
        """A seat on the replica that suits best, or None when no replica may be asked."""
        open_ = [n for n in self._up if not self.breakers[n].retry_after_ns(now_ns)]
        if not open_:
            return None
        replica = self.router.choose(open_, ask)
        permit = self.breakers[replica].acquire(now_ns)
        assert permit is not None, "take: this breaker lets through"
        return Seat(replica, permit)

    def refusal(self, now_ns: int) -> tuple[str, int]:
        """Why there was no seat, and how long that lasts at least: a code and nanoseconds."""
        if not self._up:
            return "replica_lost", S_NS
        return "breaker_open", min(self.breakers[n].retry_after_ns(now_ns) for n in self._up)

    def sent(self, flight: Flight, ask: Arrive) -> None:
        """Submitted just now."""
        assert flight.seat is not None, "sent: it has a seat"
        self.pressures.sent(flight)
        self.router.sent(flight.sid, flight.replica, ask)

    def started(self, flight: Flight) -> None:
        """Its first token is out."""
        self.pressures.forget(flight.sid)
        self.router.started(flight.sid)

    def deserted(self, now_ns: int, flight: Flight, late: bool) -> None:
        """Nobody waits for it any more. Late: its riders' time was up, and that is the replica's doing."""
        self._through(now_ns, flight, "cancelled" if not late else "slow" if flight.started else "hang")

    def landed(self, now_ns: int, flight: Flight, ended: Ended) -> None:
        """Its end."""
        good = ended.reason in GOOD
        self._through(now_ns, flight, "ok" if good else "fail" if ended.reason in BROKEN else "cancelled")

    def _through(self, now_ns: int, flight: Flight, verdict: Verdict) -> None:
        self.pressures.forget(flight.sid)
        self.router.ended(flight.sid)
        if flight.seat is not None:
            self.breakers[flight.replica].release(now_ns, flight.seat.permit, verdict)
            flight.seat = None

    def hear(self, pressure: Pressure) -> None:
        """A replica's word."""
        if pressure.replica in self._up:
            self.pressures.hear(pressure)
            self.router.hear(pressure.replica, pressure.queued_tokens)

    def lose(self, replica: int) -> None:
        """It has died."""
        self._up.pop(replica, None)
        self.pressures.lose(replica)
        self.router.lose(replica)

    def back(self, replica: int) -> None:
        """It has been started anew."""
        self._up[replica] = None
        self._up = dict.fromkeys(sorted(self._up))

    def stats(self) -> FleetStats:
        """A snapshot."""
        return FleetStats(tuple(breaker.stats() for breaker in self.breakers), self.router.stats(), tuple(self._up))

    def check(self) -> None:
        """Invariants."""
        for breaker in self.breakers:
            breaker.check()
        self.router.check()

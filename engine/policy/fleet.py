"""All replicas of one gateway: who is there, who is trusted, who is least busy, and what is on its way to whom.

Each replica has a breaker of its own; a replica that has died is not asked until it is back. Whoever takes a seat gives
it back once: when the flight lands, or when its last rider has left, for a replica that hangs never says a word.
"""

from __future__ import annotations

from engine.config import ClassConfig, GatewayConfig
from engine.events import Arrive, Ended, KvEvents, Pressure
from engine.policy.breaker import Breaker, BreakerStats, Verdict, spread
from engine.policy.flights import Flight, Seat
from engine.policy.forecast import Forecast, ForecastStats
from engine.policy.pressure import Pressures
from engine.policy.router import Router, RouterStats
from engine.units import S_NS
from engine.values import Struct

GOOD = ("stop", "length")
HOPELESS = (*GOOD, "failed", "refused")  # the very same request would end in the same way
ELSEWHERE = ("lost", "busy")  # the replica's doing: another one may compute it


class FleetStats(Struct):
    """Breakers by replica, the router's account, the replicas that are there, and what is predicted of them."""

    breakers: tuple[BreakerStats, ...]
    router: RouterStats
    up: tuple[int, ...]
    forecast: ForecastStats = ForecastStats((), (), 0)


class Fleet:
    """Owned by one Gateway."""

    def __init__(self, config: GatewayConfig) -> None:
        count, cuts = config.replicas, config.breaker.open_jitter
        self.breakers = [Breaker(config.breaker, spread(config.index * count + n, cuts)) for n in range(count)]
        self.router = Router(config.router, count, config.block_tokens)
        self.pressures = Pressures()
        self.forecast = Forecast(count)
        self._overload, self._classes = config.overload, config.classes
        self._up = dict.fromkeys(range(count))  # a set, in order
        self._gone: dict[int, None] = {}  # for good
        self._closed_ns: dict[int, int] = {}  # upstreams that have said no: until when nothing is sent there

    def take(self, now_ns: int, ask: Arrive, avoid: int | None = None) -> Seat | None:
        """A seat on the replica that suits best, or None when no replica may be asked.

        ``avoid``: where it has just failed. A server that fails at once has little to do, and would be chosen again;
        so would one that takes nothing at the moment.
        """
        open_ = [n for n in self._up if not self.breakers[n].retry_after_ns(now_ns)]
        if not open_:
            return None
        others = [n for n in open_ if n != avoid] or open_
        takes = [n for n in others if self._closed_ns.get(n, 0) <= now_ns] or others
        replica = self.router.choose(now_ns, takes, ask)
        permit = self.breakers[replica].acquire(now_ns)
        assert permit is not None, "take: this breaker lets through"
        return Seat(replica, permit)

    def late_ns(self, now_ns: int, ask: Arrive, cls: ClassConfig) -> int:
        """By how much its first token would come too late, as predicted for the replica that would be chosen.

        0: in time, or not known, or not to be asked: it is off, or the work is critical, which no guess turns away.
        """
        if not self._overload.predictive or cls.priority == 0:
            return 0
        open_ = [n for n in self._up if not self.breakers[n].retry_after_ns(now_ns)]
        if not open_:
            return 0
        replica = self.router.choose(now_ns, open_, ask)
        if self.forecast.idle(replica, cls.priority):
            return 0  # were it refused too, no step would ever teach a better pace
        wait_ns = self.forecast.ttft_ns(replica, cls.priority, self.router.to_compute(replica, ask))
        late_ns = 0 if wait_ns is None else max(0, now_ns + wait_ns - ask.arrived_ns - cls.start_within_ns)
        self.forecast.refused += late_ns > 0
        return late_ns

    def predicted_ns(self) -> dict[str, int]:
        """Class -> time to first token of the next one, were all its prompt cached: at the best replica."""
        if not self._overload.predicted_signal:
            return {}
        out: dict[str, int] = {}
        for name, cls in self._classes.items():
            known = [ns for n in self._up if (ns := self.forecast.ttft_ns(n, cls.priority, 0)) is not None]
            if known:
                out[name] = min(known)
        return out

    @property
    def away(self) -> bool:
        """No replica is there, but one is to come back."""
        return not self._up and len(self._gone) < len(self.breakers)

    def refusal(self, now_ns: int) -> tuple[str, int]:
        """Why there was no seat, and how long that lasts at least: a code and nanoseconds."""
        if not self._up:
            return "replica_lost", S_NS
        return "breaker_open", min(self.breakers[n].retry_after_ns(now_ns) for n in self._up)

    def sent(self, flight: Flight, ask: Arrive) -> int | None:
        """Submitted just now. The predicted time to its first token, if a pace is known."""
        assert flight.seat is not None, "sent: it has a seat"
        tokens = self.router.to_compute(flight.replica, ask)
        predicted_ns = self.forecast.ttft_ns(flight.replica, flight.priority, tokens)
        self.forecast.sent(flight.sid, flight.replica, flight.priority, tokens)
        self.pressures.sent(flight)
        self.router.sent(flight.sent_ns, flight.sid, flight.replica, ask)
        return predicted_ns

    def started(self, flight: Flight) -> None:
        """Its first token is out."""
        self.pressures.forget(flight.sid)
        self.forecast.forget(flight.sid, flight.replica)
        self.router.started(flight.sid)

    def deserted(self, now_ns: int, flight: Flight, late: bool) -> None:
        """Nobody waits for it any more. Late: its riders' time was up, and that is the replica's doing."""
        self._through(now_ns, flight, "cancelled" if not late else "slow" if flight.started else "hang")

    def landed(self, now_ns: int, flight: Flight, ended: Ended) -> None:
        """Its end. One that is "lost" with its replica says nothing to the breaker: that one is not asked any more.

        Lost alone, it is what an upstream has failed at. That one is busy, or refuses this request, is no failure.
        """
        failed = ended.reason == "failed" or (ended.reason == "lost" and flight.replica in self._up)
        verdict: Verdict = "ok" if ended.reason in GOOD else "fail" if failed else "cancelled"
        self._through(now_ns, flight, "ignored" if ended.reason in ("busy", "refused") else verdict)

    def _through(self, now_ns: int, flight: Flight, verdict: Verdict) -> None:
        self.pressures.forget(flight.sid)
        self.forecast.forget(flight.sid, flight.replica)
        self.router.ended(flight.sid)
        if flight.seat is not None:
            self.breakers[flight.replica].release(now_ns, flight.seat.permit, verdict)
            flight.seat = None

    def hear(self, pressure: Pressure) -> None:
        """A replica's word."""
        if pressure.replica in self._up:
            self.pressures.hear(pressure)
            self.forecast.hear(pressure)
            self._closed_ns[pressure.replica] = pressure.closed_until_ns
            self.router.hear(pressure.replica, pressure.queued_tokens)

    def hear_kv(self, events: KvEvents) -> None:
        """What its prefix cache holds has changed."""
        if events.replica in self._up:
            self.router.hear_kv(events.replica, events.stored, events.removed)

    def lose(self, replica: int, for_good: bool = False) -> None:
        """It has died, and is started anew unless that is for good."""
        self._up.pop(replica, None)
        if for_good:
            self._gone[replica] = None
        self.pressures.lose(replica)
        self._closed_ns.pop(replica, None)
        self.forecast.lose(replica)
        self.router.lose(replica)

    def back(self, replica: int) -> None:
        """It has been started anew."""
        self._gone.pop(replica, None)
        self._up[replica] = None
        self._up = dict.fromkeys(sorted(self._up))

    def stats(self) -> FleetStats:
        """A snapshot."""
        return FleetStats(
            tuple(breaker.stats() for breaker in self.breakers), self.router.stats(), tuple(self._up),
            self.forecast.stats(),
        )

    def check(self, seated: list[Flight]) -> None:
        """Invariants. ``seated``: the flights that hold a seat."""
        for replica, breaker in enumerate(self.breakers):
            breaker.check()
            permits = sum(flight.replica == replica for flight in seated)
            assert breaker.stats().open_permits == permits, "permits: one for each flight that somebody waits for"
        self.router.check()
        self.forecast.check()

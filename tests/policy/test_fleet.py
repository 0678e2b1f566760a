"""Seats on replicas: taken from whom may be asked, given back once, whatever becomes of the replica.

Mutations it caught: a lost replica asked; a word of a lost one believed; the longest Retry-After; a seat given back
twice; hang told as cancelled; a late end of a started flight told as a hang.
"""

from __future__ import annotations

from itertools import pairwise

import pytest

from engine.config import BreakerConfig, GatewayConfig
from engine.events import Arrive, Ended, Pressure, Waiting
from engine.policy.breaker import spread
from engine.policy.fleet import Fleet
from engine.policy.flights import Flight, Flights
from engine.units import MS_NS, S_NS

ASK = Arrive(0, "r", "shop", "chat", 0, prompt_tokens=50, max_tokens=10)


def fleet(replicas: int = 2, jitter: float = 0.0) -> Fleet:
    breaker = BreakerConfig(
        window="count", window_size=4, minimum_calls=2, open_ms=1_000, open_jitter=jitter, half_open_permits=1
    )
    return Fleet(GatewayConfig(classes={}, tenants={}, breaker=breaker, replicas=replicas))


class Airport:
    """Flights on a fleet."""

    def __init__(self, replicas: int = 2) -> None:
        self.fleet, self.flights = fleet(replicas), Flights(0)

    def depart(self, now_ns: int = 0) -> Flight | None:
        seat = self.fleet.take(now_ns, ASK)
        if seat is None:
            return None
        flight = self.flights.lead(ASK, b"", 1, now_ns, seat)
        self.fleet.sent(flight, ASK)
        return flight

    def states(self) -> list[str]:
        return [breaker.state for breaker in self.fleet.stats().breakers]


def test_each_replica_is_judged_by_itself() -> None:
    port = Airport()
    for _ in range(4):
        flight = port.depart()
        assert flight is not None
        port.fleet.landed(0, flight, Ended(flight.sid, "failed" if flight.replica == 0 else "stop"))
    assert port.states() == ["open", "closed"]
    assert [flight.replica if flight else None for flight in (port.depart() for _ in range(5))] == [1] * 5
    port.fleet.lose(1)
    assert port.depart() is None
    assert port.fleet.refusal(0) == ("breaker_open", S_NS)
    port.fleet.lose(0)
    assert port.fleet.refusal(0) == ("replica_lost", S_NS)
    port.fleet.back(1)
    back = port.depart()
    assert back is not None
    assert back.replica == 1


def test_the_refusal_names_the_first_replica_that_may_be_asked_again() -> None:
    port = Airport()
    for now_ns, losers in ((0, {0}), (400 * MS_NS, {0, 1})):
        for _ in range(6):
            if flight := port.depart(now_ns):
                port.fleet.landed(now_ns, flight, Ended(flight.sid, "failed" if flight.replica in losers else "stop"))
    assert port.states() == ["open", "open"]
    assert port.fleet.refusal(500 * MS_NS) == ("breaker_open", 500 * MS_NS)


@pytest.mark.parametrize(
    ("late", "started", "said"),
    [(True, False, (0, 1, 0)), (True, True, (1, 0, 0)), (False, False, (0, 0, 1)), (False, True, (0, 0, 1))],
)
def test_what_a_deserted_flight_says_of_its_replica(late: bool, started: bool, said: tuple[int, int, int]) -> None:
    port = Airport(1)
    flight = port.depart()
    assert flight is not None
    if started:
        port.fleet.started(flight)
        flight.started = True
    port.fleet.deserted(5, flight, late)
    stats = port.fleet.stats()
    assert (stats.breakers[0].slow, stats.breakers[0].failed, stats.breakers[0].silent) == said
    assert stats.breakers[0].open_permits == 0
    assert stats.router.ahead_tokens == (0,)
    port.fleet.landed(9, flight, Ended(flight.sid, "aborted"))
    assert port.fleet.stats().breakers[0].unknown == 0, "the seat was given back once"


def test_a_death_says_nothing_to_the_breaker_and_gives_every_seat_back() -> None:
    port = Airport(1)
    flights = [port.depart() for _ in range(4)]
    assert not port.fleet.away
    port.fleet.lose(0)
    assert port.fleet.away
    for flight in flights:
        assert flight is not None
        port.fleet.landed(3, flight, Ended(flight.sid, "lost"))
    port.fleet.check([])
    port.fleet.back(0)
    assert port.states() == ["closed"] and port.fleet.stats().breakers[0].failed == 0
    assert port.depart() is not None


def test_who_fails_alone_is_to_blame_and_who_is_busy_is_not() -> None:
    """An upstream that is there: its failures open the breaker; that it takes no more, or not this one, does not."""
    port = Airport(1)
    for reason in ("lost", "busy", "refused"):
        flight = port.depart()
        assert flight is not None
        port.fleet.landed(3, flight, Ended(flight.sid, reason))  # type: ignore[arg-type]
    stats = port.fleet.stats().breakers[0]
    assert (stats.failed, stats.silent) == (1, 2)


def test_nothing_goes_back_to_who_has_just_failed_or_takes_nothing() -> None:
    port = Airport(3)
    ask = Arrive(0, "r", "shop", "chat", 0, 100, 10)

    def taken(now_ns: int, avoid: int | None = None) -> int:
        seat = port.fleet.take(now_ns, ask, avoid)
        assert seat is not None
        return seat.replica

    assert (taken(1), taken(1, avoid=0)) == (0, 1)
    port.fleet.hear(Pressure(0, -1, running=0, closed_until_ns=50))
    assert (taken(49), taken(49, avoid=1), taken(50)) == (1, 2, 0)
    port.fleet.hear(Pressure(1, -1, running=0, closed_until_ns=90))
    port.fleet.hear(Pressure(2, -1, running=0, closed_until_ns=90))
    assert taken(60, avoid=0) == 1, "nobody else takes anything: it waits there rather than fail at once"
    port.fleet.lose(0)
    port.fleet.back(0)
    assert taken(60) == 0, "a new life takes all"


def test_a_lost_replicas_last_words_are_not_believed() -> None:
    port = Airport()
    words = Pressure(0, 5, running=1, waiting=(Waiting("chat", 1, 7),), queued_tokens=900)
    port.fleet.hear(words)
    port.fleet.lose(0)
    port.fleet.hear(words)  # it was on its way
    assert port.fleet.pressures.oldest_ns() == {}
    assert port.fleet.stats().router.ahead_tokens == (0, 0)


def test_gateways_do_not_probe_in_the_same_instant() -> None:
    cuts = [spread(number, 0.1) for number in range(8)]
    assert all(0 <= cut < 100_000 for cut in sum(cuts, ()))
    firsts = sorted(cut[0] for cut in cuts)
    assert min(b - a for a, b in pairwise(firsts)) > 1_000, "open times of one second: 1 ms apart"
    assert spread(3, 0.0) == ()

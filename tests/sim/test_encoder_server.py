"""The twin's encoder takes as many texts at once as live does.

Run: python -m pytest tests/sim/test_encoder_server.py -q
Mutations it caught: eight texts at once, whatever the deadline; a batch size that does not learn.
"""

from __future__ import annotations

import numpy as np
import pytest
import simpy

from engine.units import MS_NS, S_NS
from sim.twin.driver import Rank, at
from sim.twin.encoder import EncoderCost, EncoderServer

MINILM = EncoderCost(fixed_ns=3_630_688, text_ns=5_219_150)
SECONDS, DEADLINE_NS = 60, 50 * MS_NS


def in_time_rps(rate_rps: float) -> float:
    """Vectors a second that came within the deadline, when questions that nobody remembers come at random."""
    env, words, rng = simpy.Environment(0), [], np.random.default_rng(3)
    gaps = (rng.exponential(S_NS / rate_rps, round(rate_rps * SECONDS))).astype(int).cumsum().tolist()
    vectors = {b"%d" % n: np.zeros(4, np.float32) for n in range(len(gaps))}
    server = EncoderServer(
        lambda: int(env.now), lambda wait_ns, call: at(env, Rank.ENCODER, wait_ns, call), MINILM, vectors
    )
    for number, at_ns in enumerate(gaps):
        at(env, Rank.ARRIVE, at_ns, lambda key=b"%d" % number: server.encode(
            key, int(env.now) + DEADLINE_NS, lambda vector, word: words.append(word)
        ))
    env.run()
    assert len(words) == len(gaps)
    return words.count("ok") / SECONDS


def test_more_questions_than_it_can_take_do_not_make_it_answer_fewer_in_time() -> None:
    """With batches of eight, whatever the deadline: 113 a second in time at 120, 55 at 200, 32 at 300."""
    assert in_time_rps(40) == pytest.approx(40, rel=0.02)
    assert in_time_rps(120) < in_time_rps(200) < in_time_rps(300)
